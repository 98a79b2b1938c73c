"""``make gpu-check`` on the stand-in GPU: its commands really run."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import files, schema
from benchmarks.measure import CLOCKS
from tests.gpu import check, suite
from tests.support import stand_in_gpu


@pytest.fixture
def work(_stand_in: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of gpu-check's results; its processes have this GPU, too."""
    monkeypatch.delenv("OUT", raising=False)
    for name, value in stand_in_gpu.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(check, "WORK", tmp_path / "work")
    # On a busy machine, steps take longer.
    patient = tuple(step._replace(most=1200.0) for step in check.STEPS)
    monkeypatch.setattr(check, "STEPS", patient)
    return tmp_path / "work"


def test_gpu_check_measures_in_processes(work: Path, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "copies"))
    assert check.main(["--minutes", "60", "--only", "bench headline", "bench kernels"]) == 0, (
        work / "gpu-check.log"
    ).read_text()
    (path,) = work.glob("stand-in-gpu-*.json")
    result = files.read(path)
    assert result.environment.gpu == stand_in_gpu.NAME
    assert result.profile == "headline"
    assert "kernel_times is not done" in (work / "gpu-check.log").read_text()
    summary = json.loads((tmp_path / "copies" / "gpu-check.json").read_text())
    assert summary["environment"]["device"] == stand_in_gpu.NAME
    assert files.read(tmp_path / "copies" / path.name) == result


def test_gpu_check_tests_the_stand_in(work: Path, monkeypatch) -> None:
    """A few tests run as on a GPU, on tensors of the CPU."""
    tests = next(step for step in check.STEPS if step.name == "tests")
    few = tests._replace(command=tests.command + "/measures/test_golden.py -k values")
    monkeypatch.setattr(check, "STEPS", (few,))
    status = check.main(["--minutes", "60", "--jobs", "1"])
    outcome = json.loads((work / "gpu-check.json").read_text())["steps"]["tests"]
    assert outcome["finished"], outcome
    assert outcome["passed"] > 0
    assert status == (1 if outcome["failed"] else 0)
    assert len(suite.read(work / "tests.jsonl")) == sum(
        outcome[kind] for kind in ("passed", "failed", "skipped")
    )


@pytest.mark.usefixtures("_stand_in")
def test_all_that_gpu_check_measures(tmp_path) -> None:
    """The commands, with their arguments."""
    made = check.Check(tmp_path, None, 0.0, 2)
    kinds = []
    for step in check.STEPS:
        python, flag, module, *arguments = made.words(step, 60.0)
        if not step.name.startswith("bench"):
            continue
        assert (python, flag) == (sys.executable, "-m")
        command = importlib.import_module(module)
        assert command.main(arguments) == 0 if arguments else command.main() == 0
        kinds.append(module.removeprefix("benchmarks."))
    assert kinds == ["run", "host", "kernel_times", "run", "step", "frontier"]
    results = [files.read(path) for path in tmp_path.glob("stand-in-gpu-*.json")]
    assert {type(r) for r in results} == {schema.Benchmark, schema.Step, schema.Frontier}
    assert [r.environment.gpu for r in results] == [stand_in_gpu.NAME] * 4
    (step,) = (r for r in results if isinstance(r, schema.Step))
    for part in step.finetunings:
        ways = [way for way in part.ways if way.seconds]
        assert all(set(way.seconds) == set(CLOCKS) for way in ways)
        assert any(way.loss for way in ways)


def test_nothing_can_be_installed_there(tmp_path) -> None:
    """In the processes above, which thus show that gpu-check installs nothing."""
    folder = tmp_path / "pip"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "__main__.py").write_text("print('installed')")
    variables = {**os.environ, **stand_in_gpu.environment(tmp_path), stand_in_gpu.VARIABLE: ""}
    line = [sys.executable, "-m", "pip", "install", "torch"]
    done = subprocess.run(line, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "nothing may be installed here" in done.stderr
    assert "installed\n" not in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_gpu_check_installs_nothing() -> None:
    """Neither does what it depends on."""
    line = ["make", "--always-make", "--dry-run", "gpu-check", f"PYTHON={sys.executable}"]
    done = subprocess.run(line, cwd=check.ROOT, capture_output=True, text=True, check=True)
    assert f"{sys.executable} -m tests.gpu.check" in done.stdout
    assert "pip install" not in done.stdout
