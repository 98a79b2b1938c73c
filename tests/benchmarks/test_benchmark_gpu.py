"""What benchmarks measure only on a GPU, tested on the stand-in GPU."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import (
    files,
    kernel_times,
    measure,
    performance,
    providers,
    run,
    schema,
    tables,
    workloads,
)
from benchmarks.measure import CLOCKS
from benchmarks.providers import NAIVE, TF32
from tests.support import stand_in_gpu

GPU = torch.device("cuda")


@pytest.fixture
def result(_stand_in: None, tmp_path: Path) -> schema.Benchmark:
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


@pytest.mark.usefixtures("_stand_in")
def test_a_provider_that_cannot_be_captured_says_why(monkeypatch, tmp_path) -> None:
    def refuse(_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    assert run.main(["--out", str(tmp_path), "--budget", "20"]) == 0
    (path,) = tmp_path.iterdir()
    outcome = files.read(path).workloads[0].results[NAIVE]
    assert outcome.graph is None
    assert "not permitted when stream is capturing" in outcome.graph_reason


@pytest.mark.usefixtures("_stand_in")
def test_inputs_are_larger_than_the_cache(monkeypatch) -> None:
    """As many copies as twice the L2 cache holds, each of them in a graph once."""
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


@pytest.mark.usefixtures("_stand_in")
def test_the_time_of_each_kernel(monkeypatch, capsys) -> None:
    """By hand: two kernels of ours and a copy, in each of the tasks that take turns."""

    def events(tasks, _) -> list[Any]:
        run = ("cka_small_kernel", 4.0), ("rift::scale_kernel<Bf16>(int)", 0.5), ("Memset", 2.0)
        for task in tasks:
            task.backward(task.forward())
        return [
            SimpleNamespace(name=name, self_device_time_total=time)
            for name, time in run * len(tasks)
        ]

    every = providers.providers(torch.device("cpu"), ())
    (eager,) = (p for p in every if p.name == "rift_kernels eager")
    monkeypatch.setattr(kernel_times, "candidates", lambda: [eager])
    monkeypatch.setattr(measure, "device_events", events)
    monkeypatch.setattr(performance, "SHAPES", [(16, 8, 2, None), (32, 8, 1, None)])
    assert kernel_times.main() == 0
    cells = [line.strip("| ").split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    rows = [[cell.strip() for cell in row] for row in cells]
    by_kernel = [["cka_small", "4.0"], ["scale", "0.5"], ["others", "2.0"]]
    assert [row[2:] for row in rows] == [*by_kernel, *by_kernel, ["", "6.5"]]
    assert [row[1] for row in rows[-2:]] == ["rift_kernels eager", "torch.mm"]
