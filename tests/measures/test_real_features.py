"""Features of a pretrained model, and the errors that implementations make on them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measure, oracle, real, run
from benchmarks.providers import NAIVE, OURS, providers
from benchmarks.workloads import Workload, features
from tests.support import cases

CPU = torch.device("cpu")
REAL = Workload("cka_debiased", real.ROWS, real.WIDTH, torch.bfloat16, real.LAYERS, kind="real")


def test_real_features() -> None:
    pytest.importorskip("safetensors", reason="needs safetensors")
    pairs = real.layers(CPU)
    assert len(pairs) == real.LAYERS
    for student, teacher in pairs:
        assert student.shape == teacher.shape == (real.ROWS, real.WIDTH)
        assert student.dtype == torch.bfloat16
        assert student.isfinite().all()
        assert teacher.isfinite().all()
        assert 0.01 < float((student - teacher).float().norm() / teacher.float().norm()) < 1
    # Layers differ.
    assert not torch.equal(pairs[0][1], pairs[1][1])


def test_the_file_names_its_source() -> None:
    """Its metadata agrees with the current script."""
    safetensors = pytest.importorskip("safetensors", reason="needs safetensors")
    with safetensors.safe_open(real.DATA, "pt") as file:
        about = file.metadata()
    assert real._WHEEL in about["source"]
    assert real._SHA256 in about["source"]
    assert all(name in about["inputs"] for name in real._SEQUENCES)
    assert all(str(n) in about["layers"] for n in real._LAYERS)
    assert f"{real._STEPS} steps" in about["student"]
    assert "transformers" in about["versions"]
    licence = real.DATA.with_name("LICENSE-antiberty").read_text(encoding="utf-8")
    assert about["licence"].removeprefix("MIT, ") in licence
    assert real.DATA.stat().st_size < 2e6


def test_massive_activations_are_large_few_and_shared() -> None:
    x, y = torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(0)).abs() + 0.1
    student, teacher = real.massive(x, y, torch.Generator().manual_seed(1))
    changed = teacher != y
    assert torch.equal(changed, student != x)
    assert changed.sum() == 3 * 4
    assert changed.any(0).sum() == 4
    for massive in (student[changed], teacher[changed]):
        ratio = massive / y.median()
        # It hardly depends on the input.
        assert torch.allclose(ratio, torch.full_like(ratio, 1000), rtol=0.01)


@pytest.mark.parametrize(
    "workload", [REAL, Workload("cka_biased", 256, 64, torch.bfloat16, kind="massive")], ids=str
)
def test_ours_is_right_on_real_features(workload: Workload) -> None:
    if workload.kind == "real":
        pytest.importorskip("safetensors", reason="needs safetensors")
    inputs = features(workload, CPU)
    exact = oracle.Oracle(workload, inputs)
    errors = {}
    for provider in providers(CPU, compiled=()):
        if provider.name in (NAIVE, f"{OURS}eager"):
            task = measure.Task(provider, workload.measure, inputs)
            values = task.forward()
            errors[provider.name] = exact.errors(values, task.backward(values))
    value, gradient = errors[f"{OURS}eager"]
    assert value <= cases.VALUE_TOLERANCE[torch.bfloat16]
    assert gradient <= cases.GRADIENT_TOLERANCE[torch.bfloat16]
    print(f"{workload}: gradient error {errors[NAIVE][1]:.1e} naive, {gradient:.1e} ours")
    assert errors[NAIVE][1] > 2 * gradient


def test_without_the_file_the_workload_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    pytest.importorskip("safetensors", reason="needs safetensors")
    monkeypatch.setattr(real, "DATA", tmp_path / "none.safetensors")
    peaks = dict.fromkeys(("float64", "float32", "bfloat16"), 1e9)
    entry = run.describe(REAL, [], peaks, 1e9)
    run.complete(entry, REAL, [], CPU, 5, max_rounds=5)
    assert entry.reason.endswith("run python -m benchmarks.real")
    assert entry.results == {}


def test_the_lines_about_features() -> None:
    a = torch.tensor([1.0, -1.0]).repeat(32)
    b = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(16)
    teacher = torch.stack([a] * 8, 1) + 0.5
    student = torch.stack([a] * 4 + [b] * 4, 1)
    for line in real.describe([(student, teacher)] * real.LAYERS):
        # 1.5 / 0.5; 0.5 / 1; half of the variance is shared, so CKA is 1 / sqrt(2).
        assert line.endswith("median 3.0, offset over deviation 0.50, 1 - CKA 2.9e-01")


def test_nothing_is_overwritten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors", reason="needs safetensors")
    copy = tmp_path / real.DATA.name
    copy.write_bytes(real.DATA.read_bytes())
    monkeypatch.setattr(real, "DATA", copy)
    assert real.main() == 0
    out = capsys.readouterr().out
    assert "remove it to make it anew" in out
    assert out.count("largest activation over median") == real.LAYERS
    assert copy.read_bytes() == (Path(real.__file__).parent / "data" / copy.name).read_bytes()


@pytest.mark.parametrize("package", ["transformers", "safetensors.torch"])
def test_a_missing_package_is_named(
    package: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    if package != "transformers":
        monkeypatch.setitem(sys.modules, package, None)
    else:
        monkeypatch.setattr(real, "DATA", tmp_path / "none.safetensors")
    assert real.main() == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert package.split(".")[0] in line


@pytest.mark.parametrize(
    ("status", "message"),
    [(0, "other.whl must have the SHA-256 30d91"), (1, "pip could not download .* status 1")],
)
def test_another_wheel_is_refused(
    status: int, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(command: list[str], **_: bool) -> subprocess.CompletedProcess[str]:
        (tmp_path / "other.whl").write_bytes(b"not a wheel")
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(real.UnavailableError, match=message):
        real._wheel(tmp_path)
