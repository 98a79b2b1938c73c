"""What is compiled without a GPU: parts in turn, launchers where Triton has some."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import archive, precompile

LAUNCHED = """
from tests.gpu import precompile
from tests.support.triton_compile import CASES

with precompile.driver_to_link_with(), precompile.compiling("sm90") as launched:
    CASES["gram of 16 rows bf16"]()
    precompile.compile_launchers(launched)
    assert not launched
"""


def test_launchers_are_compiled_where_triton_has_some(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    line = [sys.executable, "-c", LAUNCHED]
    done = subprocess.run(
        line, cwd=precompile.ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_parts_are_compiled_in_turn(monkeypatch, tmp_path, capsys) -> None:
    """All but the tests and the extension in this process; then they are packed."""
    done = []
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.setenv("RIFT_KERNELS_SELF_TEST", "")
    monkeypatch.setattr(precompile, "ROOT", tmp_path)
    for name in ("_compile_extension", "_compile_here", "_compile_tests"):
        monkeypatch.setattr(precompile, name, lambda *arguments: done.append(arguments))
    monkeypatch.setattr(precompile, "driver_to_link_with", contextlib.nullcontext)
    assert precompile.main(["--target", "sm80", "--jobs", "3"]) == 0
    here = [(part, "sm80") for part in ("check", "bench", "exercise")]
    assert done == [("sm80",), *here, ("sm80", 3)]
    assert "0 kernels" in capsys.readouterr().out
    assert (tmp_path / archive.ARCHIVE).exists()
    done.clear()
    assert precompile.main(["--only", "bench"]) == 0
    assert done == [("bench", "sm90")]


@pytest.mark.parametrize("succeeds", [True, False])
def test_an_extension_is_built_once(succeeds, monkeypatch, tmp_path) -> None:
    """For the target, and it is known by its sources."""
    built = []

    def python(_: str, **variables: str) -> bool:
        built.append(variables["RIFT_KERNELS_CUDA_ARCHS"])
        (tmp_path / "build").mkdir(exist_ok=True)
        return succeeds

    monkeypatch.setattr(precompile, "ROOT", tmp_path)
    monkeypatch.setattr(precompile, "_python", python)
    precompile._compile_extension("sm90")
    assert archive.is_built(tmp_path, "90a") is succeeds
    precompile._compile_extension("sm90")
    assert built == ["90a"] * (1 if succeeds else 2)
