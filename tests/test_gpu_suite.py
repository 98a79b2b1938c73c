"""The part of the benchmarks that is for GPUs, on a stand-in: only the hardware is missing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment, files, gpu_check, run, schema, tables, workloads
from benchmarks.measure import CLOCKS
from benchmarks.providers import NAIVE, TF32
from tests import stand_in_gpu

GPU = torch.device("cuda")


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_in_gpu.install(monkeypatch.setattr)
    monkeypatch.setattr(run, "PROFILES", workloads.PROFILES)
    monkeypatch.delenv("PART", raising=False)
    with stand_in_gpu.OnCPU():
        yield


@pytest.fixture
def result(_gpu: None, tmp_path: Path) -> dict[str, Any]:
    assert run.main(["--out", str(tmp_path), "--budget", "20"]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("stand-in-gpu-")
    return files.read(path)


def test_a_result_of_a_gpu(result: dict[str, Any]) -> None:
    where = result["environment"]
    assert where["device"] == where["gpu"] == stand_in_gpu.NAME
    assert where["driver"] == "570.1"
    assert "1980 MHz" in where["clocks"]
    assert result["profile"] == "gpu"
    names = {p["name"]: p["reason"] for p in result["providers"]}
    assert names[TF32] is None
    assert names["rift_kernels triton"] == "a stand-in has no kernels"
    for workload in result["workloads"]:
        assert workload["reason"] is None
        for name, entry in workload["results"].items():
            assert entry["reason"] is None, (name, entry)
            assert set(entry["seconds"]) == set(CLOCKS)
            assert entry["seconds"]["wall"]["q50"] >= entry["seconds"]["host"]["q50"] > 0
            # What is captured runs, and is replayed.
            assert entry["graph"]["q50"] >= 0, (name, entry["graph_reason"])
            assert entry["launches"] == 2
            assert entry["memory"] == {"forward": 4000, "backward": 4000, "both": 4000}
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
    entry = files.read(path)["workloads"][0]["results"][NAIVE]
    assert entry["graph"] is None
    assert "not permitted when stream is capturing" in entry["graph_reason"]


def test_inputs_are_larger_than_the_cache(_gpu, monkeypatch) -> None:  # noqa: PT019
    """As many copies as twice the L2 cache holds, each of them in a graph once."""
    from benchmarks import graphs, measure, providers

    calls = []
    naive = providers.providers(GPU, ())[0]
    workload = workloads.Workload("cka_biased", 16, 8)
    task = measure.Task(naive, "cka_biased", workloads.features(workload, GPU))
    assert task.inputs.nbytes == 2 * 16 * 8 * 4
    forward = measure.Task.forward

    def counted(self: measure.Task) -> torch.Tensor:
        calls.append(self.inputs.students[0].data_ptr())
        return forward(self)

    monkeypatch.setattr(measure.Task, "forward", counted)
    assert set(graphs.seconds(task, GPU)) == {"q20", "q50", "q80"}
    # 2 x 4 KiB of 1 KiB each; once to warm up and once to be captured.
    assert len(set(calls)) == 8
    assert len(calls) == 16


@pytest.mark.usefixtures("_gpu")
def test_gpu_check_runs_its_parts(monkeypatch, tmp_path, capsys) -> None:
    """As processes, with this GPU in each; nothing is installed."""
    started: list[list[str]] = []
    process = gpu_check._process

    def recorded(part: str, line: list[str], *rest: Any, **how: Any) -> dict[str, Any]:
        started.append(line)
        if part in ("build", "tests"):
            # Minutes, and the same as without a GPU.
            line = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
        return process(part, line, *rest, **how)

    for name, value in stand_in_gpu.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(gpu_check, "_process", recorded)
    monkeypatch.setattr(gpu_check, "read_junit", lambda _: {"passed": 1, "failed": 0, "skipped": 0})
    monkeypatch.setattr(gpu_check.shutil, "which", lambda _: None)
    # As after long tests: the comparison alone.
    monkeypatch.setattr(gpu_check, "START", -1e9)
    out = tmp_path / "out"
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setenv("PART", "bench")
    assert gpu_check.main() == 0, (out / "logs" / "bench.txt").read_text()
    (path,) = out.glob("stand-in-gpu-*.json")
    assert files.read(path)["environment"]["gpu"] == stand_in_gpu.NAME
    assert stand_in_gpu.NAME in (out / "logs" / "build.txt").read_text()
    (summary,) = out.glob("gpu-check-*.json")
    assert set(json.loads(summary.read_text())["parts"]) == {"build", "bench"}
    monkeypatch.setenv("PART", "sanitize")
    assert gpu_check.main() == 0
    assert "not done: compute-sanitizer is not on PATH" in capsys.readouterr().out
    assert not any("pip" in word for line in started for word in line)


def test_gpu_check_ends_within_nine_minutes() -> None:
    assert sum(gpu_check.LIMITS.values()) <= 9 * 60 - 5
    for spent in (0, 100, 200, 375, 1000):
        limit = gpu_check.bench_limit(spent)
        assert gpu_check.LIMITS["bench"] <= limit <= gpu_check.MOST_FOR_BENCH
        if spent <= 375:
            assert spent + limit <= 9 * 60 - 5


def test_every_field_of_the_environment_is_in_the_schema() -> None:
    assert set(environment.describe(torch.device("cpu"))) == set(schema._HEADER["environment"])
