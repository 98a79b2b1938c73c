"""``python -m tests.gpu.precompile``: compile ahead, without a GPU, what gpu-check runs on one.

    PYTHON -m tests.gpu.precompile                for sm90, with PYTHON's torch and triton
    PYTHON -m tests.gpu.precompile --only bench   a part of it

Python, torch, triton and the sources must be those of the machine with the GPU. Take
``build/precompiled.tar.xz`` there, and ``python -m tests.gpu.check`` unpacks it. The tests and
the benchmarks launch their kernels on CPU tensors. Each launch compiles, and nothing runs. A run
that was stopped goes on later: what is compiled lies in ``build/triton-cache``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import environment, providers, workloads
from rift_kernels.commands import trial
from rift_kernels.dispatch import availability, plan
from rift_kernels.trust import known_answers

from . import archive, exercise, suite

ROOT = environment.ROOT
# Names the target to the processes of the tests, which have this module as a plugin.
VARIABLE = "RIFT_KERNELS_PRECOMPILE"
# Targets in tests/support/triton_compile.py, and what nvcc calls them.
TARGETS = {"sm80": "80", "sm90": "90a", "sm100": "100a"}
PARTS = ("extension", "check", "bench", "exercise", "tests")
# Read before the stand-in for a GPU makes the profiles small.
HEADLINE = workloads.PROFILES["headline"].workloads
CPU = torch.device("cpu")
# What the process of a test has launched.
LAUNCHED = pytest.StashKey[list[Any]]()


@contextlib.contextmanager
def compiling(target: str) -> Iterator[list[Any]]:
    """A context with a GPU whose tensors lie on the CPU: kernels are compiled, not run.

    Yields the list of launched kernels, which a caller empties.
    """
    from tests.support import stand_in_gpu, triton_compile  # needs triton

    choose_backend, reason_against = plan.choose_backend, availability.reason_against

    def reason_against_triton(_: object, dtypes: Sequence[torch.dtype]) -> str | None:
        return "float64" if torch.float64 in dtypes else None

    with pytest.MonkeyPatch.context() as patch, triton_compile.recording(target) as launched:
        stand_in_gpu.install(patch.setattr)
        # The backend is chosen as on a GPU.
        patch.setattr(plan, "choose_backend", choose_backend)
        patch.setattr(availability, "reason_against", reason_against)
        patch.setattr(plan, "_has_kernels", lambda _: True)
        patch.setattr(availability, "_reason_against_triton", reason_against_triton)
        with stand_in_gpu.OnCPU():
            yield launched


def compile_launchers(launched: list[Any]) -> None:
    """Compile the C code that hands kernels their arguments, as triton does at a first launch."""
    from triton.backends.nvidia.driver import CudaLauncher

    for kernel in {kernel.hash: kernel for kernel in launched}.values():
        # The code lands in the cache, and cannot be loaded without a driver. Triton 3.7 has no such
        # code, and asks the driver at once.
        with contextlib.suppress(ImportError, AttributeError):
            CudaLauncher(kernel.src, kernel.metadata)
    launched.clear()


@contextlib.contextmanager
def driver_to_link_with() -> Iterator[None]:
    """An empty library with the driver's name, which is enough for a linker."""
    with tempfile.TemporaryDirectory() as folder:
        line = ["gcc", "-shared", "-x", "c", os.devnull, "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*line, "-o", f"{folder}/libcuda.so.1"], check=True)
        with mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder):
            yield


def _compile_here(part: str, target: str) -> None:
    """Compile what a part launches, in this process."""
    with compiling(target) as launched:
        if part == "check":
            for kernels in (k for k in known_answers.ALL if k.backend == "triton"):
                for case in known_answers.cases_of(kernels, True):
                    trial.attempt(kernels, case, CPU)
        elif part == "bench":
            (ours,) = (p for p in providers.providers(CPU, ()) if p.name.endswith("triton"))
            for workload in HEADLINE:
                x = torch.zeros(workload.rows, workload.width, dtype=workload.dtype)
                students = [x.clone().requires_grad_() for _ in range(workload.layers)]
                inputs = workloads.Inputs(students, [x] * workload.layers)
                ours.measures[workload.measure](inputs).sum().backward()
        else:
            exercise.compare(CPU)
        compile_launchers(launched)


def _python(command: str, **variables: str) -> bool:
    """Run this Python with these arguments and environment variables; whether it succeeds."""
    line, env = [sys.executable, *command.split()], {**os.environ, **variables}
    return subprocess.run(line, cwd=ROOT, env=env, check=False).returncode == 0


def _compile_extension(target: str) -> None:
    architecture = TARGETS[target]
    if not archive.is_built(ROOT, architecture):
        variables = {"RIFT_KERNELS_CUDA": "1", "RIFT_KERNELS_CUDA_ARCHS": architecture}
        if _python("setup.py build_ext --inplace", **variables):
            (ROOT / archive.STAMP).write_text(archive.stamp(ROOT, architecture), encoding="utf-8")


def _compile_tests(target: str, jobs: int) -> None:
    """Run the tests as gpu-check does. Whether they pass says nothing: nothing is computed."""
    workers = f"-n {jobs}" if find_spec("xdist") else ""
    # The tests of test_gpu.py need a GPU's memory, and launch what other tests launch, too.
    command = (
        "-m pytest -p no:cacheprovider -p tests.gpu.suite -p tests.gpu.precompile -q --tb=no "
        f"--no-summary --ignore=tests/gpu/test_gpu.py {workers} tests"
    )
    with tempfile.TemporaryDirectory() as folder:
        outcomes = f"{folder}/outcomes.jsonl"
        variables = {VARIABLE: target, suite.VARIABLE: outcomes, "RIFT_TEST_DEVICE": "cuda"}
        _python(command, **variables)


def pytest_configure(config: pytest.Config) -> None:
    """Compile in the processes of the tests."""
    stack = contextlib.ExitStack()
    config.stash[LAUNCHED] = stack.enter_context(compiling(os.environ[VARIABLE]))
    config.add_cleanup(stack.close)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Compile launchers after each test, which keeps the list of launches short."""
    compile_launchers(item.config.stash[LAUNCHED])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.precompile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", choices=TARGETS, default="sm90")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    os.environ["TRITON_CACHE_DIR"] = str(ROOT / archive.CACHE)
    os.environ["RIFT_KERNELS_SELF_TEST"] = "0"  # nothing runs that could be tested
    with driver_to_link_with():
        for part in options.only:
            start = time.monotonic()
            if part == "extension":
                _compile_extension(options.target)
            elif part == "tests":
                _compile_tests(options.target, options.jobs)
            else:
                _compile_here(part, options.target)
            print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)
    kernels, path = archive.pack(ROOT), ROOT / archive.ARCHIVE
    print(f"wrote {path}: {kernels} kernels, {path.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
