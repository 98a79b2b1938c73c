"""The demo, end to end on one seed and one weight."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for module in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(module, reason=f"needs {module}, as the demo does")

ROOT = Path(__file__).parents[2]


def demo(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "examples.finetune_digits", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def test_demo(tmp_path) -> None:
    result = demo("--seeds", "1", "--weight", "1", "--device", "cpu", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for method in ("plain", "linear probe", "CKA", "covariance"):
        assert method in result.stdout
    picture = (tmp_path / "tradeoff.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    record = json.loads((tmp_path / "results.json").read_text())
    runs = {run["method"]: run for run in record["runs"]}
    for method in ("cka", "covariance"):
        assert runs[method]["similarity"] > runs["plain"]["similarity"] + 0.05
    assert runs["linear probe"]["similarity"] == pytest.approx(1)


def test_no_test_image_is_trained_on() -> None:
    from examples.digits.data import draw_data

    data = draw_data(0, torch.device("cpu"))
    assert len(data.shots[0]) == 30
    assert len(data.new_test[0]) > 100
    for training, test in ((data.shots, data.new_test), (data.pretraining, data.old_test)):
        same = (training[0][:, None] == test[0][None]).flatten(2).all(-1)
        assert not same.any()


def test_wrong_option() -> None:
    result = demo("--measure", "cca")
    assert result.returncode == 2
    assert "invalid choice: 'cca'" in result.stderr
