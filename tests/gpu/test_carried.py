"""What is compiled without a GPU and carried to one: found there, wherever it lies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import environment
from tests.gpu import carried


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "here"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there"


def entry(root: Path, key: str, **files: str) -> Path:
    """One of Triton's cache, as Triton writes it."""
    folder = root / carried.CACHE / key
    folder.mkdir(parents=True)
    paths = {}
    for name, text in files.items():
        path = folder / name.replace("_", ".")
        path.write_text(text)
        paths[path.name] = str(path)
    (folder / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))
    return folder


def carry(here: Path, there: Path) -> None:
    (there / carried.ARCHIVE).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(here / carried.ARCHIVE, there / carried.ARCHIVE)
    carried.unpack(there)


def times(root: Path) -> dict[Path, int]:
    """When each file of Triton's cache was written."""
    return {path: path.stat().st_mtime_ns for path in (root / carried.CACHE).glob("*/*")}


def test_what_is_carried(here: Path, there: Path) -> None:
    """Machine code and what describes it; an entry's list of its files names where they lie now."""
    entry(here, "one", k_json="{}", k_cubin="code", k_ptx="text")
    entry(here, "two", k_json="{}", k_cubin="other")
    assert carried.pack(here) == 2
    with tarfile.open(here / carried.ARCHIVE) as file:
        assert not [name for name in file.getnames() if name.endswith("ptx")]
    # What is there already is not touched.
    two = entry(there, "two", k_json="{}", k_cubin="newer")
    before = times(there)
    carry(here, there)
    assert times(there).items() >= before.items()
    assert (two / "k.cubin").read_text() == "newer"
    one = two.with_name("one")
    paths = json.loads((one / "__grp__k.json").read_text())["child_paths"]
    assert paths == {name: str(one / name) for name in ("k.json", "k.cubin")}
    assert Path(paths["k.cubin"]).read_text() == "code"
    before = times(there)
    carried.unpack(there)
    assert times(there) == before


def test_there_may_be_no_archive(there: Path) -> None:
    carried.unpack(there)
    assert not there.exists()


def test_the_extension_is_carried_with_what_it_is_of(here: Path, there: Path) -> None:
    for root in (here, there):
        for name in ("setup.py", "csrc/a.cu"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name)
    (here / carried.EXTENSION).parent.mkdir()
    (here / carried.EXTENSION).write_text("built")
    assert not carried.is_built(here, "90a")
    (here / carried.STAMP).parent.mkdir()
    (here / carried.STAMP).write_text(carried.stamp(here, "90a"))
    assert carried.is_built(here, "90a")
    assert not carried.is_built(here, "80")
    carried.pack(here)
    # Of other sources it is not that.
    (here / "csrc" / "a.cu").write_text("changed")
    assert not carried.is_built(here, "90a")

    carry(here, there)
    assert carried.is_built(there, "90a")
    # One that is there already may be of whatever sources, and stays.
    (there / carried.EXTENSION).write_text("another")
    (there / carried.STAMP).unlink()
    carried.unpack(there)
    assert (there / carried.EXTENSION).read_text() == "another"
    assert not carried.is_built(there, "90a")


COMPILED = """
from tests.gpu import precompile
from tests.support.triton_compile import CASES

with precompile.compiling("sm90") as launched:
    CASES["gram of 16 rows bf16"]()
    print(*(kernel.hash for kernel in launched))
"""


def test_a_kernel_is_compiled_once(here: Path, there: Path) -> None:
    """Another process finds it in another folder, and writes nothing there."""
    pytest.importorskip("triton", reason="needs triton")

    def compiled(root: Path) -> set[str]:
        cache = str(root / carried.CACHE)
        done = subprocess.run(
            [sys.executable, "-c", COMPILED],
            cwd=environment.ROOT,
            env={**os.environ, "TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())

    names = compiled(here)
    assert carried.pack(here) == len(names) > 0
    carry(here, there)
    shutil.rmtree(here)
    before = times(there)
    assert compiled(there) == names
    assert times(there) == before
