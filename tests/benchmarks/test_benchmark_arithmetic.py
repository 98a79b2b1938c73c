"""What the benchmarks compute: clocks, peaks, predictions, noise, errors, ratios."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks import flops, measure, oracle, predict, run, tables
from benchmarks.providers import NAIVE, Provider, providers
from benchmarks.run import AGAIN
from benchmarks.schema import Outcome, Quantiles
from benchmarks.workloads import Workload

CPU = torch.device("cpu")
EAGER = "rift_kernels eager"
RATES = dict.fromkeys(("float64", "float32", "bfloat16"), 1e9)
PEAKS = {"matmul_flops": RATES, "copy_bytes": 1e9}
SMALL = Workload("cka_biased", 16, 8)


def test_each_round_starts_with_another() -> None:
    turns: list[str] = []
    tasks: Any = {name: measure.Call(lambda name=name: turns.append(name)) for name in "abc"}
    measure.time_rounds(tasks, CPU, deadline=0, max_rounds=2)
    assert "".join(turns) == "abcbca"
    turns.clear()
    measure.time_rounds({"a": tasks["a"]}, CPU, deadline=0, max_rounds=50)
    assert len(turns) == measure.MIN_ROUNDS


def test_peaks_are_the_best_of_a_few_without_the_first(monkeypatch) -> None:
    seconds = iter([0.5, 2, 1, 3])
    monkeypatch.setattr(measure, "time_once", lambda *_: {"wall": next(seconds)})
    assert measure._best(lambda: torch.empty(0), CPU, repeats=3) == 1
    monkeypatch.setattr(measure, "_best", lambda *_: 2.0)
    assert measure.matmul_peak(torch.float32, 4, CPU) == 2 * 4**3 / 2
    # A MiB is read and a MiB is written.
    assert measure.copy_bandwidth(1, CPU) == 2 * 2**20 / 2


def test_flops() -> None:
    d = 768
    few, many = Workload("cka_biased", 64, d), Workload("cka_biased", 4096, d)
    assert flops.naive(few) == 12 * 64 * d * d
    assert flops.optimal(few) == flops.rift_kernels(few) == 4 * 64 * 64 * d
    assert flops.optimal(many) == flops.rift_kernels(many) == 8 * 4096 * d * d
    assert flops.naive(Workload("cka_biased", 64, d, layers=12)) == 12 * 12 * 64 * d * d


def test_predictions_and_floor() -> None:
    workload = Workload("cka_biased", 64, 8, torch.bfloat16)
    provider = Provider("p", flops=flops.hand_derived, products_in=torch.float32)
    rates = {"float32": 10.0, "bfloat16": 1e30}
    assert provider.predicted(workload, rates) == flops.hand_derived(workload) / 10
    # Two features of two bytes a number are read, one is written.
    floor = run.floor(workload, {"matmul_flops": rates, "copy_bytes": 2.0})
    assert floor == 3 * 64 * 8 * 2 / 2


def test_noise_is_the_difference_of_naive_eager_to_itself(monkeypatch) -> None:
    def rounds(tasks, *_):
        seconds = {name: 0.8 if name == AGAIN else 1.0 for name in tasks}
        return {name: [dict.fromkeys(measure.CLOCKS, s)] for name, s in seconds.items()}

    monkeypatch.setattr(measure, "time_rounds", rounds)
    entry = run.measured(SMALL, providers(CPU, compiled=())[:1], PEAKS, CPU, 5, max_rounds=5)
    assert entry.noise == pytest.approx(dict.fromkeys(measure.CLOCKS, 0.2))


def test_errors_are_relative_and_nan_is_the_largest() -> None:
    right = object.__new__(oracle.Oracle)
    right.values = torch.ones(2).double()
    right.gradients = (torch.full((4,), 10.0).double(),) * 2
    good, off = torch.full((4,), 10.0), torch.full((4,), 11.0)
    assert right.errors(torch.ones(2), (off, good))[1] == pytest.approx(0.1)
    assert math.isnan(right.errors(torch.ones(2), (good, off * math.nan))[1])
    assert oracle.wrong(math.nan, 0.0)
    assert oracle.wrong(0.0, math.nan)
    assert not oracle.wrong(0.0, 0.0)


def test_a_row_of_the_table() -> None:
    def outcome(seconds: float, memory: int, wrong: bool = False) -> Outcome:
        times = {"both": Quantiles(0, seconds, 0)}
        return Outcome(seconds=times, memory={"both": memory}, gradient_error=1e-3, wrong=wrong)

    workload = run.measured(SMALL, [], PEAKS, CPU, 0, max_rounds=5)
    workload.floor_seconds, workload.noise = 1.0, {"both": 0.1}
    workload.results = {
        NAIVE: outcome(8, 100),
        EAGER: outcome(4, 50),
        "rift_kernels triton": outcome(1, 10, wrong=True),
        "torch.compile": outcome(7.5, 1),
    }
    cells = tables._cells(workload, [EAGER])
    assert cells[EAGER] == "4000 ms, **2.00x**"
    assert cells["torch.compile"] == "~1.07x"
    # Of our fastest backend that is right.
    assert cells["memory"] == "50%"
    assert cells["roofline"] == "25%"


def test_traffic_of_many_ranks() -> None:
    rows, width = few = predict.FEATURES["class tokens"]
    gathered, summed = (predict.cost(*few, 8, way) for way in ("gathered", "summed"))
    assert gathered.bytes == 7 * rows * 2 * width * 2
    assert summed.bytes == 2 * 7 / 8 * (2 * width**2 + width) * 4
    assert gathered.computing == pytest.approx(4 * (8 * rows) ** 2 * width / predict.FLOPS)
    assert summed.computing == pytest.approx(8 * rows * width**2 / predict.FLOPS)
    # Sums do not grow with the ranks but by hops, what is gathered does.
    many = [predict.cost(*few, ranks, "summed") for ranks in predict.RANKS]
    assert many[-1].bytes < 1.2 * many[0].bytes
    assert predict.cost(*few, 4096, "gathered").bytes > 500 * gathered.bytes
    assert predict.cost(*few, 64, "summed").moving > 2 * summed.moving
    table = predict.traffic()
    assert "**1.38 MB**" in table
    assert "**9.44 MB**" in table
