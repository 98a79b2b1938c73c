"""``python -m tests.gpu.precompile``: compile ahead, without a GPU, what gpu-check runs on one.

    PYTHON -m tests.gpu.precompile                for sm90, with PYTHON's torch and triton
    PYTHON -m tests.gpu.precompile --only bench   a part of it

Run it with the Python, torch and triton of the machine with the GPU, from the same sources, and
take ``build/precompiled.tar.xz`` there: ``python -m tests.gpu.check`` unpacks it. Kernels are
compiled as they are launched, by the tests and the benchmarks themselves, on CPU tensors and with
nothing run. It may be stopped and goes on later: what is compiled lies in ``build/triton-cache``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import environment, providers, workloads

from . import carried, exercise, suite

# This variable names the target to the tests' processes, which have this module as a plugin.
VARIABLE = "RIFT_KERNELS_PRECOMPILE"
# Targets in tests/support/triton_compile.py, and what nvcc calls them.
TARGETS = {"sm80": "80", "sm90": "90a", "sm100": "100a"}
PARTS = ("extension", "check", "bench", "exercise", "tests")
HEADLINE = workloads.PROFILES["headline"].workloads
CPU = torch.device("cpu")


@contextlib.contextmanager
def compiling(target: str) -> Iterator[list[Any]]:
    """A context with a GPU whose tensors lie on the CPU: kernels are compiled, not run.

    Yields the list of launched kernels, which a caller empties.
    """
    import pytest

    from rift_kernels.dispatch import availability, plan

    stand_in = importlib.import_module("tests.support.stand_in_gpu")
    recorder = importlib.import_module("tests.support.triton_compile")
    choose_backend, reason_against = plan.choose_backend, availability.reason_against

    def reason_against_triton(_: object, dtypes: Sequence[torch.dtype]) -> str | None:
        return "float64" if torch.float64 in dtypes else None

    with pytest.MonkeyPatch.context() as patch, recorder.recording(target) as launched:
        stand_in.install(patch.setattr)
        patch.setattr(plan, "choose_backend", choose_backend)
        patch.setattr(availability, "reason_against", reason_against)
        patch.setattr(plan, "_has_kernels", lambda _: True)
        patch.setattr(availability, "_reason_against_triton", reason_against_triton)
        with stand_in.OnCPU():
            yield launched


def launchers(launched: list[Any]) -> None:
    """Compile the C code that hands kernels their arguments, as triton does at a first launch."""
    from triton.backends.nvidia.driver import CudaLauncher

    for kernel in {kernel.hash: kernel for kernel in launched}.values():
        # The code is then in the cache, but cannot be loaded: there is no driver. Triton 3.7 has no
        # such code, and asks the driver at once.
        with contextlib.suppress(ImportError, AttributeError):
            CudaLauncher(kernel.src, kernel.metadata)
    launched.clear()


@contextlib.contextmanager
def _driver_to_link_with() -> Iterator[None]:
    """A library by the driver's name, empty, which is enough for a linker."""
    with tempfile.TemporaryDirectory() as folder:
        line = ["gcc", "-shared", "-x", "c", os.devnull, "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*line, "-o", f"{folder}/libcuda.so.1"], check=True)
        with mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder):
            yield


def _here(part: str, target: str) -> None:
    """Compile a part in this process."""
    from rift_kernels.commands import trial
    from rift_kernels.trust import known_answers

    with compiling(target) as launched:
        if part == "exercise":
            exercise.compare(CPU)
        elif part == "bench":
            (ours,) = (p for p in providers.providers(CPU, ()) if p.name.endswith("triton"))
            for workload in HEADLINE:
                x = torch.zeros(workload.rows, workload.width, dtype=workload.dtype)
                students = [x.clone().requires_grad_() for _ in range(workload.layers)]
                inputs = workloads.Inputs(students, [x] * workload.layers)
                ours.measures[workload.measure](inputs).sum().backward()
        else:
            for kernels in (k for k in known_answers.ALL if k.backend == "triton"):
                for case in known_answers.cases_of(kernels, True):
                    trial.attempt(kernels, case, CPU)
        launchers(launched)


def _tests(target: str, jobs: int) -> None:
    """Run the tests as gpu-check does. Whether they pass says nothing: nothing is computed."""
    workers = f"-n {jobs}" if find_spec("xdist") and jobs > 1 else ""
    # test_gpu.py has features for a GPU, and kernels that other tests have, too.
    options = (
        "-p no:cacheprovider -p tests.gpu.suite -p tests.gpu.precompile -q --tb=no "
        f"--no-summary --ignore=tests/gpu/test_gpu.py {workers} tests"
    )
    with tempfile.TemporaryDirectory() as folder:
        variables = {VARIABLE: target, suite.VARIABLE: str(Path(folder) / "outcomes.jsonl")}
        subprocess.run(
            [sys.executable, "-m", "pytest", *options.split()],
            cwd=environment.ROOT,
            env={**os.environ, **variables, "RIFT_TEST_DEVICE": "cuda"},
            check=False,
        )


def pytest_configure(config: Any) -> None:
    """In the processes of the tests."""
    target = os.environ.get(VARIABLE)
    if target:
        stack = contextlib.ExitStack()
        config.rift_launched = stack.enter_context(compiling(target))
        config.add_cleanup(stack.close)


def pytest_runtest_teardown(item: Any) -> None:
    """Compile launchers after each test, which keeps the list of launches short."""
    if os.environ.get(VARIABLE):
        launchers(item.config.rift_launched)


def _extension(target: str) -> None:
    architecture = TARGETS[target]
    if carried.is_built(architecture):
        return
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=environment.ROOT,
        env={**os.environ, "RIFT_KERNELS_CUDA_ARCHS": architecture},
        check=False,
    )
    if done.returncode == 0 and (environment.ROOT / carried.EXTENSION).exists():
        carried.stamp(architecture)


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
    os.environ["TRITON_CACHE_DIR"] = str(carried.CACHE)
    os.environ["RIFT_KERNELS_SELF_TEST"] = "0"  # nothing runs that could be tested
    with _driver_to_link_with():
        for part in options.only:
            start = time.monotonic()
            if part == "extension":
                _extension(options.target)
            elif part == "tests":
                _tests(options.target, options.jobs)
            else:
                _here(part, options.target)
            print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)
    kernels = carried.pack(carried.CACHE, carried.ARCHIVE)
    size = carried.ARCHIVE.stat().st_size / 2**20
    print(f"wrote {carried.ARCHIVE}: {kernels} kernels, {size:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
