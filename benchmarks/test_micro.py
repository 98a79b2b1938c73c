"""Micro-benchmarks: ``python -m pytest benchmarks/test_micro.py``.

Small calls with pytest-benchmark's statistics, for a look while developing. Nothing is asserted
about time, and tables come from :mod:`benchmarks.run`, which compares side by side.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

from pytest_benchmark.fixture import BenchmarkFixture

from .measure import Task, synchronize
from .providers import NAIVE, OURS, Provider, providers
from .workloads import MEASURES, Workload, features

DEVICE = torch.device(os.environ.get("RIFT_TEST_DEVICE", "cpu"))
PROVIDERS = [p for p in providers(DEVICE, ()) if p.name.startswith(OURS) or p.name == NAIVE]
every_provider = pytest.mark.parametrize("provider", PROVIDERS, ids=lambda p: p.name)
every_measure = pytest.mark.parametrize("measure", MEASURES)


def _task(provider: Provider, workload: Workload) -> Task:
    if provider.reason:
        pytest.skip(f"{provider.name}: {provider.reason}")
    return Task(provider, workload.measure, features(workload, DEVICE))


@every_provider
@every_measure
def test_forward(benchmark: BenchmarkFixture, measure: str, provider: Provider) -> None:
    task = _task(provider, Workload(measure, 64, 768))

    def call() -> None:
        task.forward()
        synchronize(DEVICE)

    benchmark(call)


@every_provider
@every_measure
def test_backward(benchmark: BenchmarkFixture, measure: str, provider: Provider) -> None:
    task = _task(provider, Workload(measure, 64, 768))

    def fresh_graph() -> tuple[tuple[Tensor], dict[str, object]]:
        return (task.forward(),), {}

    def call(values: Tensor) -> None:
        task.backward(values)
        synchronize(DEVICE)

    benchmark.pedantic(  # type: ignore[no-untyped-call,unused-ignore]
        call, setup=fresh_graph, rounds=20, warmup_rounds=2
    )


@every_provider
def test_overhead(benchmark: BenchmarkFixture, provider: Provider) -> None:
    """Features so small that what remains is the cost of calling."""
    task = _task(provider, Workload("cka_biased", 4, 4))
    benchmark(lambda: task.backward(task.forward()))
