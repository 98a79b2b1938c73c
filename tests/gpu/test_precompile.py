"""What is compiled without a GPU and carried to one: found there, wherever it lies."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import environment
from tests.gpu import carried, precompile


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, "ROOT", tmp_path)


def entry(cache: Path, key: str, **files: str) -> Path:
    """As triton writes one."""
    folder = cache / key
    folder.mkdir(parents=True)
    paths = {}
    for name, text in files.items():
        path = folder / name.replace("_", ".")
        path.write_text(text)
        paths[path.name] = str(path)
    (folder / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))
    return folder


@pytest.mark.usefixtures("_elsewhere")
def test_what_is_carried(tmp_path: Path) -> None:
    """Machine code and what describes it; an entry's list of its files names where they lie now."""
    here, there, archive = tmp_path / "here", tmp_path / "there", tmp_path / "a" / "archive.tar.xz"
    entry(here, "one", k_json="{}", k_cubin="code", k_ptx="text")
    entry(here, "two", k_json="{}", k_cubin="other")
    assert carried.pack(here, archive) == 2
    with tarfile.open(archive) as file:
        assert not [name for name in file.getnames() if name.endswith("ptx")]
    # What is there already is not touched.
    entry(there, "two", k_json="{}", k_cubin="newer")
    assert carried.unpack(archive, there) == 1
    assert (there / "two" / "k.cubin").read_text() == "newer"
    paths = json.loads((there / "one" / "__grp__k.json").read_text())["child_paths"]
    assert paths == {name: str(there / "one" / name) for name in ("k.json", "k.cubin")}
    assert Path(paths["k.cubin"]).read_text() == "code"
    assert carried.unpack(archive, there) == 0
    assert carried.unpack(tmp_path / "nothing", there) == 0


@pytest.mark.usefixtures("_elsewhere")
def test_the_extension_is_carried_with_what_it_is_of(tmp_path: Path, monkeypatch) -> None:
    archive = tmp_path / "archive.tar.xz"
    (tmp_path / "csrc").mkdir()
    (tmp_path / "rift_kernels").mkdir()
    for name in ("setup.py", "csrc/a.cu", carried.EXTENSION):
        (tmp_path / name).write_text(name)
    assert not carried.is_built("90a")
    carried.stamp("90a")
    assert carried.is_built("90a")
    assert not carried.is_built("80")
    carried.pack(tmp_path / "cache", archive)
    # Of other sources it is not that.
    (tmp_path / "csrc" / "a.cu").write_text("changed")
    assert not carried.is_built("90a")

    other = tmp_path / "other"
    for name in ("setup.py", "csrc/a.cu"):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_text(name)
    monkeypatch.setattr(carried, "ROOT", other)
    carried.unpack(archive, other / "cache")
    assert carried.is_built("90a")
    # One that is there already may be of whatever sources.
    (other / "build" / "extension.sha256").unlink()
    carried.unpack(archive, other / "cache")
    assert not carried.is_built("90a")


COMPILED = """
from tests.gpu import precompile
from tests.support.triton_compile import CASES

with precompile.compiling("sm90") as launched:
    CASES["gram of 16 rows bf16"]()
    print(*(kernel.hash for kernel in launched))
"""


LAUNCHED = """
from tests.gpu import precompile
from tests.support.triton_compile import CASES

with precompile._driver_to_link_with(), precompile.compiling("sm90") as launched:
    CASES["gram of 16 rows bf16"]()
    precompile.launchers(launched)
    assert not launched
"""


def test_launchers_are_compiled_where_triton_has_some(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton")
    added = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", LAUNCHED]
    env, root = {**os.environ, **added}, environment.ROOT
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_kernel_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By this triton, and found by another process in another folder: nothing there is new."""
    pytest.importorskip("triton", reason="needs triton")
    here, there, archive = tmp_path / "here", tmp_path / "there", tmp_path / "archive.tar.xz"
    paths = os.pathsep.join([str(environment.ROOT), os.environ.get("PYTHONPATH", "")])

    def compiled(cache: Path) -> set[str]:
        done = subprocess.run(
            [sys.executable, "-c", COMPILED],
            env={
                **os.environ,
                "PYTHONPATH": paths,
                "TRITON_CACHE_DIR": str(cache),
                "TRITON_INTERPRET": "0",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())

    names = compiled(here)
    monkeypatch.setattr(carried, "ROOT", tmp_path)
    assert carried.pack(here, archive) == len(names) > 0
    here.rename(tmp_path / "gone")
    carried.unpack(archive, there)
    before = {path: path.stat().st_mtime_ns for path in there.glob("*/*")}
    assert compiled(there) == names
    assert {path: path.stat().st_mtime_ns for path in there.glob("*/*")} == before


def test_parts_are_compiled_in_turn(monkeypatch, tmp_path, capsys) -> None:
    """All but the tests and the extension in this process; then they are packed."""
    done = []
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.setattr(carried, "ROOT", tmp_path)
    monkeypatch.setattr(carried, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(carried, "ARCHIVE", tmp_path / "archive.tar.xz")
    monkeypatch.setattr(precompile, "_here", lambda part, target: done.append((part, target)))
    monkeypatch.setattr(precompile, "_tests", lambda target, jobs: done.append((target, jobs)))
    monkeypatch.setattr(precompile, "_extension", lambda target: done.append(target))
    monkeypatch.setattr(precompile, "_driver_to_link_with", contextlib.nullcontext)
    assert precompile.main(["--target", "sm80", "--jobs", "3"]) == 0
    here = [(part, "sm80") for part in ("check", "bench", "exercise")]
    assert done == ["sm80", *here, ("sm80", 3)]
    assert "0 kernels" in capsys.readouterr().out
    done.clear()
    assert precompile.main(["--only", "bench"]) == 0
    assert done == [("bench", "sm90")]
