"""The plugin that chooses tests for a GPU, on suites of a few tests."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from benchmarks import environment
from tests.gpu import suite

SUITE = """
import pytest

@pytest.fixture
def device(): return "cuda"

def test_good(device): pass
def test_bad(device): assert FIXED, "wrong"
def test_no(device): pytest.skip("needs luck")
@pytest.mark.eager_only
def test_last(device): pass
def test_of_no_gpu(): raise AssertionError
"""


class Suite:
    """A suite of a few tests, run as gpu-check does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "tests.jsonl"
        (folder / "pytest.ini").write_text("[pytest]\nmarkers = eager_only: x\n")

    def run(self, text: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "test_few.py").write_text(text)
        line = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *options]
        paths = os.pathsep.join([str(environment.ROOT), os.environ.get("PYTHONPATH", "")])
        known = {"PYTHONPATH": paths, suite.VARIABLE: str(self.path)}
        return subprocess.run(
            [*line, "-p", "tests.gpu.suite", "test_few.py"],
            cwd=self.folder,
            env={**os.environ, **known, **variables},
            capture_output=True,
            text=True,
            check=False,
        )


def test_what_of_the_suite_runs_on_a_gpu(tmp_path: Path) -> None:
    """Each outcome is written as it comes; what has passed is not run again."""
    few = Suite(tmp_path)
    few.run(SUITE.replace("FIXED", "False"))
    outcomes = suite.read(few.path)
    names = [test.split("::")[1] for test in outcomes]
    assert names == ["test_good", "test_bad", "test_no", "test_last"]
    bad = outcomes["test_few.py::test_bad"]
    assert bad["outcome"] == "failed"
    assert "wrong" in bad["reason"]
    counted = suite.counts(outcomes)
    assert (counted["passed"], counted["failed"], counted["skipped"]) == (2, 1, 1)
    assert counted["skip_reasons"] == {"needs luck": 1}

    again = few.run(SUITE.replace("FIXED", "True"))
    assert "1 passed" in again.stdout
    assert suite.counts(suite.read(few.path))["failures"] == []


def test_a_line_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "tests.jsonl"
    path.write_text('{"test": "a", "outcome": "passed"}\n{"test": "b", "outc')
    assert list(suite.read(path)) == ["a"]
    assert suite.read(tmp_path / "nothing") == {}


BROKEN = textwrap.dedent(
    """
    import pytest, torch
    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize = lambda: None

    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    @pytest.fixture
    def device(): return "cuda"

    @pytest.mark.parametrize("i", range(4))
    def test_good(device, i): torch.cuda.synchronize()

    def test_breaks(device):
        torch.cuda.synchronize = broken
        torch.cuda.synchronize()

    @pytest.mark.parametrize("i", range(4))
    def test_later(device, i): torch.cuda.synchronize()
    """
)


def test_a_broken_gpu_takes_one_test_with_it(tmp_path: Path) -> None:
    """Every test after it in this process would fail, too."""
    pytest.importorskip("xdist", reason="needs pytest-xdist")
    few = Suite(tmp_path)
    done = few.run(BROKEN, "-n", "1")
    counted = suite.counts(suite.read(few.path))
    assert counted["failures"] == ["test_few.py::test_breaks"], done.stdout
    assert counted["passed"] == 8
    assert "illegal memory access" in done.stdout + done.stderr


def test_a_broken_gpu_ends_a_run_in_one_process(tmp_path: Path) -> None:
    few = Suite(tmp_path)
    done = few.run(BROKEN)
    assert done.returncode != 0
    assert "the GPU has failed" in done.stdout + done.stderr
    assert suite.counts(suite.read(few.path))["passed"] == 4
