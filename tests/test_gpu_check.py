"""``make gpu-check``: its parts, their limits, and what it says of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import environment, gpu_check


@pytest.fixture
def _all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part of gpu-check this suite itself is run by."""
    monkeypatch.delenv("PART", raising=False)


@pytest.mark.usefixtures("_all_parts")
def test_gpu_check_says_that_it_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main() == 2
    assert "needs a GPU" in capsys.readouterr().out


@pytest.mark.usefixtures("_all_parts")
def test_gpu_check_fails_where_a_part_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = {
        "build": {"ok": True, "note": "nothing to build"},
        "tests": {"ok": False, "note": "no test ran", "passed": 0, "failed": 0, "skipped": 3},
        "sanitize": {"ok": True, "note": "not done: compute-sanitizer is not on PATH"},
        "bench": {"ok": True, "note": ""},
    }
    for part, outcome in outcomes.items():
        monkeypatch.setitem(gpu_check.PARTS, part, lambda *_, outcome=outcome: outcome)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment, "describe", lambda _: {})
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.main() == 1
    assert "tests    FAILED, 0 passed, 0 failed, 3 skipped: no test ran" in capsys.readouterr().out
    (summary,) = tmp_path.glob("gpu-check-*.json")
    assert json.loads(summary.read_text())["parts"] == outcomes

    monkeypatch.setenv("PART", "bench")
    assert gpu_check.main() == 0


@pytest.mark.parametrize(
    ("code", "limit", "note"),
    [
        ("print('done')", 60, ""),
        ("raise SystemExit(3)", 60, "exit status 3"),
        ("import time; time.sleep(60)", 0.2, "stopped after 0 s"),
    ],
)
def test_gpu_check_limits_its_processes(
    code: str, limit: float, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu_check.LIMITS, "tests", limit)
    outcome = gpu_check._process("tests", [sys.executable, "-c", code], tmp_path / "log.txt")
    assert outcome["note"] == note
    assert outcome["ok"] == (not note)


def test_gpu_check_reads_the_outcome_of_the_tests(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="t" name="good"/>'
        '<testcase classname="t" name="bad"><failure/></testcase>'
        '<testcase classname="t" name="no"><skipped message="no triton"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert gpu_check.read_junit(path) == {
        "passed": 1,
        "failed": 1,
        "skipped": 1,
        "failures": ["t::bad"],
        "skip_reasons": {"no triton": 1},
    }


def test_gpu_check_leaves_out_tests_that_are_there() -> None:
    for name in gpu_check.EMULATED:
        assert "emulate" in (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
