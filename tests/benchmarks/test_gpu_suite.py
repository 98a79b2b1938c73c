"""The part of the benchmarks that is for GPUs, on a stand-in: only the hardware is missing."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    exercise,
    files,
    gpu_check,
    gpu_tests,
    run,
    schema,
    tables,
    workloads,
)
from benchmarks.measure import CLOCKS
from benchmarks.providers import NAIVE, TF32
from rift_kernels.dispatch import availability
from tests.support import stand_in_gpu

GPU = torch.device("cuda")


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_in_gpu.install(monkeypatch.setattr)
    monkeypatch.setattr(run, "PROFILES", workloads.PROFILES)
    monkeypatch.delenv("OUT", raising=False)
    with stand_in_gpu.OnCPU():
        yield


@pytest.fixture
def result(_gpu: None, tmp_path: Path) -> schema.Benchmark:
    assert run.main(["--out", str(tmp_path), "--budget", "20"]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("stand-in-gpu-")
    return files.read(path)


def test_a_result_of_a_gpu(result) -> None:
    where = result.environment
    assert where.device == where.gpu == stand_in_gpu.NAME
    assert where.driver == "570.1"
    assert "1980 MHz" in where.clocks
    assert result.profile == "gpu"
    names = {p.name: p.reason for p in result.providers}
    assert names[TF32] is None
    assert names["rift_kernels triton"] == "a stand-in has no kernels"
    for workload in result.workloads:
        assert workload.reason is None
        for name, outcome in workload.results.items():
            assert outcome.reason is None, (name, outcome)
            assert set(outcome.seconds) == set(CLOCKS)
            assert outcome.seconds["wall"].q50 >= outcome.seconds["host"].q50 > 0
            # What is captured runs, and is replayed.
            assert outcome.graph.q50 >= 0, (name, outcome.graph_reason)
            assert outcome.launches == 2
            assert outcome.memory == {"forward": 4000, "backward": 4000, "both": 4000}
    text = tables.summary(result)
    assert "The device alone, in CUDA graphs" in text
    assert f"**{stand_in_gpu.NAME} (driver 570.1)" in text
    assert re.search(r"\| +TF32 +\|", text)


@pytest.mark.usefixtures("_gpu")
def test_a_provider_that_cannot_be_captured_says_why(monkeypatch, tmp_path) -> None:
    def refuse(_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    assert run.main(["--out", str(tmp_path), "--budget", "20"]) == 0
    (path,) = tmp_path.iterdir()
    outcome = files.read(path).workloads[0].results[NAIVE]
    assert outcome.graph is None
    assert "not permitted when stream is capturing" in outcome.graph_reason


def test_inputs_are_larger_than_the_cache(_gpu, monkeypatch) -> None:  # noqa: PT019
    """As many copies as twice the L2 cache holds, each of them in a graph once."""
    from benchmarks import measure, providers

    calls = []
    naive = providers.providers(GPU, ())[0]
    workload = workloads.Workload("cka_biased", 16, 8)
    task = measure.Task(naive, "cka_biased", workloads.features(workload, GPU))
    forward = measure.Task.forward

    def counted(self: measure.Task) -> torch.Tensor:
        calls.append(self.inputs.students[0].data_ptr())
        return forward(self)

    monkeypatch.setattr(measure.Task, "forward", counted)
    assert measure.graph_seconds(task, GPU).q50 >= 0
    # 2 x 4 KiB of 1 KiB each; once to warm up and once to be captured.
    assert len(set(calls)) == 8
    assert len(calls) == 16


@pytest.fixture
def check(_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of gpu-check's results, whose processes have this GPU, too."""
    for name, value in stand_in_gpu.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")
    # A machine that does much else has all the time that it takes.
    patient = tuple(step._replace(most=1200.0) for step in gpu_check.STEPS)
    monkeypatch.setattr(gpu_check, "STEPS", patient)
    return tmp_path / "work"


def test_gpu_check_measures_in_processes(check: Path, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "copies"))
    assert gpu_check.main(["--minutes", "60", "--only", "bench headline", "bench moments"]) == 0, (
        check / "gpu-check.log"
    ).read_text()
    (path,) = check.glob("stand-in-gpu-*.json")
    result = files.read(path)
    assert result.environment.gpu == stand_in_gpu.NAME
    assert result.profile == "headline"
    assert "moments is not done" in (check / "gpu-check.log").read_text()
    summary = json.loads((tmp_path / "copies" / "gpu-check.json").read_text())
    assert summary["environment"]["device"] == stand_in_gpu.NAME
    assert files.read(tmp_path / "copies" / path.name) == result


