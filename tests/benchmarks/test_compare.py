"""``benchmarks.compare`` finds what became slower, and nothing else."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import math
import random
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import compare, files, measure, run
from benchmarks.command import Job
from benchmarks.providers import NAIVE, OURS, Provider, providers
from benchmarks.schema import Benchmark, Bounds, Frontier, Outcome, Quantiles
from benchmarks.workloads import Profile, Workload

CPU = torch.device("cpu")
EAGER, OTHER = f"{OURS}eager", "hand-derived"
ROUNDS = 40
WORKLOADS = tuple(Workload("cka_biased", rows, 8) for rows in range(16, 22))


class Clock:
    """A clock that only work moves, on a machine that drifts; every piece has its noise."""

    def __init__(self, seed: int, noise: float) -> None:
        self._chance, self._noise = random.Random(seed), noise
        self._speed = self._chance.uniform(0.7, 1.3)
        self.now, self._pieces = 0.0, 0

    @contextlib.contextmanager
    def working(self, seconds: float) -> Iterator[None]:
        yield
        self._pieces += 1
        drift = self._speed * (1 + 0.2 * math.sin(self._pieces / 100))
        self.now += seconds * drift * self._chance.lognormvariate(0, self._noise)

    @contextlib.contextmanager
    def repeating(self, provider: Provider, share: float) -> Iterator[None]:
        """A share of the provider's work once more."""
        start = self.now
        with provider.settings():
            yield
        self.now += share * (self.now - start)


@functools.cache
def _result(seed: int, slowdown: float, noise: float) -> Benchmark:
    clock = Clock(seed, noise)
    naive = providers(CPU, ())[0]
    working = functools.partial(clock.working, 1e-3)
    candidates = [
        dataclasses.replace(naive, name=name, settings=working) for name in (NAIVE, EAGER, OTHER)
    ]
    slow = functools.partial(clock.repeating, candidates[1], slowdown)
    candidates[1] = dataclasses.replace(candidates[1], settings=slow)
    profile = Profile(WORKLOADS, budget=60, probe=8, max_rounds=ROUNDS, compiled=())
    times = {"perf_counter": lambda: clock.now, "process_time": lambda: clock.now}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "time", SimpleNamespace(**times, monotonic=time.monotonic))
        patch.setattr(measure, "matmul_peak", lambda *_: 1e9)
        patch.setattr(measure, "copy_bandwidth", lambda *_: 1e9)
        return run.run(Job("cpu", profile, CPU, profile.budget), candidates)


def result(seed: int, *, slowdown: float = 0.0, noise: float = 0.05) -> Benchmark:
    """A run in which only the clock is not real; ours repeats ``slowdown`` of its work."""
    return copy.deepcopy(_result(seed, slowdown, noise))


@pytest.fixture
def compared(tmp_path, capsys):
    """The exit status and the output of comparing results, or lists of results."""

    def compared(*sides):
        lists = [side if isinstance(side, list) else [side] for side in sides]
        names = [",".join(str(files.write(r, tmp_path)) for r in side) for side in lists]
        capsys.readouterr()
        status = compare.main(names)
        return status, *capsys.readouterr()

    return compared


@pytest.mark.parametrize("seed", range(3))
def test_the_same_code_on_a_machine_that_drifts(seed, compared) -> None:
    status, text, _ = compared(*(result(2 * seed + i) for i in range(2)))
    assert status == 0
    assert "Nothing changed." in text


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_slowdown_is_found(seed, compared) -> None:
    a, b = result(2 * seed), result(2 * seed + 1, slowdown=0.1)
    status, text, _ = compared(a, b)
    assert status == 1
    assert "| slower " in text
    assert "REGRESSION" in text
    status, text, _ = compared(b, a)
    assert status == 0
    assert "| faster " in text


def slower(one: Benchmark, factor: float, provider: str = EAGER) -> Benchmark:
    """The same, but for the first workload."""
    changed = copy.deepcopy(one)
    outcome = changed.workloads[0].results[provider]
    outcome.relative = Bounds(*(factor * value for value in vars(outcome.relative).values()))
    return changed


def test_one_workload_alone_takes_several_runs(compared) -> None:
    """A single one may be slower by chance, and all of them not."""
    runs = [result(i, noise=0.02) for i in range(4)]
    slow = [slower(one, 1.2) for one in runs[2:]]
    status, text, _ = compared(runs[0], slow[0])
    assert status == 0
    assert "1 suspects" in text
    status, text, _ = compared(runs[:2], slow)
    assert status == 1
    assert "REGRESSION" in text
    # One slow run beside one that is not is chance.
    assert compared(runs[:2], [slow[0], runs[3]])[0] == 0
    # So is what somebody else's code does, as far as the exit status goes.
    status, text, _ = compared(runs[:2], [slower(one, 1.2, OTHER) for one in runs[2:]])
    assert status == 0
    assert f"| slower | {OTHER} |" in text


