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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import compare, files, measure, run, schema
from benchmarks.providers import NAIVE, OURS, Provider, providers
from benchmarks.workloads import Profile, Workload

CPU = torch.device("cpu")
EAGER, OTHER = f"{OURS}eager", "hand-derived"
ROUNDS = 40
WORKLOADS = tuple(Workload("cka_biased", rows, 8) for rows in range(16, 22))
Runs = dict[str, Any] | list[dict[str, Any]]


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
def _result(seed: int, slowdown: float, noise: float) -> dict[str, Any]:
    clock = Clock(seed, noise)
    naive = providers(CPU, ())[0]
    working = functools.partial(clock.working, 1e-3)
    candidates = [
        dataclasses.replace(naive, name=name, settings=working) for name in (NAIVE, EAGER, OTHER)
    ]
    slow = functools.partial(clock.repeating, candidates[1], slowdown)
    candidates[1] = dataclasses.replace(candidates[1], settings=slow)
    profile = Profile(WORKLOADS, budget=60, probe=8, max_rounds=ROUNDS, compiled=())
    with pytest.MonkeyPatch.context() as patch:
        times = SimpleNamespace(
            perf_counter=lambda: clock.now,
            process_time=lambda: clock.now,
            monotonic=time.monotonic,
        )
        patch.setattr(measure, "time", times)
        patch.setattr(measure, "matmul_peak", lambda *_: 1e9)
        patch.setattr(measure, "copy_bandwidth", lambda *_: 1e9)
        return run.run("cpu", profile, CPU, candidates, profile.budget)


def result(seed: int, *, slowdown: float = 0.0, noise: float = 0.05) -> dict[str, Any]:
    """A run in which only the clock is not real; ours repeats ``slowdown`` of its work."""
    return copy.deepcopy(_result(seed, slowdown, noise))


def compared(a: Runs, b: Runs, folder: Path, *options: str) -> int:
    sides = [
        ",".join(
            str(files.write(one, folder)) for one in (side if isinstance(side, list) else [side])
        )
        for side in (a, b)
    ]
    return compare.main([*sides, *options])


@pytest.mark.parametrize("seed", range(3))
def test_the_same_code_on_a_machine_that_drifts(seed, tmp_path, capsys) -> None:
    a, b = (result(2 * seed + i) for i in range(2))
    assert compared(a, b, tmp_path) == 0
    assert "Nothing changed." in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_slowdown_is_found(seed, tmp_path, capsys) -> None:
    a = result(2 * seed)
    b = result(2 * seed + 1, slowdown=0.1)
    assert compared(a, b, tmp_path) == 1
    text = capsys.readouterr().out
    assert "| slower " in text
    assert "REGRESSION" in text
    assert compared(b, a, tmp_path) == 0
    assert "| faster " in capsys.readouterr().out


def slower(one: dict[str, Any], factor: float, provider: str = EAGER) -> dict[str, Any]:
    """The same, but for the first workload."""
    changed = copy.deepcopy(one)
    relative = changed["workloads"][0]["results"][provider]["relative"]
    relative.update({bound: factor * value for bound, value in relative.items()})
    return changed


def test_one_workload_alone_takes_several_runs(tmp_path, capsys) -> None:
    """Of which a single one may be slower by chance, and all of them not."""
    runs = [result(i, noise=0.02) for i in range(4)]
    slow = [slower(one, 1.2) for one in runs[2:]]
    assert compared(runs[0], slow[0], tmp_path) == 0
    assert "1 suspects" in capsys.readouterr().out
    assert compared(runs[:2], slow, tmp_path) == 1
    assert "REGRESSION" in capsys.readouterr().out
    # One slow run beside one that is not is chance.
    assert compared(runs[:2], [slow[0], runs[3]], tmp_path) == 0
    # So is what somebody else's code does, as far as the exit status goes.
    theirs = [slower(one, 1.2, OTHER) for one in runs[2:]]
    capsys.readouterr()
    assert compared(runs[:2], theirs, tmp_path) == 0
    assert f"| slower | {OTHER} |" in capsys.readouterr().out


def test_what_one_of_several_files_lacks(tmp_path, capsys) -> None:
    runs = [result(i, noise=0.02) for i in range(6)]
    slow = [slower(one, 1.2) for one in runs[3:]]
    for one in (runs[0], slow[2]):
        one["workloads"][0].update(results={}, reason="no time")
    assert compared(runs[:3], slow, tmp_path) == 1
    assert "| slower |" in capsys.readouterr().out


