"""Triton's launches recorded, and their kernels compiled ahead in processes without the GPU.

Threads would do for speed: Triton holds Python's lock only while it reads a kernel's source, a
tenth of the time. But a failed assertion of its compiler ends the process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

# A kernel of this package compiles in a few seconds; ptxas may search for registers much longer.
TIMEOUT = 60.0


class Launch(NamedTuple):
    """A launch that was made, and can be made again."""

    kernel: Any  # a JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # constants, warps and stages
    compiled: Any

    def differs(self, other: Launch) -> bool:
        """Whether another kernel is launched, or as many programs of another shape."""
        return (self.kernel, self.grid, self.options) != (other.kernel, other.grid, other.options)

    def repeat(self) -> None:
        """Launch once more."""
        self.kernel.run(*self.arguments, grid=self.grid, warmup=False, **self.options)


class Job(NamedTuple):
    """A kernel, and all that decides how it compiles, as triton writes it."""

    module: str
    name: str
    source: str  # triton's hash, which depends on what a process has compiled before
    specialization: str


@contextlib.contextmanager
def recorded(run: bool = True) -> Iterator[list[Launch]]:
    """Yields the launches that are made inside; without ``run`` their kernels compile only."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    original = JITFunction.run

    def record(
        kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any
    ) -> Any:
        compiled = original(kernel, *arguments, grid=grid, warmup=warmup or not run, **options)
        launches.append(Launch(kernel, grid, arguments, options, compiled))
        return compiled

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = original


@contextlib.contextmanager
def missing() -> Iterator[list[Job]]:
    """Inside, launches neither run nor compile; yields the kernels that are not loaded yet."""
    from triton import knobs

    jobs: list[Job] = []

    def collect(*, fn: Any, **options: Any) -> bool:
        source = fn.jit_function.cache_key
        jobs.append(Job(fn.module, fn.name, source, options["compile"]["specialization_data"]))
        return True

    former, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, collect
    try:
        with recorded(run=False):
            yield jobs
    finally:
        knobs.runtime.jit_cache_hook = former


class Target:
    """All that triton asks a GPU before compiling for it."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        """The GPU's architecture."""
        return self._target

    def get_current_device(self) -> int:
        """Any number."""
        return 0

    def get_current_stream(self, _device: int) -> int:
        """Any number."""
        return 0


class Compilers:
    """Processes that compile for a target of triton's; a context manager, which ends them."""

    def __init__(self, target: Any, workers: int | None = None) -> None:
        path = os.pathsep.join(str(Path(path).absolute()) for path in sys.path)
        self._environment = {**os.environ, "PYTHONPATH": path}
        # -P: the current folder is not searched unless this process searches it as well.
        self._command = [sys.executable, "-P", "-m", __name__, json.dumps(vars(target))]
        self.workers = workers or min(len(os.sched_getaffinity(0)), 16)
        self._threads = ThreadPoolExecutor(self.workers)
        self._of_thread = threading.local()
        self._processes: list[subprocess.Popen[str]] = []
        self._outcomes: dict[Job, Future[str]] = {}

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        # Threads wait for outcomes, which end with the processes.
        self._threads.shutdown()
        for process in self._processes:
            process.communicate()

    def submit(self, job: Job) -> Future[str]:
        """Compile, unless that has been done; the result says why it fails, or is empty."""
        if job not in self._outcomes:
            self._outcomes[job] = self._threads.submit(self._outcome, job)
        return self._outcomes[job]

    def _outcome(self, job: Job) -> str:
        process = self._process()
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(TIMEOUT, process.kill)
        timer.start()
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        timer.cancel()
        if line:
            return str(json.loads(line))
        del self._of_thread.process
        return f"the compiler ended with status {process.wait()}"

    def _process(self) -> subprocess.Popen[str]:
        """The process of this thread."""
        if not hasattr(self._of_thread, "process"):
            self._of_thread.process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                # Ctrl-C ends the search, which ends them.
                start_new_session=True,
            )
            self._processes.append(self._of_thread.process)
        process: subprocess.Popen[str] = self._of_thread.process
        return process


def main(arguments: Sequence[str]) -> None:
    """A process of :class:`Compilers`: compile jobs into triton's cache on the disk."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(Target(GPUTarget(**json.loads(arguments[0]))))
    # What else is printed here must not come among the outcomes.
    outcomes = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = Job(*json.loads(line))
        try:
            kernel = getattr(importlib.import_module(job.module), job.name)
            kernel.hash = job.source
            kernel.preload(job.specialization)
            failure = ""
        # Triton raises many types.
        except Exception as error:
            failure = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        print(json.dumps(failure), file=outcomes, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
