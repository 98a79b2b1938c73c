"""Features of a pretrained model, and the errors that implementations make on them."""

from __future__ import annotations

import pytest
import torch

from benchmarks import measure, oracle, run, workloads
from benchmarks.data import make_antiberty
from benchmarks.providers import NAIVE, OURS, providers
from benchmarks.workloads import PROFILES, REAL_FEATURES, Workload, features
from tests.support import cases

CPU = torch.device("cpu")
(REAL,) = (w for w in PROFILES["cpu"].workloads if w.kind == "real")


def test_real_features() -> None:
    pytest.importorskip("safetensors", reason="needs safetensors")
    inputs = features(REAL, CPU)
    assert len(inputs.students) == REAL.layers
    for x, teacher in zip(inputs.students, inputs.teachers, strict=True):
        student = x.detach()
        assert student.shape == teacher.shape == (REAL.rows, REAL.width)
        assert student.dtype == torch.bfloat16
        assert student.isfinite().all()
        assert teacher.isfinite().all()
        assert 0.01 < float((student - teacher).float().norm() / teacher.float().norm()) < 1
    # Layers differ.
    assert not torch.equal(*inputs.teachers)


def test_the_file_names_its_source() -> None:
    """Its metadata agrees with the current script."""
    safetensors = pytest.importorskip("safetensors", reason="needs safetensors")
    with safetensors.safe_open(REAL_FEATURES, "pt") as file:
        about = file.metadata()
    assert make_antiberty.SHA256 in about["source"]
    assert all(name in about["inputs"] for name, *_ in make_antiberty.ANTIBODIES)
    assert all(str(n) in about["layers"] for n in workloads.REAL_LAYERS)
    assert f"{make_antiberty.STEPS} steps" in about["student"]
    assert "transformers" in about["versions"]
    licence = REAL_FEATURES.with_name("LICENSE-antiberty").read_text(encoding="utf-8")
    assert about["licence"].removeprefix("MIT, ") in licence
    assert REAL_FEATURES.stat().st_size < 2e6


def test_massive_activations_are_large_few_and_shared() -> None:
    x, y = torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(0)).abs() + 0.1
    student, teacher = workloads.massive(x, y, torch.Generator().manual_seed(1))
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
    monkeypatch.setattr(workloads, "REAL_FEATURES", tmp_path / "none.safetensors")
    peaks = {"matmul_flops": {"bfloat16": 1e9}, "copy_bytes": 1e9}
    entry = run.measured(REAL, [], peaks, CPU, 5, max_rounds=5)
    assert "none.safetensors" in entry.reason
    assert entry.results == {}
