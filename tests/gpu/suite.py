"""A pytest plugin, ``-p tests.gpu.suite``: the tests that a GPU can change, restartable.

Chosen are the tests that take the ``device`` fixture and those of tests/gpu/test_gpu.py; those
that concern no kernel run last. RIFT_KERNELS_OUTCOMES names the file, a line of JSON a test:
whatever ends the run leaves what was found until then, and a test that has passed is not run again.
With several processes (``-n``), one in which a kernel has failed for good is replaced.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

VARIABLE = "RIFT_KERNELS_OUTCOMES"
# These run first: what only a GPU can show, and what is nearest to the kernels.
FIRST = ("test_gpu", "test_triton", "test_measures")


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Test -> its last outcome; a last line that was cut off does not count."""
    outcomes = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            outcome = json.loads(line)
        except json.JSONDecodeError:
            continue
        outcomes[outcome["test"]] = outcome
    return outcomes


def counts(outcomes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Passed, failed, skipped, the names of what failed, and how often each reason to skip."""
    kinds = Counter(outcome["outcome"] for outcome in outcomes.values())
    skipped = (o["reason"] for o in outcomes.values() if o["outcome"] == "skipped")
    return {
        **{kind: kinds[kind] for kind in ("passed", "failed", "skipped")},
        "failures": [test for test, o in outcomes.items() if o["outcome"] == "failed"],
        "skip_reasons": dict(Counter(skipped)),
    }


def _concerns_a_gpu(item: pytest.Item) -> bool:
    return "device" in getattr(item, "fixturenames", ()) or item.path.stem == "test_gpu"


def _turn(item: pytest.Item) -> tuple[bool, bool, int]:
    """The place of a test: what Triton's interpreter has time for is before the rest."""
    module, conftest = item.path.stem, sys.modules.get("tests.conftest")
    chosen = module == "test_gpu" or (conftest is not None and conftest.is_interpreted(item))
    place = FIRST.index(module) if module in FIRST else len(FIRST)
    return item.get_closest_marker("eager_only") is not None, not chosen, place


def _path() -> Path:
    return Path(os.environ[VARIABLE])


def _before() -> Path:
    """The outcomes when this run began: processes that begin later must find the same tests."""
    return _path().with_suffix(".before")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = {test for test, o in read(_before()).items() if o["outcome"] != "failed"}
    chosen = [item for item in items if _concerns_a_gpu(item) and item.nodeid not in done]
    config.hook.pytest_deselected(items=[*{*items} - {*chosen}])
    items[:] = sorted(chosen, key=_turn)


class Writer:
    """Writes outcomes, in the process that hears of all tests."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        seconds = round(report.duration, 2)
        outcome = {"test": report.nodeid, "outcome": report.outcome, "seconds": seconds}
        if report.skipped:
            outcome["reason"] = str(report.longrepr[-1]).removeprefix("Skipped: ")  # type: ignore[index]
        elif report.failed:
            outcome["reason"] = report.longreprtext[-2000:]
        with _path().open("a", encoding="utf-8") as file:
            file.write(json.dumps(outcome) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        _before().write_text(_path().read_text() if _path().exists() else "", encoding="utf-8")
        config.pluginmanager.register(Writer())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Leave a process whose GPU has failed for good: every test after it would fail, too."""
    report = yield
    if report.failed and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            text = f"{item.nodeid}: the GPU has failed: {error}\n{report.longreprtext}"
            if not hasattr(item.config, "workerinput"):
                pytest.exit(text, returncode=1)
            print(text, file=sys.__stderr__, flush=True)
            os._exit(1)
    return report
