"""What is compiled without a GPU and unpacked beside one: found there, wherever it lies."""

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
from tests.gpu import archive


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "here"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there"


def entry(root: Path, key: str, **files: str) -> Path:
    """One of Triton's cache, as Triton writes it."""
    folder = root / archive.CACHE / key
    folder.mkdir(parents=True)
    paths = {}
    for name, text in files.items():
        path = folder / name.replace("_", ".")
        path.write_text(text)
        paths[path.name] = str(path)
    (folder / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))
    return folder


def carry(here: Path, there: Path) -> None:
    (there / archive.ARCHIVE).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(here / archive.ARCHIVE, there / archive.ARCHIVE)
    archive.unpack(there)


def times(root: Path) -> dict[Path, int]:
    """When each file of Triton's cache was written."""
    return {path: path.stat().st_mtime_ns for path in (root / archive.CACHE).glob("*/*")}


def test_what_is_carried(here: Path, there: Path) -> None:
    """Machine code and what describes it; an entry's list of its files names where they lie now."""
    entry(here, "one", k_json="{}", k_cubin="code", k_ptx="text")
    entry(here, "two", k_json="{}", k_cubin="other")
    assert archive.pack(here) == 2
    with tarfile.open(here / archive.ARCHIVE) as file:
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
    archive.unpack(there)
    assert times(there) == before


def test_there_may_be_no_archive(there: Path) -> None:
    archive.unpack(there)
    assert not there.exists()


def test_the_extension_is_carried_with_what_it_is_of(here: Path, there: Path) -> None:
    for root in (here, there):
        for name in ("setup.py", "csrc/a.cu"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name)
    (here / archive.EXTENSION).parent.mkdir()
    (here / archive.EXTENSION).write_text("built")
    assert not archive.is_built(here, "90a")
    (here / archive.STAMP).parent.mkdir()
    (here / archive.STAMP).write_text(archive.stamp(here, "90a"))
    assert archive.is_built(here, "90a")
    assert not archive.is_built(here, "80")
    archive.pack(here)
    # Of other sources it is not that.
    (here / "csrc" / "a.cu").write_text("changed")
    assert not archive.is_built(here, "90a")

    carry(here, there)
    assert archive.is_built(there, "90a")
    # One that is there already may be of whatever sources, and stays.
    (there / archive.EXTENSION).write_text("another")
    (there / archive.STAMP).unlink()
    archive.unpack(there)
    assert (there / archive.EXTENSION).read_text() == "another"
    assert not archive.is_built(there, "90a")


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
        cache = str(root / archive.CACHE)
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
    assert archive.pack(here) == len(names) > 0
    carry(here, there)
    shutil.rmtree(here)
    before = times(there)
    assert compiled(there) == names
    assert times(there) == before
