"""``make gpu-check``: the order and limits of its steps, and what a run that is killed leaves."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import environment
from tests.gpu import archive, check
from tests.gpu.check import Step


def python(code: str) -> str:
    """A step's command, where braces have a meaning."""
    return "{python} -S -c " + shlex.quote(code).replace("{", "{{").replace("}", "}}")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU, as far as gpu-check asks for one, and a folder of its own."""
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(environment, "describe", lambda _: SimpleNamespace())
    monkeypatch.setattr(check, "fingerprint", lambda: "these")
    monkeypatch.setattr(check, "WORK", tmp_path / "work")
    monkeypatch.setattr(archive, "ARCHIVE", tmp_path / "no-archive")
    return tmp_path / "work"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make these the steps: name -> code, 60 seconds at most; "more" is spare."""

    def put(most: float = 60, least: float = 5, **codes: str) -> None:
        made = (Step(n, python(code), most, least, n == "more") for n, code in codes.items())
        monkeypatch.setattr(check, "STEPS", tuple(made))

    return put


def summary(work: Path) -> dict:
    return json.loads((work / "gpu-check.json").read_text())["steps"]


def test_gpu_check_says_that_it_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().out


def test_a_step_that_fails_stops_no_other(work, steps, capsys) -> None:
    steps(first="print('one')", second="raise SystemExit(3)", third="print('three')")
    assert check.main([]) == 1
    found = summary(work)
    assert [found[name]["ok"] for name in found] == [True, False, True]
    assert found["second"]["note"] == "exit status 3"
    assert "second              FAILED: exit status 3" in capsys.readouterr().out
    log = (work / "gpu-check.log").read_text()
    assert log.index("\none\n") < log.index("== second") < log.index("\nthree\n")


def test_what_is_done_is_not_done_again(work, steps, capsys) -> None:
    steps(first="print('one')", second="raise SystemExit(3)")
    assert check.main([]) == 1
    capsys.readouterr()
    assert check.main([]) == 1
    text = capsys.readouterr().out
    assert "first               done before: ok" in text
    assert "second              done before: FAILED: exit status 3" in text
    assert (work / "gpu-check.log").read_text().count("== first") == 1
    assert check.main(["--again", "--only", "fir"]) == 0
    log = (work / "gpu-check.log").read_text()
    assert (log.count("== first"), log.count("== second")) == (2, 1)


def test_tests_go_on_or_begin_anew(work, steps) -> None:
    line = json.dumps({"test": "a", "outcome": "passed"})
    steps(tests=f"print({line!r}, file=open({str(work / 'tests.jsonl')!r}, 'a'))")
    state, outcomes = work / "gpu-check.json", work / "tests.jsonl"
    assert check.main([]) == 0
    assert check.main(["--again"]) == 0
    assert outcomes.read_text() == f"{line}\n"
    state.write_text(state.read_text().replace('"finished": true', '"finished": false'))
    assert check.main([]) == 0
    assert outcomes.read_text() == f"{line}\n" * 2


def test_other_sources_are_checked_anew(work, steps, monkeypatch) -> None:
    steps(first="print('one')")
    assert check.main([]) == 0
    (work / "tests.jsonl").write_text("")
    monkeypatch.setattr(check, "fingerprint", lambda: "those")
    steps(first="raise SystemExit(3)")
    assert check.main([]) == 1
    assert not (work / "tests.jsonl").exists()


def test_the_fingerprint_is_of_the_sources(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    seen = {check.fingerprint()}
    names = ("rift_kernels/a/b.py", "csrc/a.cuh", "tests/gpu/a.py", "benchmarks/a.py")
    for path in (tmp_path / name for name in names):
        path.parent.mkdir(parents=True)
        path.write_text("")
        seen.add(check.fingerprint())
        path.write_text("changed")
        seen.add(check.fingerprint())
        assert check.fingerprint() in seen
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "another")
    assert len(seen | {check.fingerprint()}) == 10


def test_a_step_has_a_limit(work, steps, capsys) -> None:
    """It ends with all that it started, and begins anew in the next run."""
    marker = work.parent / "alive"
    child = f"import time; time.sleep(2); open({str(marker)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    steps(most=0.5, least=0.1, first=code)
    assert check.main([]) == 1
    assert summary(work)["first"]["note"] == "stopped after 0 s"
    time.sleep(2.5)
    assert not marker.exists()
    steps(first="print('one')")
    assert check.main([]) == 0
    assert "done before" not in capsys.readouterr().out