def _files(chance: random.Random, spreads: list[float], count: int) -> list[dict[str, Any]]:
    """As many runs of one commit, each workload with a spread of its own between processes."""

    def entry(spread: float) -> dict[str, Any]:
        middle = chance.lognormvariate(0, spread)
        bounds = {"low": 0.99 * middle, "q50": middle, "high": 1.01 * middle}
        return {"reason": None, "relative": bounds, "graph": None}

    return [
        {
            "workloads": [
                {"measure": "m", "shape": str(i), "results": {n: entry(s) for n in (EAGER, OTHER)}}
                for i, s in enumerate(spreads)
            ]
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize(("count", "workloads"), [(1, 2), (1, 3), (1, 19), (2, 19), (3, 19)])
def test_chance_is_hardly_ever_a_regression(count: int, workloads: int) -> None:
    """Between processes, and over workloads of which some are noisier than others."""
    chance = random.Random(0)
    wrong = 0
    for _ in range(300):
        spreads = [0.05 * chance.lognormvariate(0, 0.5) for _ in range(workloads)]
        found = compare.changes(*(_files(chance, spreads, count) for _ in "ab"))
        total = compare.overall(found, "both")
        ours = (c for c in found if c.provider == EAGER and c.files > 1)
        alone = any(c.verdict(0.05) == "slower" for c in ours)
        wrong += alone or (total is not None and total.is_slower(0.05))
    assert wrong <= 9


def test_a_slowdown_of_one_workload_is_hardly_ever_missed() -> None:
    chance = random.Random(0)
    found = 0
    for _ in range(100):
        before, after = (_files(chance, [0.015] * 19, 3) for _ in "ab")
        changes = compare.changes(before, [slower(one, 1.15) for one in after])
        found += changes[0].verdict(0.05) == "slower"
    assert found >= 95


@pytest.mark.parametrize(("freedom", "right"), [(2, 19.2), (5, 5.51), (18, 3.46), (1e6, 3.0)])
def test_students_t(freedom: float, right: float) -> None:
    """What tables say; of very few, the approximation is on the safe side."""
    assert right * 0.99 < compare.student(3, freedom) < right * 1.25


def test_what_is_too_noisy_says_so(tmp_path, capsys) -> None:
    a, b = (result(i, noise=0.6) for i in range(2))
    assert compared(a, b, tmp_path) == 0
    text = capsys.readouterr().out
    assert "unresolved: more than 10% is uncertain" in text
    assert all(f"| unresolved | {EAGER} | {w} |" in " ".join(text.split()) for w in WORKLOADS)


def test_what_is_lost(tmp_path, capsys) -> None:
    a = result(0)
    b = copy.deepcopy(a)
    b["workloads"][0]["results"][EAGER]["wrong"] = True
    assert compared(a, b, tmp_path) == 1
    assert f"LOST {EAGER}: {WORKLOADS[0]}: wrong" in capsys.readouterr().out
    # Somebody else's failure is no regression.
    b = copy.deepcopy(a)
    b["workloads"][0]["results"][NAIVE] = {"reason": "gone"}
    assert compared(a, b, tmp_path) == 0
    assert f"LOST {NAIVE}: {WORKLOADS[0]}: not measured: gone" in capsys.readouterr().out
    b = copy.deepcopy(a)
    del b["workloads"][1]
    assert compared(a, b, tmp_path) == 1
    assert "it is not in B" in capsys.readouterr().out


def test_what_there_was_no_time_for_is_no_regression(tmp_path, capsys) -> None:
    """But all is not well either: it may be what became slower."""
    a = result(0)
    b = copy.deepcopy(a)
    b["workloads"][0].update(results={}, reason="5 rounds would take 1 s; 0 s were left")
    assert compared(a, b, tmp_path) == 2
    text = capsys.readouterr()
    assert "REGRESSION" not in text.out
    assert f"cannot compare: {WORKLOADS[0]}: 5 rounds would take 1 s" in text.err
    # Another file has it.
    assert compared(a, [b, a], tmp_path) == 0
    for workload in b["workloads"]:
        workload.update(results={}, reason="no time")
    assert compared(b, b, tmp_path) == 2
    text = capsys.readouterr()
    assert "Nothing was compared." in text.out
    assert "no time of rift_kernels in common" in text.err


def test_other_versions_are_named(tmp_path, capsys) -> None:
    a = result(0)
    b = copy.deepcopy(a)
    b["environment"]["versions"]["torch"] = "9.9"
    assert compared(a, b, tmp_path) == 0
    assert ", 9.9." in capsys.readouterr().out


def test_seconds_in_graphs_count_by_themselves(tmp_path, capsys) -> None:
    a = result(0)
    for workload in a["workloads"]:
        workload["results"][EAGER]["graph"] = {"q20": 0.99e-3, "q50": 1e-3, "q80": 1.01e-3}
    b = copy.deepcopy(a)
    b["workloads"][0]["results"][EAGER]["graph"] = {"q20": 1.1e-3, "q50": 1.1e-3, "q80": 1.1e-3}
    assert compared(a, b, tmp_path) == 0
    assert "graph | +10.0%" in capsys.readouterr().out
    assert compared([a, a], [b, b], tmp_path) == 1


def test_what_cannot_be_compared(tmp_path, capsys) -> None:
    a = result(0)
    for key, other in (("device", "another"), ("threads", a["environment"]["threads"] + 1)):
        b = copy.deepcopy(a)
        b["environment"][key] = other
        assert compared(a, b, tmp_path) == 2
        assert f"A and B must have one {key}" in capsys.readouterr().err
    assert compared(a, {**a, "profile": "smoke"}, tmp_path) == 2
    assert "A and B must have one profile; got 'cpu' and 'smoke'" in capsys.readouterr().err
    frontier = {"schema": schema.FRONTIER, "providers": [], "pairs": 1, "curves": []}
    header = {key: a[key] for key in ("profile", "environment")}
    assert compared(a, {**header, **frontier}, tmp_path) == 2
    assert f"must be a {schema.BENCHMARK!r}; got {schema.FRONTIER!r}" in capsys.readouterr().err
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
    lambda pair: {"low": pair[0] * (1 - pair[1]), "q50": pair[0], "high": pair[0] * (1 + pair[1])}
)


@given(st.lists(_BOUNDS, min_size=1, max_size=4), st.lists(_BOUNDS, min_size=1, max_size=4))
def test_there_and_back(old: list[dict[str, float]], new: list[dict[str, float]]) -> None:
    """What is slower one way is faster the other way, and nothing differs from itself."""

    def side(bounds: list[dict[str, float]]) -> list[dict[str, Any]]:
        entry = {"reason": None, "graph": None}
        return [
            {
                "workloads": [
                    {"measure": "m", "shape": "", "results": {EAGER: {**entry, "relative": b}}}
                ]
            }
            for b in bounds
        ]

    opposite = {"slower": "faster", "faster": "slower"}
    (there,), (back,) = (compare.changes(side(a), side(b)) for a, b in ((old, new), (new, old)))
    verdict = there.verdict(0.05)
    assert back.verdict(0.05) == opposite.get(verdict, verdict)
    (itself,) = compare.changes(side(old), side(old))
    assert itself.change == pytest.approx(0, abs=1e-9)
    assert itself.verdict(0.05) in ("same", "unresolved")


@given(st.lists(st.floats(0.5, 2), min_size=5, max_size=60), st.floats(0.1, 10))
def test_relative_times(ratios: list[float], speed: float) -> None:
    base = [{"both": speed * (1 + i)} for i in range(len(ratios))]
    own = [{"both": b["both"] * ratio} for b, ratio in zip(base, ratios, strict=True)]
    found = measure.relative(own, base)
    assert min(ratios) - 1e-9 <= found["low"] <= found["q50"] + 1e-9
    assert found["q50"] - 1e-9 <= found["high"] <= max(ratios) + 1e-9
    # A machine that slows down changes nothing.
    slower = [[{"both": 3 * s["both"]} for s in side] for side in (own, base)]
    assert measure.relative(*slower)["q50"] == pytest.approx(found["q50"])


def test_how_sure_the_median_is() -> None:
    """In 95 of 100 cases at least, it lies between the bounds."""
    chance = random.Random(0)
    inside = 0
    for _ in range(400):
        own = [{"both": chance.lognormvariate(0, 0.3)} for _ in range(25)]
        found = measure.relative(own, [{"both": 1.0}] * 25)
        inside += found["low"] <= 1 <= found["high"]
    assert inside >= 375
