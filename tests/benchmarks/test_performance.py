"""The performance model, and the counts of compiled kernels that it is fed with."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import kernel_tables, performance
from benchmarks.performance import Need, Run
from tests.support import counted

pytestmark = pytest.mark.eager_only

NAMES = list(counted.COUNTERS)
# Sectors over the least where Triton's layout gives a thread eight adjacent float32: each load of
# 16 bytes then takes half of its sectors.
LIMITS = {
    ("triton", "gram_backward", "load"): 1.75,  # of both matrices that make M
    ("triton", "covariance_cka", "load"): 1.30,  # of the columns' sums
}


def entries(counts: dict[Run, dict[str, int]], **changes: Any) -> dict[Run, Any]:
    """What ``recorded`` returns: one kernel, whose counts are 0 but for those that are named."""
    return {
        key: {"kernel": {**dict.fromkeys(NAMES, 0), **named, **changes}}
        for key, named in counts.items()
    }


def test_needs() -> None:
    """By hand, of the largest: the triangles of A and B, all of C, and two products backward."""
    n, d = 65536, 4096
    triton = performance.needs("triton", n, d, 1, debiased=True)
    cuda = performance.needs("cuda", n, d, 1, debiased=True)
    assert triton["raw_moments"].products == n * (2 * d * (d + 1) // 2 + d * d)
    assert triton["covariance_backward"].products == 2 * n * d * d
    assert triton["longest"].bytes == cuda["statistics"].bytes == 2 * 2 * n * d
    # They do not fit into the cache, and are read again.
    assert cuda["longest"].bytes == 2 * 2 * n * d
    few = performance.needs("cuda", 12608, 768, 1, debiased=True)
    assert few["longest"].bytes == 0
    # 50 times 3 pairs of tiles for 66 clusters: two rounds, and 18 pairs in halves.
    assert few["backward_sm90"].unevenness == 2.5 * 66 / 150
    # 99 times 3 tiles for 132 processors.
    few = performance.needs("triton", 12608, 768, 1, debiased=True)
    assert few["covariance_backward"].unevenness == 3 * 132 / 297


def test_counts_lie_on_a_line(monkeypatch) -> None:
    key = Run("cuda", "sm90", 100, 32, 1, debiased=True)
    runs = {key: 7, key._replace(rows=300): 10, key._replace(rows=400): 14}
    others = {key._replace(rows=390, width=16): 99, key._replace(rows=390, target="sm80"): 99}
    content = entries({key: {"products": count} for key, count in (runs | others).items()})
    monkeypatch.setattr(performance, "recorded", lambda: content)
    assert performance.counts("cuda", 300, 32, 1, True)["kernel"]["products"] == 10
    assert performance.counts("cuda", 1000, 32, 1, True)["kernel"]["products"] == 14 + 6 * 4


def test_seconds() -> None:
    """Each unit has a count of its own, at its own rate."""
    processors = performance.PROCESSORS * performance.CLOCK
    counts = {
        **dict.fromkeys(NAMES, 0.0),
        **{"products": performance.FLOPS, "instructions": 3 * 4 * processors},
        **{"shared_waves": 4 * processors, "operand_bytes": 128 * processors},
        **{f"{kind}_sectors": performance.L2_BYTES / 32 for kind in ("load", "engine", "store")},
    }
    busy = performance.seconds(counts, Need(0, 7 * performance.BYTES, 1.5))
    assert list(busy) == list(performance.UNITS)
    assert list(busy.values()) == pytest.approx([3, 3, 5, 3, 7])


@pytest.mark.parametrize("key", performance.recorded(), ids=str)
def test_recorded_kernels(key: Run) -> None:
    """Sources, model and counts know the same kernels: if not, ``tests.support.counted`` is due."""
    kernels = performance.recorded()[key].keys()
    assert kernels <= {name for backend, name in kernel_tables.defined() if backend == key.backend}
    if key.target == "sm90":
        need = performance.needs(key.backend, key.rows, key.width, key.layers, key.debiased)
        assert kernels == need.keys()


@pytest.mark.parametrize("backend", performance.BACKENDS)
@pytest.mark.parametrize("debiased", [True, False], ids=["debiased", "biased"])
def test_products_that_are_not_needed(backend: str, debiased: bool) -> None:
    for n, d, layers, _ in performance.SHAPES[2:]:
        need = performance.needs(backend, n, d, layers, debiased)
        for kernel, counts in performance.counts(backend, n, d, layers, debiased).items():
            assert counts["products"] <= 1.10 * need[kernel].products, (kernel, n, d)


@pytest.mark.parametrize("key", performance.recorded(), ids=str)
def test_sectors_that_are_not_needed(key: Run) -> None:
    for kernel, counts in performance.recorded()[key].items():
        for kind in ("load", "store"):
            limit = LIMITS.get((key.backend, kernel, kind), 1.15)
            assert counts[f"{kind}_sectors"] <= limit * counts[f"{kind}_least"], (kernel, kind)


def test_what_grew() -> None:
    run = counted.CHECKED[0]
    then = {"kernel": dict.fromkeys(NAMES, 1000)}
    assert counted.growth(run, then, then) == []
    assert counted.growth(run, {"kernel": dict.fromkeys(NAMES, 900)}, then) == []
    for name in NAMES:
        grown = counted.growth(run, {"kernel": {**then["kernel"], name: 1011}}, then)
        assert bool(grown) == (name in counted.WATCHED)
        assert all(f"kernel: 1,011 {name}, once 1,000" in sentence for sentence in grown)
    assert "other is not in counted.json" in counted.growth(run, {"other": {}}, then)[0]