def test_nothing_is_begun_without_time_for_it(work, steps) -> None:
    steps(first="print('one')", second="print('two')")
    assert check.main(["--minutes", "0.01"]) == 1
    assert summary(work)["first"]["note"] == "not begun: it needs 5 s, and 1 s are left"
    assert not (work / "gpu-check.log").exists()
    assert check.main([]) == 0


def test_there_may_be_no_time_to_spare(work, steps) -> None:
    steps(least=1e9, more="print('two')")
    assert check.main([]) == 0
    assert summary(work)["more"]["note"].startswith("not begun: it needs")
    steps(first="print('one')", more="raise SystemExit(1)")
    assert check.main([]) == 1
    assert summary(work)["first"]["ok"]


def test_its_steps_take_nine_minutes_at_most() -> None:
    """Without the spare ones. The checks of numbers come first, and take two at most."""
    assert sum(step.most for step in check.STEPS if not step.spare) <= 60 * check.MINUTES
    assert [step.name for step in check.STEPS][:3] == ["build", "check", "bench headline"]
    assert check.STEPS[1].most <= 120
    for step in check.STEPS:
        assert step.least < step.most


KILLED = """
import os, sys, torch
from types import SimpleNamespace
from benchmarks import environment
from tests.gpu import check
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda *_: "a GPU"
torch.cuda.get_device_capability = lambda *_: (9, 0)
environment.describe = lambda _: SimpleNamespace()
check.WORK = check.Path(sys.argv[1])
check.STEPS = tuple(check.Step(n, c, 60) for n, c in zip(("a", "b"), sys.argv[2:4]))
sys.exit(check.main(sys.argv[4:]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_leaves_what_was_found(number, tmp_path: Path) -> None:
    """Here and in the folder for copies; the next one goes on from there."""
    work, copies = tmp_path / "work", tmp_path / "copies"
    kill = f"import os, time; print('begun', flush=True); os.kill(os.getppid(), {number:d})"
    line = [sys.executable, "-c", KILLED, str(work), python("print('one')")]
    paths = os.pathsep.join([str(environment.ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": paths, "OUT": str(copies)}
    slow = python(f"{kill}; time.sleep(3)")
    done = subprocess.run([*line, slow], env=variables, check=False)
    assert done.returncode != 0
    for folder in (work, copies):
        found = summary(folder)
        assert found["a"]["ok"]
        assert found["a"]["finished"]
        assert found["b"]["note"] == "under way"
        assert "\none\n" in (folder / "gpu-check.log").read_text()
    again = [*line, python("print('two')")]
    done = subprocess.run(again, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "a                   done before: ok" in done.stdout
    assert summary(copies)["b"]["ok"]


@pytest.mark.usefixtures("work")
def test_an_unknown_step_is_refused(steps, capsys) -> None:
    steps(first="print('one')")
    with pytest.raises(SystemExit):
        check.main(["--only", "nothing"])
    assert "--only must be of first; got nothing" in capsys.readouterr().err


def test_a_machine_without_a_sanitizer(work, monkeypatch) -> None:
    steps = [step for step in check.STEPS if step.name.startswith("sanitize")]
    monkeypatch.setattr(check.shutil, "which", lambda _: None)
    assert check.main(["--only", "sanitize"]) == 0
    assert all("there is no compute-sanitizer" in summary(work)[s.name]["note"] for s in steps)
    monkeypatch.setattr(check.shutil, "which", lambda name: name)
    refusing = work.parent / "compute-sanitizer"
    refusing.write_text("#!/bin/sh\necho Error: Device not supported; exit 9\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", str(work.parent), prepend=os.pathsep)
    assert check.main(["--only", "sanitize", "--again"]) == 0
    assert "refuses this machine" in summary(work)["sanitize memcheck"]["note"]
    refusing.write_text("#!/bin/sh\necho Error: out of bounds; exit 9\n")
    assert check.main(["--only", "sanitize", "--again"]) == 1


def test_the_extension_is_not_built_twice(work, monkeypatch) -> None:
    monkeypatch.setattr(archive, "is_built", lambda _, architecture: architecture == "90a")
    assert check.main(["--only", "build"]) == 0
    assert summary(work)["build"]["note"] == "built before, of the same sources"
