"""The demo, end to end on one seed and one weight."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

for module in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(module, reason=f"the demo needs {module}, which is not installed")

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "finetune_digits.py"


def demo(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEMO), *options], capture_output=True, text=True, cwd=ROOT, check=False
    )


def test_demo(tmp_path) -> None:
    result = demo("--seeds", "1", "--weight", "1", "--device", "cpu", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for way in ("plain", "linear probe", "CKA", "covariance"):
        assert way in result.stdout
    picture = (tmp_path / "tradeoff.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert json.loads((tmp_path / "results.json").read_text())


def test_wrong_option() -> None:
    result = demo("--measure", "cca")
    assert result.returncode == 2
    assert "invalid choice: 'cca'" in result.stderr
