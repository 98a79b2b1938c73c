"""Runs that are stored when they finish, so that a later start performs only missing ones."""

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

Run = dict[str, Any]  # the settings that vary between runs, and results
Context = TypeVar("Context")
ROOT = Path(__file__).parents[2]
HARDWARE = f"{platform.machine()} cpu, one thread"


class StoreError(ValueError):
    """A fault in a file of runs; the message is for the user."""


class Job(NamedTuple):
    """A run to perform, with the settings that distinguish it from others."""

    seed: int
    name: str
    settings: Run


class Store:
    """A file of JSON lines, one for each finished run, identified by all settings and ``code``.

    A line is written at once. An incomplete last line, which a killed run leaves, is cut off. Only
    one process may use a file at a time.

    Raises:
        StoreError: a line other than the last is not a run.
    """

    def __init__(self, path: Path, code: str) -> None:
        self.path, self.code = path, code
        self._runs: dict[str, Run] = {}
        data = path.read_bytes() if path.exists() else b""
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.truncate(path, end)
        for number, line in enumerate(data[:end].splitlines(), 1):
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
    """A digest of these modules, of the package, and of the versions of its dependencies."""
    digest = hashlib.sha256(json.dumps(versions()).encode())
    for module in modules:
        digest.update(inspect.getsource(module).encode())
    for path in sorted(Path(rk.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    packages = {module.__name__: module.__version__ for module in (rk, torch, sklearn, numpy)}
    return packages | {"python": platform.python_version()}


def commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    try:
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return process.stdout.strip() if process.returncode == 0 else "unknown"


def progress_bar(console: Console) -> Progress:
    """A progress bar, which is hidden if the output is not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def run_missing(
    store: Store,
    shared_settings: Run,
    jobs: Sequence[Job],
    prepare: Callable[[int], Context],
    perform: Callable[[Context, Job], Run],
    console: Console,
) -> list[Run]:
    """Perform the jobs that the store lacks; return settings and results of all, in order.

    ``prepare`` computes what the jobs of one seed share. It is called only for seeds with missing
    jobs, and its time counts towards the first of them. No job varies ``shared_settings``.
    """

    def settings(job: Job) -> Run:
        return {**shared_settings, "seed": job.seed, **job.settings}

    missing = [job for job in jobs if store.get(settings(job)) is None]
    console.print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them done before")
    # A model this small gains nothing from more threads, and loses much on a busy machine.
    with threadpool_limits(1), progress_bar(console) as bar:
        task = bar.add_task("", total=len(missing))
        for seed in dict.fromkeys(job.seed for job in missing):
            start = time.perf_counter()
            bar.update(task, description=f"seed {seed}: pretraining")
            context = prepare(seed)
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


def record(store: Store, shared_settings: Run, runs: Sequence[Run], commit: str) -> dict[str, Any]:
    """The content of a result file."""
    return {
        "hardware": HARDWARE,
        "seconds": round(sum(run["seconds"] for run in runs), 1),
        "versions": versions(),
        "commit": commit,
        "code": store.code,
        "settings": shared_settings,
        "runs": list(runs),
    }
