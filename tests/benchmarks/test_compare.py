"""``benchmarks.compare`` finds what became slower, and nothing else."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import compare, files, measure
from benchmarks.providers import NAIVE, OURS
from benchmarks.schema import Benchmark, Bounds, Outcome, Quantiles

EAGER, OTHER = f"{OURS}eager", "hand-derived"


def bounds(middle: float, share: float = 0.01) -> Bounds:
    return Bounds((1 - share) * middle, middle, (1 + share) * middle)


def result(chance: random.Random, spreads: list[float], slowdown: float = 1.0) -> Benchmark:
    """As much of a result as is compared; each workload has its spread between processes."""
    workloads = [
        SimpleNamespace(
            **{"measure": "m", "shape": str(i), "reason": None},
            results={
                NAIVE: Outcome(relative=bounds(1.0)),
                EAGER: Outcome(relative=bounds(slowdown * chance.lognormvariate(0, spread))),
                OTHER: Outcome(relative=bounds(chance.lognormvariate(0, spread))),
            },
        )
        for i, spread in enumerate(spreads)
    ]
    about = SimpleNamespace(device="a machine", threads=2)
    made: Benchmark = SimpleNamespace(profile="cpu", environment=about, workloads=workloads)
    return made


def slower(made: Benchmark, factor: float, provider: str = EAGER) -> Benchmark:
    """The same, but for the first workload."""
    outcome = made.workloads[0].results[provider]
    outcome.relative = bounds(factor * outcome.relative.q50)
    return made


@pytest.fixture
def compared(capsys, monkeypatch):
    """The exit status and the output of comparing lists of results."""

    def compared(before: list[Benchmark], after: list[Benchmark]) -> tuple[int, str]:
        results = {str(i): result for i, result in enumerate([*before, *after])}
        monkeypatch.setattr(compare, "Benchmark", SimpleNamespace)
        monkeypatch.setattr(files, "read", lambda path: results[str(path)])
        names = [*results]
        sides = names[: len(before)], names[len(before) :]
        return compare.main([",".join(side) for side in sides]), capsys.readouterr().out

    return compared


@pytest.fixture
def runs() -> list[Benchmark]:
    """Six runs of one commit."""
    chance = random.Random(0)
    return [result(chance, [0.01] * 8) for _ in range(6)]


def test_a_slowdown_of_all_workloads_is_found_with_one_file_a_side(compared) -> None:
    chance = random.Random(0)
    a, b = (result(chance, [0.03] * 8, slowdown) for slowdown in (1.0, 1.2))
    status, text = compared([a], [b])
    assert status == 1
    assert "all in all" in text
    assert "REGRESSION" in text
    status, text = compared([b], [a])
    assert status == 0
    assert "faster" in text


def test_one_workload_alone_takes_several_runs(runs, compared) -> None:
    """A single one may be slower by chance, and all of them not."""
    slow = [slower(run, 1.2) for run in runs[3:]]
    status, text = compared(runs[:1], slow[:1])
    assert status == 0
    assert "suspect" in text
    status, text = compared(runs[:3], slow)
    assert status == 1
    assert "REGRESSION" in text


def test_what_is_no_regression(runs, compared) -> None:
    """One slow run beside others may be chance, and others may become slower."""
    assert "slower" not in compared(runs[:1], runs[1:2])[1]
    assert "slower" not in compared(runs[:3], runs[3:])[1]
    assert all(c.change == 0 for c in compare.changes(runs, runs, "both"))
    # What changes for all is the machine.
    moved = copy.deepcopy(runs[1])
    for outcome in (o for w in moved.workloads for name, o in w.results.items() if name != NAIVE):
        outcome.relative = bounds(1.3 * outcome.relative.q50)
    status, text = compared(runs[:1], [moved])
    assert status == 0
    assert "suspect" in text
    assert "all in all" not in text
    moved.workloads[0].results[EAGER].relative = bounds(1.3, share=0.3)
    assert "unresolved" in compared(runs[:1], [moved])[1]
    others = [slower(run, 1.2, OTHER) for run in copy.deepcopy(runs[3:])]
    status, text = compared(runs[:3], others)
    assert status == 0
    assert "slower" in text
    assert compared(runs[:3], [slower(runs[3], 1.2), *runs[4:]])[0] == 0


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("workloads", [2, 5, 19])
def test_chance_is_hardly_ever_a_regression(count, workloads) -> None:
    """Between processes, and over workloads of which some are noisier than others."""
    chance = random.Random(0)
    wrong = 0
    for _ in range(200):
        spreads = [0.05 * chance.lognormvariate(0, 0.5) for _ in range(workloads)]
        sides = [[result(chance, spreads) for _ in range(count)] for _ in "ab"]
        changes = compare.changes(*sides, "both")
        wrong += any(c.verdict == "slower" for c in changes if c.provider.startswith(OURS))
    assert wrong <= 6


def test_a_slowdown_of_one_workload_is_hardly_ever_missed() -> None:
    chance = random.Random(0)
    seen = 0
    for _ in range(100):
        before, after = ([result(chance, [0.015] * 19) for _ in range(3)] for _ in "ab")
        changes = compare.changes(before, [slower(run, 1.15) for run in after], "both")
        seen += any(c.verdict == "slower" and c[:2] == (EAGER, "m 0") for c in changes)
    assert seen >= 95


def test_what_is_lost(runs, compared) -> None:
    a, b, c, d, e, _ = runs
    b.workloads[0].results[EAGER].wrong = True
    c.workloads[0].results[OTHER].reason = "gone"
    d.workloads[1].results, d.workloads[1].reason = {}, "no time"
    del e.workloads[1]
    for after, status, lost in (
        (b, 1, f"LOST {EAGER} m 0"),
        (c, 0, f"LOST {OTHER} m 0"),
        (d, 1, f"LOST {EAGER} m 1"),
        (e, 1, f"LOST {EAGER} m 1"),
    ):
        measured, text = compared([a], [after])
        assert measured == status
        assert lost in text
        # Another file has it.
        assert "LOST" not in compared([a], [after, a])[1]


def test_seconds_in_graphs_count_by_themselves(runs, compared) -> None:
    for factor, run in zip((1, 1, 1, 1.1, 1.1, 1.1), runs, strict=True):
        graph = Quantiles(*(1e-3 * factor * x for x in (0.99, 1, 1.01)))
        run.workloads[0].results[EAGER].graph = graph
    status, text = compared(runs[:1], runs[3:4])
    assert status == 0
    assert "suspect" in text
    assert "graph | +10.0%" in text
    assert compared(runs[:3], runs[3:])[0] == 1


@pytest.mark.parametrize("key", ["device", "threads", "profile"])
def test_what_cannot_be_compared(key, runs, compared, capsys) -> None:
    a, b = runs[:2]
    b.environment = SimpleNamespace(**vars(b.environment))
    setattr(b if key == "profile" else b.environment, key, "another")
    with pytest.raises(SystemExit):
        compared([a], [b])
    assert f"A and B must have one {key}; got " in capsys.readouterr().err


def test_files_are_read(smoke, tmp_path, capsys) -> None:
    a, b = (str(files.write(smoke(command), tmp_path)) for command in ("run", "frontier"))
    assert compare.main([a, a]) == 0
    with pytest.raises(SystemExit):
        compare.main([a, b])
    assert "must be results of python -m benchmarks.run" in capsys.readouterr().err


@given(st.lists(st.floats(0.5, 2), min_size=5, max_size=60), st.floats(0.1, 10))
def test_relative_times(ratios: list[float], speed: float) -> None:
    base = [{"both": speed * (1 + i)} for i in range(len(ratios))]
    ours = [{"both": b["both"] * ratio} for b, ratio in zip(base, ratios, strict=True)]
    relative = measure.relative(ours, base)
    assert min(ratios) - 1e-9 <= relative.low <= relative.q50 + 1e-9
    assert relative.q50 - 1e-9 <= relative.high <= max(ratios) + 1e-9
    # A machine that slows down changes nothing.
    slow = [[{"both": 3 * s["both"]} for s in side] for side in (ours, base)]
    assert measure.relative(*slow).q50 == pytest.approx(relative.q50)


def test_how_sure_the_median_is() -> None:
    """In 95 of 100 cases at least, it lies between the bounds."""
    chance = random.Random(0)
    inside = 0
    for _ in range(400):
        ours = [{"both": chance.lognormvariate(0, 0.3)} for _ in range(25)]
        relative = measure.relative(ours, [{"both": 1.0}] * 25)
        inside += relative.low <= 1 <= relative.high
    assert inside >= 375