def test_what_one_of_several_files_lacks(compared) -> None:
    runs = [result(i, noise=0.02) for i in range(6)]
    slow = [slower(one, 1.2) for one in runs[3:]]
    for one in (runs[0], slow[2]):
        one.workloads[0].results, one.workloads[0].reason = {}, "no time"
    status, text, _ = compared(runs[:3], slow)
    assert status == 1
    assert "| slower |" in text


def _made(*results: dict[str, Bounds]) -> Benchmark:
    """As much of a result as is compared: each workload's providers and their bounds."""
    return SimpleNamespace(
        workloads=[
            SimpleNamespace(
                measure="m",
                shape=str(i),
                results={name: Outcome(relative=b) for name, b in bounds.items()},
            )
            for i, bounds in enumerate(results)
        ]
    )


def _files(chance: random.Random, spreads: list[float], count: int) -> list[Benchmark]:
    """As many runs of one commit, each workload with a spread of its own between processes."""

    def bounds(spread: float) -> Bounds:
        middle = chance.lognormvariate(0, spread)
        return Bounds(0.99 * middle, middle, 1.01 * middle)

    return [_made(*({n: bounds(s) for n in (EAGER, OTHER)} for s in spreads)) for _ in range(count)]


@pytest.mark.parametrize(("count", "workloads"), [(1, 2), (1, 3), (1, 19), (2, 19), (3, 19)])
def test_chance_is_hardly_ever_a_regression(count, workloads) -> None:
    """Between processes, and over workloads of which some are noisier than others."""
    chance = random.Random(0)
    wrong = 0
    for _ in range(300):
        spreads = [0.05 * chance.lognormvariate(0, 0.5) for _ in range(workloads)]
        changes = compare.changes(*(_files(chance, spreads, count) for _ in "ab"))
        total = compare.overall(changes, "both")
        ours = (c for c in changes if c.provider == EAGER and c.files > 1)
        alone = any(c.verdict(0.05) == "slower" for c in ours)
        wrong += alone or (total is not None and total.is_slower(0.05))
    assert wrong <= 9


def test_a_slowdown_of_one_workload_is_hardly_ever_missed() -> None:
    chance = random.Random(0)
    seen = 0
    for _ in range(100):
        before, after = (_files(chance, [0.015] * 19, 3) for _ in "ab")
        changes = compare.changes(before, [slower(one, 1.15) for one in after])
        seen += changes[0].verdict(0.05) == "slower"
    assert seen >= 95


@pytest.mark.parametrize(("freedom", "right"), [(2, 19.2), (5, 5.51), (18, 3.46), (1e6, 3.0)])
def test_students_t(freedom, right) -> None:
    """What tables say; of very few, the approximation is on the safe side."""
    assert right * 0.99 < compare.student(3, freedom) < right * 1.25


def test_what_is_too_noisy_says_so(compared) -> None:
    status, text, _ = compared(*(result(i, noise=0.6) for i in range(2)))
    assert status == 0
    assert "unresolved: more than 10% is uncertain" in text
    assert all(f"| unresolved | {EAGER} | {w} |" in " ".join(text.split()) for w in WORKLOADS)


def test_what_is_lost(compared) -> None:
    a, b, c, d = (result(0) for _ in range(4))
    b.workloads[0].results[EAGER].wrong = True
    status, text, _ = compared(a, b)
    assert status == 1
    assert f"LOST {EAGER}: {WORKLOADS[0]}: wrong" in text
    # Somebody else's failure is no regression.
    c.workloads[0].results[NAIVE] = Outcome(reason="gone")
    status, text, _ = compared(a, c)
    assert status == 0
    assert f"LOST {NAIVE}: {WORKLOADS[0]}: not measured: gone" in text
    del d.workloads[1]
    status, text, _ = compared(a, d)
    assert status == 1
    assert "it is not in B" in text


def test_what_there_was_no_time_for_is_no_regression(compared) -> None:
    """But all is not well either: it may be what became slower."""
    a, b = result(0), result(0)
    reason = "5 rounds would take 1 s; 0 s were left"
    b.workloads[0].results, b.workloads[0].reason = {}, reason
    status, text, errors = compared(a, b)
    assert status == 2
    assert "REGRESSION" not in text
    assert f"cannot compare: {WORKLOADS[0]}: 5 rounds would take 1 s" in errors
    # Another file has it.
    assert compared(a, [b, a])[0] == 0
    for workload in b.workloads:
        workload.results, workload.reason = {}, "no time"
    status, text, errors = compared(b, b)
    assert status == 2
    assert "Nothing was compared." in text
    assert "no time of rift_kernels in common" in errors


def test_other_versions_are_named(compared) -> None:
    a, b = result(0), result(0)
    b.environment.versions["torch"] = "9.9"
    status, text, _ = compared(a, b)
    assert status == 0
    assert ", 9.9." in text


