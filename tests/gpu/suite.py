"""A pytest plugin, ``-p tests.gpu.suite``: selects the tests whose outcome depends on a GPU.

These take the ``device`` fixture or lie in tests/gpu/test_gpu.py. Tests of no kernel run last.
RIFT_KERNELS_OUTCOMES names a file that gets a line of JSON after each test. Whatever ends a run,
the next one leaves out the tests that have passed or were skipped. With several processes (``-n``),
one whose GPU has failed for good is replaced.
"""

from __future__ import annotations

import contextlib
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
# These modules run first: what only a GPU can show, and what is nearest to the kernels.
FIRST = ("test_gpu", "test_triton", "test_measures")
# The tests that were done before this run: the same for processes that begin later.
DONE = pytest.StashKey[set[str]]()


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Test -> its last outcome; a last line that was cut off does not count."""
    outcomes = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            outcome = json.loads(line)
            outcomes[outcome["test"]] = outcome
    return outcomes


def counts(outcomes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Passed, failed, skipped, the names of what failed, and how often each reason to skip."""
    kinds = Counter(outcome["outcome"] for outcome in outcomes.values())
    skipped = (o["reason"] for o in outcomes.values() if o["outcome"] == "skipped")
    return {
        **{kind: kinds[kind] for kind in ("passed", "failed", "skipped")},
        "failures": [test for test, o in outcomes.items() if o["outcome"] == "failed"],
        "skip_reasons": Counter(skipped),
    }


def _needs_a_gpu(item: pytest.Item) -> bool:
    return "device" in getattr(item, "fixturenames", ()) or item.path.stem == "test_gpu"


def _turn(item: pytest.Item) -> tuple[bool, bool, int]:
    """The place of a test: what Triton's interpreter has time for comes before the rest."""
    module, conftest = item.path.stem, sys.modules.get("tests.conftest")
    chosen = module == "test_gpu" or (conftest is not None and conftest.is_interpreted(item))
    place = FIRST.index(module) if module in FIRST else len(FIRST)
    return item.get_closest_marker("eager_only") is not None, not chosen, place


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = config.stash[DONE]
    chosen = [item for item in items if _needs_a_gpu(item) and item.nodeid not in done]
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
        with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(outcome) + "\n")

    @pytest.hookimpl(optionalhook=True)  # of pytest-xdist
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["done"] = node.config.stash[DONE]


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.stash[DONE] = config.workerinput["done"]
        return
    outcomes = read(Path(os.environ[VARIABLE]))
    config.stash[DONE] = {test for test, o in outcomes.items() if o["outcome"] != "failed"}
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
