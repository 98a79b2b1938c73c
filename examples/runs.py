"""Runs that are kept: each is appended to a file when it is done, and only missing ones are run."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy
import sklearn
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import rift_kernels as rk

Run = dict[str, Any]  # the settings of a run that vary, and what it gave
Context = TypeVar("Context")
ROOT = Path(__file__).parent.parent
HARDWARE = f"{platform.machine()} cpu, one thread"


class StoreError(ValueError):
    """What is wrong with a file of runs; the message is for the user."""


class Job(NamedTuple):
    """A run that is wanted, and what sets it apart from the others."""

    seed: int
    name: str
    settings: Run


class Store:
    """A file of JSON lines, one a finished run, identified by all of its settings and ``code``.

    A line is written at once. What a killed run left of its last line is cut off. One process at a
    time.

    Raises:
        StoreError: another line than the last is no run.
    """

    def __init__(self, path: Path, code: str) -> None:
        self.path, self.code = path, code
        self._runs: dict[str, Run] = {}
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                run = json.loads(line)
                self._runs[self._key(run["code"], run["settings"])] = run["results"]
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(f"{path}, line {number}, is not a run: {error!r}") from error

    def get(self, settings: Run) -> Run | None:
        return self._runs.get(self._key(self.code, settings))

    def add(self, settings: Run, results: Run) -> None:
        run = {"code": self.code, "settings": settings, "results": results}
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(run).encode() + b"\n")
            os.fsync(file.fileno())
        self._runs[self._key(self.code, settings)] = results

    @staticmethod
    def _key(code: str, settings: Run) -> str:
        return json.dumps([code, settings], sort_keys=True)


def code_version(modules: Sequence[ModuleType]) -> str:
    """A digest of these modules, of the package, and of the versions of what they call."""
    digest = hashlib.sha256(json.dumps(versions()).encode())
    for module in modules:
        digest.update(inspect.getsource(module).encode())
    for path in sorted(Path(rk.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    found = {module.__name__: module.__version__ for module in (rk, torch, sklearn, numpy)}
    return found | {"python": platform.python_version()}


def commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def progress(console: Console) -> Progress:
    """A bar; none where the output is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def run_missing(
    store: Store,
    shared: Run,
    jobs: Sequence[Job],
    begin: Callable[[int], Context],
    perform: Callable[[Context, Job], Run],
    console: Console,
) -> list[Run]:
    """All jobs' settings and results, in their order; those that the store lacks are performed.

    ``begin`` gives what the jobs of a seed share, and is called for seeds with something to do. Its
    time counts as the first such job's. ``shared`` are the settings that no job varies.
    """

    def settings(job: Job) -> Run:
        return {**shared, "seed": job.seed, **job.settings}

    missing = [job for job in jobs if store.get(settings(job)) is None]
    console.print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them done before")
    # So small a model gains nothing from more threads, and loses much on a busy machine.
    with threadpool_limits(1), progress(console) as bar:
        task = bar.add_task("", total=len(missing))
        for seed in dict.fromkeys(job.seed for job in missing):
            start = time.perf_counter()
            bar.update(task, description=f"seed {seed}: pretraining")
            context = begin(seed)
            for job in (job for job in missing if job.seed == seed):
                bar.update(task, description=f"seed {seed}: {job.name}")
                results = perform(context, job)
                now = time.perf_counter()
                store.add(settings(job), {**results, "seconds": round(now - start, 2)})
                start = now
                bar.advance(task)
            if not console.is_terminal:
                console.print(f"seed {seed}: done")
    runs = []
    for job in jobs:
        runs.append({"seed": job.seed, **job.settings, **(store.get(settings(job)) or {})})
    return runs


def record(store: Store, shared: Run, runs: Sequence[Run], commit: str) -> dict[str, Any]:
    """What a result file holds."""
    return {
        "hardware": HARDWARE,
        "seconds": round(sum(run["seconds"] for run in runs), 1),
        "versions": versions(),
        "commit": commit,
        "code": store.code,
        "settings": shared,
        "runs": list(runs),
    }