def test_gpu_check_tests_the_stand_in(check: Path, monkeypatch) -> None:
    """As the tests do on a GPU; some of them, on tensors of the CPU."""
    tests = next(step for step in gpu_check.STEPS if step.name == "tests")
    few = tests._replace(command=tests.command + "/measures/test_golden.py -k values")
    monkeypatch.setattr(gpu_check, "STEPS", (few,))
    monkeypatch.setattr(gpu_check, "SPARE", ())
    status = gpu_check.main(["--minutes", "60", "--jobs", "1"])
    outcome = json.loads((check / "gpu-check.json").read_text())["steps"]["tests"]
    assert outcome["finished"], outcome
    assert outcome["passed"] > 0
    assert status == (1 if outcome["failed"] else 0)
    assert len(gpu_tests.read(check / "tests.jsonl")) == sum(
        outcome[kind] for kind in ("passed", "failed", "skipped")
    )


@pytest.mark.usefixtures("_gpu")
def test_all_that_gpu_check_measures(tmp_path) -> None:
    """The commands, with their arguments."""
    check = gpu_check.Check(tmp_path, None, 0.0, 2)
    kinds = []
    for step in (*gpu_check.STEPS, *gpu_check.SPARE):
        python, flag, module, *arguments = check.words(step, 60.0)
        if not step.name.startswith("bench"):
            continue
        assert (python, flag) == (sys.executable, "-m")
        command = importlib.import_module(module)
        assert command.main(arguments) == 0 if arguments else command.main() == 0
        kinds.append(module.removeprefix("benchmarks."))
    assert kinds == ["run", "host", "moments", "run", "step", "frontier"]
    results = [files.read(path) for path in tmp_path.glob("stand-in-gpu-*.json")]
    assert {type(r) for r in results} == {schema.Benchmark, schema.Step, schema.Frontier}
    assert [r.environment.gpu for r in results] == [stand_in_gpu.NAME] * 4
    (step,) = (r for r in results if isinstance(r, schema.Step))
    for part in step.finetunings:
        ways = [way for way in part.ways if way.seconds]
        assert all(set(way.seconds) == set(CLOCKS) for way in ways)
        assert any(way.loss for way in ways)


@pytest.mark.parametrize("few", [False, True])
def test_what_the_sanitizer_watches(few, _gpu, monkeypatch) -> None:  # noqa: PT019
    """Kernels of each kind, against the eager backend; here by the eager backend itself."""
    seen = []

    def value_and_gradient(name, x, _, mask, backend):
        seen.append((name, tuple(x.shape), x.dtype, mask is not None, backend))
        return torch.zeros(2)

    monkeypatch.setattr(exercise, "_value_and_gradient", value_and_gradient)
    monkeypatch.setattr(availability, "reason_against", lambda _: None)
    assert exercise.main(["--few"] if few else []) == 0
    names, shapes, _, masked, backends = (set(column) for column in zip(*seen, strict=True))
    assert backends == {"eager", "triton", "cuda"}
    assert names == set(exercise.FEW_MEASURES if few else exercise.MEASURES)
    assert shapes == set(exercise.FEW_SHAPES if few else exercise.SHAPES)
    assert len(seen) <= 20 if few else masked == {False, True}
    monkeypatch.setattr(
        exercise, "_value_and_gradient", lambda *a: torch.ones(2) * (a[-1] == "triton")
    )
    assert exercise.main(["--few"]) == 1


def test_nothing_can_be_installed_there(tmp_path) -> None:
    """In the processes above, which thus show that gpu-check installs nothing."""
    folder = tmp_path / "pip"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "__main__.py").write_text("print('installed')")
    variables = {**os.environ, **stand_in_gpu.environment(tmp_path), stand_in_gpu.VARIABLE: ""}
    line = [sys.executable, "-m", "pip", "install", "torch"]
    done = subprocess.run(line, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "nothing may be installed here" in done.stderr
    assert "installed\n" not in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_gpu_check_installs_nothing() -> None:
    """Neither does what it depends on."""
    line = ["make", "--always-make", "--dry-run", "gpu-check", f"PYTHON={sys.executable}"]
    done = subprocess.run(line, cwd=gpu_check.ROOT, capture_output=True, text=True, check=True)
    assert f"{sys.executable} -m benchmarks.gpu_check" in done.stdout
    assert "pip install" not in done.stdout
