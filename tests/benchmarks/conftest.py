"""What the commands that measure write, once for all tests."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import cache

import pytest

from benchmarks import files
from benchmarks.schema import Result


@pytest.fixture(scope="session")
def _measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    @cache
    def measured(command: str) -> Result:
        for package in ("peft", "transformers") if command == "step" else ():
            pytest.importorskip(package, reason=f"needs {package}")
        folder = tmp_path_factory.mktemp(command)
        main = importlib.import_module(f"benchmarks.{command}").main
        assert main(["--profile", "smoke", "--device", "cpu", "--out", str(folder)]) == 0
        (path,) = folder.iterdir()
        return files.read(path)

    return measured


@pytest.fixture
def smoke(_measured) -> Callable[[str], Result]:
    """The smoke profile of a command that measures, to be changed at will."""
    return lambda command: copy.deepcopy(_measured(command))
