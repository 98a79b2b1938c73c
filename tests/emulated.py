"""``rift_kernels._C`` for a CPU: csrc's own bindings and kernels, compiled by g++, with the GPU of
``tests/emulator`` in place of CUDA's launches."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

TESTS = Path(__file__).parent
SOURCES = (TESTS.parent / "csrc" / "bindings.cpp", TESTS / "emulator" / "launchers.cpp")


def build(folder: Path) -> ModuleType:
    """Compiles and imports it."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11")
    target = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [
        *("g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
        *("-fPIC", "-shared", "-fvisibility=hidden", '-DRIFT_ARCHS="emulated"'),
        # Its cuda_runtime.h, not CUDA's.
        *("-I", str(TESTS / "emulator"), "-I", str(TESTS.parent / "csrc")),
        *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")),
        *(*map(str, SOURCES), "-o", str(target)),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    specification = importlib.util.spec_from_file_location("_C", target)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
