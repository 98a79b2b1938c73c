"""``benchmarks.compare`` finds what became slower, and nothing else."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import compare, files, measure, run
from benchmarks.providers import NAIVE, OURS, providers
from benchmarks.workloads import Profile, Workload

CPU = torch.device("cpu")
EAGER = f"{OURS}eager"
ROUNDS = 40
Runs = dict[str, Any] | list[dict[str, Any]]


def result(
    monkeypatch: pytest.MonkeyPatch, seed: int, *, slowdown: float = 1.0, noise: float = 0.05
) -> dict[str, Any]:
    """A run in which only the clock is not real: the machine drifts, every call has its noise."""
    chance = random.Random(seed)
    speed = chance.uniform(0.7, 1.3)
    now = [0.0]

    def time_once(task: measure.Task, _: torch.device) -> dict[str, float]:
        now[0] += 1
        drift = speed * (1 + 0.2 * now[0] / ROUNDS)
        seconds = 0.001 * drift * chance.lognormvariate(0, noise)
        if task.name == EAGER:
            seconds *= 0.5 * slowdown
        return dict.fromkeys(measure.CLOCKS, seconds)

    monkeypatch.setattr(measure, "time_once", time_once)
    monkeypatch.setattr(measure, "matmul_peak", lambda *_: 1e9)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda *_: 1e9)
    workloads = (Workload("cka_biased", 16, 8), Workload("cka_debiased", 16, 8))
    profile = Profile(workloads, budget=60, probe=8, max_rounds=ROUNDS, compiled=())
    candidates = [p for p in providers(CPU, ()) if p.name in (NAIVE, EAGER)]
    return run.run("cpu", profile, CPU, candidates, profile.budget)


def compared(a: Runs, b: Runs, folder: Path, *options: str) -> int:
    sides = [
        ",".join(
            str(files.write(one, folder)) for one in (side if isinstance(side, list) else [side])
        )
        for side in (a, b)
    ]
    return compare.main([*sides, *options])


@pytest.mark.parametrize("seed", range(5))
def test_the_same_code_on_a_machine_that_drifts(seed, monkeypatch, tmp_path, capsys) -> None:
    a, b = (result(monkeypatch, 2 * seed + i) for i in range(2))
    assert compared(a, b, tmp_path) == 0
    assert "Nothing changed." in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_slowdown_is_found(seed, monkeypatch, tmp_path, capsys) -> None:
    a = result(monkeypatch, 2 * seed)
    b = result(monkeypatch, 2 * seed + 1, slowdown=1.1)
    assert compared(a, b, tmp_path) == 1
    text = capsys.readouterr().out
    assert "| slower " in text
    assert "REGRESSION" in text
    assert compared(b, a, tmp_path) == 0
    assert "| faster " in capsys.readouterr().out


def test_one_workload_alone_takes_several_runs(monkeypatch, tmp_path, capsys) -> None:
    """Of which a single one may be slower by chance, and all of them not."""
    runs = [result(monkeypatch, i) for i in range(4)]
    slow = copy.deepcopy(runs[2:])
    for one in slow:
        for bound in one["workloads"][0]["results"][EAGER]["relative"]:
            one["workloads"][0]["results"][EAGER]["relative"][bound] *= 1.2
    assert compared(runs[0], slow[0], tmp_path) == 0
    assert "1 suspects" in capsys.readouterr().out
    assert compared(runs[:2], slow, tmp_path) == 1
    assert "REGRESSION" in capsys.readouterr().out
    # One slow run beside one that is not is chance.
    assert compared(runs[:2], [slow[0], runs[3]], tmp_path) == 0


def test_what_is_too_noisy_says_so(monkeypatch, tmp_path, capsys) -> None:
    a, b = (result(monkeypatch, i, noise=0.6) for i in range(2))
    assert compared(a, b, tmp_path) == 0
    assert "unresolved: more than 10% is uncertain" in capsys.readouterr().out


def test_what_is_lost(monkeypatch, tmp_path, capsys) -> None:
    a = result(monkeypatch, 0)
    b = copy.deepcopy(a)
    b["workloads"][0]["results"][EAGER]["wrong"] = True
    assert compared(a, b, tmp_path) == 1
    assert f"LOST {EAGER}: cka_biased 16 x 8 float32: wrong" in capsys.readouterr().out
    # Somebody else's failure is no regression.
    b = copy.deepcopy(a)
    b["workloads"][0]["results"][NAIVE] = {"reason": "gone"}
    assert compared(a, b, tmp_path) == 0
    assert f"LOST {NAIVE}: cka_biased 16 x 8 float32: not measured: gone" in capsys.readouterr().out
    b = copy.deepcopy(a)
    del b["workloads"][1]
    assert compared(a, b, tmp_path) == 1
    assert "it is not in B" in capsys.readouterr().out


def test_seconds_in_graphs_count_by_themselves(monkeypatch, tmp_path, capsys) -> None:
    a = result(monkeypatch, 0)
    for workload in a["workloads"]:
        workload["results"][EAGER]["graph"] = {"q20": 0.99e-3, "q50": 1e-3, "q80": 1.01e-3}
    b = copy.deepcopy(a)
    b["workloads"][0]["results"][EAGER]["graph"] = {"q20": 1.1e-3, "q50": 1.1e-3, "q80": 1.1e-3}
    assert compared(a, b, tmp_path) == 0
    assert "graph | +10.0%" in capsys.readouterr().out
    assert compared([a, a], [b, b], tmp_path) == 1


def test_what_cannot_be_compared(monkeypatch, tmp_path, capsys) -> None:
    a = result(monkeypatch, 0)
    b = copy.deepcopy(a)
    b["environment"]["device"] = "another"
    assert compared(a, b, tmp_path) == 2
    assert "A and B must have one device" in capsys.readouterr().err
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
    assert compare.overall(found).mean == pytest.approx(compare.overall(still).mean, abs=1e-9)
    assert compare.overall(found[:2]) is None


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
