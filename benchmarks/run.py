"""``python -m benchmarks.run``: compare all providers side by side, write one JSON file.

For each workload, all providers are checked against float64 and timed in turn. Exits with 1 if
rift_kernels failed or was wrong, or nothing was measured.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from . import command, environment, flops, measure, schema, tables
from .command import Job
from .measure import MIN_ROUNDS, Task
from .oracle import Oracle, wrong
from .providers import NAIVE, OURS, Provider, providers
from .schema import Outcome
from .workloads import COMPILED, PROFILES, Profile, Workload, dtype_name, features

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
AGAIN = NAIVE + " again"


def run(job: Job[Profile], candidates: Sequence[Provider]) -> schema.Benchmark:
    """Measure a profile's workloads in about its budget, divided among them as it goes."""
    end, profile, device = time.monotonic() + job.budget, job.profile, job.device
    rates = {dtype_name(d): measure.matmul_peak(d, profile.probe, device) for d in DTYPES}
    bandwidth = measure.copy_bandwidth(profile.probe // 8, device)
    peaks = {"matmul_flops": rates, "copy_bytes": bandwidth}
    # A process does some things once and slowly, such as to load a compiler: on this one.
    measured(Workload("cka_biased", 4, 4), candidates, peaks, device, job.budget, 1)
    # Cheap workloads come first and leave time to those that need more.
    order = sorted(profile.workloads, key=lambda w: flops.naive(w) or 0.0)
    entries: dict[Workload, schema.Workload] = {}
    for w in command.progress(order):
        seconds = (end - time.monotonic()) / (len(order) - len(entries))
        entries[w] = measured(w, candidates, peaks, device, seconds, profile.max_rounds)
    return schema.Benchmark(
        profile=job.name,
        environment=environment.describe(device),
        peaks=peaks,
        providers=[schema.Provider(p.name, p.reason) for p in candidates],
        workloads=[entries[w] for w in profile.workloads],
    )


def failures(result: schema.Benchmark) -> list[str]:
    """The workloads on which ours failed or was wrong."""
    lines = [] if any(w.results for w in result.workloads) else ["nothing was measured"]
    for w in result.workloads:
        for name, outcome in w.results.items():
            if name.startswith(OURS) and (outcome.reason or outcome.wrong):
                lines.append(f"{name}: {w.measure} {w.shape}: {outcome.reason or 'wrong'}")
    return lines


def measured(
    workload: Workload,
    candidates: Sequence[Provider],
    peaks: dict[str, Any],
    device: torch.device,
    seconds: float,
    max_rounds: int,
) -> schema.Workload:
    """A workload's entry in the result, measured in about ``seconds``."""
    able = [p for p in candidates if p.can_do(workload)]
    entry = schema.Workload(
        **{**vars(workload), "dtype": dtype_name(workload.dtype)},
        shape=workload.shape,
        floor_seconds=floor(workload, peaks),
        predicted_seconds={p.name: p.predicted(workload, peaks["matmul_flops"]) for p in able},
    )
    try:
        if seconds <= 0:
            raise TimeoutError("the budget was spent before its turn")
        inputs = features(workload, device)
        tasks = [Task(provider, workload.measure, inputs) for provider in able]
        _complete(entry, tasks, Oracle(workload, inputs), device, seconds, max_rounds)
    except (ImportError, OSError, torch.OutOfMemoryError) as error:
        # There is no time, or there are no such features here, or they are too large.
        entry.reason, entry.results = sentence(error), {}
    return entry


def _complete(
    entry: schema.Workload,
    candidates: Sequence[Task],
    oracle: Oracle,
    device: torch.device,
    seconds: float,
    max_rounds: int,
) -> None:
    """Write what is measured into the entry.

    Naive code and ours are always timed, others if their predicted time is short enough. Naive
    eager is timed twice: the difference between the two is the noise.
    """
    start, tasks = time.monotonic(), {}
    for task in candidates:
        name = task.provider.name
        call, essential = entry.predicted_seconds[name], name == NAIVE or name.startswith(OURS)
        left = start + seconds - time.monotonic()
        if call and MIN_ROUNDS * call > left and not essential:
            reason = f"a call is predicted to take {call:.1f} s, too long to measure"
            entry.results[name] = Outcome(reason=reason)
            continue
        try:
            entry.results[name] = _examine(task, oracle, device)
            tasks[name] = task
        except Exception as error:
            # Other people's code may fail in any way.
            entry.results[name] = Outcome(reason=sentence(error))
    repeated = {AGAIN: tasks[NAIVE]} if NAIVE in tasks else {}
    # Compiling may have taken the whole time.
    deadline = max(start + seconds, time.monotonic() + seconds / 3)
    samples = measure.time_rounds({**tasks, **repeated}, device, deadline, max_rounds)
    for name, task in tasks.items():
        outcome = entry.results[name]
        outcome.seconds = measure.quantiles(samples[name])
        outcome.relative = measure.relative(samples[name], samples[NAIVE]) if repeated else None
        entry.rounds = len(samples[name])
        try:
            outcome.graph = measure.graph_seconds(task, device)
        except Exception as error:
            # Other people's code may wait for the device, or run out of memory.
            outcome.graph_reason = sentence(error)
    if repeated:
        again = measure.quantiles(samples[AGAIN])
        for clock, once in entry.results[NAIVE].seconds.items():
            entry.noise[clock] = abs(again[clock].q50 / once.q50 - 1)


def floor(workload: Workload, peaks: dict[str, Any]) -> float | None:
    """The least seconds: of the optimal operations, or of one pass over memory."""
    optimal, dtype = flops.optimal(workload), workload.dtype
    if optimal is None:
        return None
    # Both features are read and one gradient is written.
    nbytes = 3 * workload.rows * workload.width * workload.layers * dtype.itemsize
    return max(optimal / peaks["matmul_flops"][dtype_name(dtype)], nbytes / peaks["copy_bytes"])


def _examine(task: Task, oracle: Oracle, device: torch.device) -> Outcome:
    """A task's errors and memory."""
    if task.provider.name.startswith(COMPILED):
        # torch.compile counts shapes, and after a few silently runs the eager code.
        torch.compiler.reset()
    values = task.forward()
    value_error, gradient_error = oracle.errors(values, task.backward(values))
    del values
    return Outcome(
        memory=measure.peak_memory(task, device),
        launches=measure.launches(task, device),
        value_error=finite(value_error),
        gradient_error=finite(gradient_error),
        wrong=wrong(value_error, gradient_error),
    )


def finite(error: float) -> float | None:
    """The error as result files have it."""
    return error if math.isfinite(error) else None


def sentence(error: Exception) -> str:
    """The reason as one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def main(arguments: Sequence[str] | None = None) -> int:
    job, out = command.options("run", __doc__, PROFILES, arguments)
    result = run(job, providers(job.device, job.profile.compiled))
    return command.finish(result, out, tables.summary(result), failures(result))


if __name__ == "__main__":
    sys.exit(main())