def test_seconds_in_graphs_count_by_themselves(compared) -> None:
    a, b = result(0), result(0)
    for workload in (*a.workloads, *b.workloads):
        workload.results[EAGER].graph = Quantiles(0.99e-3, 1e-3, 1.01e-3)
    b.workloads[0].results[EAGER].graph = Quantiles(1.1e-3, 1.1e-3, 1.1e-3)
    status, text, _ = compared(a, b)
    assert status == 0
    assert "graph | +10.0%" in text
    assert compared([a, a], [b, b])[0] == 1


@pytest.mark.parametrize("key", ["device", "threads", "profile"])
def test_what_cannot_be_compared(key, compared) -> None:
    a, b = result(0), result(0)
    place = b if key == "profile" else b.environment
    setattr(place, key, 99 if key == "threads" else "another")
    status, _, errors = compared(a, b)
    assert status == 2
    assert f"A and B must have one {key}; got " in errors
    assert "and 99" in errors or "and 'another'" in errors


def test_what_is_no_benchmark_cannot_be_compared(compared, tmp_path, capsys) -> None:
    a = result(0)
    frontier = Frontier(profile="cpu", environment=a.environment, providers=[], pairs=1, curves=[])
    status, _, errors = compared(a, frontier)
    assert status == 2
    assert f"must be a {Benchmark.schema!r}; got {Frontier.schema!r}" in errors
    (tmp_path / "x.json").write_text(json.dumps({"schema": "y"}))
    assert compare.main([str(tmp_path / "x.json")] * 2) == 2
    assert "must be one of" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "none.json")] * 2) == 2
    with pytest.raises(SystemExit):
        compare.main(["a", "b", "--threshold", "0"])


@given(
    st.lists(st.floats(-0.2, 0.2), min_size=8, max_size=30),
    st.floats(-0.3, 0.3),
)
def test_what_changes_for_all_is_no_change(noise: list[float], shift: float) -> None:
    """The others' mean is taken off ours."""
    names = [EAGER if i % 2 else "pytorch-cka" for i in range(len(noise))]
    pairs = list(zip(names, noise, strict=True))
    found = [compare.Change("w", n, "both", (1 + x) * (1 + shift) - 1, 0.01) for n, x in pairs]
    still = [compare.Change("w", n, "both", x, 0.01) for n, x in pairs]
    moved, same = (compare.overall(changes, "both") for changes in (found, still))
    assert moved.mean == pytest.approx(same.mean, abs=1e-9)
    assert moved.uncertain == pytest.approx(same.uncertain, abs=1e-9)
    assert compare.overall(found[:2], "both") is None
    assert compare.overall(found, "graph") is None


_BOUNDS = st.tuples(st.floats(0.5, 2), st.floats(0, 0.3)).map(
    lambda pair: Bounds(pair[0] * (1 - pair[1]), pair[0], pair[0] * (1 + pair[1]))
)


@given(st.lists(_BOUNDS, min_size=1, max_size=4), st.lists(_BOUNDS, min_size=1, max_size=4))
def test_there_and_back(old: list[Bounds], new: list[Bounds]) -> None:
    """What is slower one way is faster the other way, and nothing differs from itself."""
    a, b = ([_made({EAGER: bounds}) for bounds in side] for side in (old, new))
    opposite = {"slower": "faster", "faster": "slower"}
    (there,), (back,), (itself,) = (compare.changes(*x) for x in ((a, b), (b, a), (a, a)))
    verdict = there.verdict(0.05)
    assert back.verdict(0.05) == opposite.get(verdict, verdict)
    assert itself.change == pytest.approx(0, abs=1e-9)
    assert itself.verdict(0.05) in ("same", "unresolved")


@given(st.lists(st.floats(0.5, 2), min_size=5, max_size=60), st.floats(0.1, 10))
def test_relative_times(ratios: list[float], speed: float) -> None:
    base = [{"both": speed * (1 + i)} for i in range(len(ratios))]
    own = [{"both": b["both"] * ratio} for b, ratio in zip(base, ratios, strict=True)]
    bounds = measure.relative(own, base)
    assert min(ratios) - 1e-9 <= bounds.low <= bounds.q50 + 1e-9
    assert bounds.q50 - 1e-9 <= bounds.high <= max(ratios) + 1e-9
    # A machine that slows down changes nothing.
    slow = [[{"both": 3 * s["both"]} for s in side] for side in (own, base)]
    assert measure.relative(*slow).q50 == pytest.approx(bounds.q50)


def test_how_sure_the_median_is() -> None:
    """In 95 of 100 cases at least, it lies between the bounds."""
    chance = random.Random(0)
    inside = 0
    for _ in range(400):
        own = [{"both": chance.lognormvariate(0, 0.3)} for _ in range(25)]
        bounds = measure.relative(own, [{"both": 1.0}] * 25)
        inside += bounds.low <= 1 <= bounds.high
    assert inside >= 375
