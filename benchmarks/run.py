"""``python -m benchmarks.run``: compare all providers side by side, write one JSON file.

For each workload, all providers are predicted, checked against float64 and timed in turn. The
predictions are printed before anything is measured. Exits with 1 if rift_kernels failed or was
wrong, or nothing was measured.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

import torch

from . import command, environment, flops, graphs, measure, real, schema, tables
from .command import Job
from .measure import MIN_ROUNDS, Task
from .oracle import Oracle, wrong
from .providers import NAIVE, OURS, Provider, providers
from .schema import Outcome
from .workloads import COMPILED, PROFILES, Inputs, Profile, Workload, dtype_name, features

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
AGAIN = NAIVE + " again"
# The first call is checked, another one's memory is recorded, and a third one's time estimated.
CALLS_BEFORE_ROUNDS = 3


def run(job: Job[Profile], candidates: Sequence[Provider]) -> schema.Benchmark:
    """Measure a profile's workloads in about its budget, divided among them as it goes."""
    end = time.monotonic() + job.budget
    profile, device = job.profile, job.device
    peaks = {dtype_name(d): measure.matmul_peak(d, profile.probe, device) for d in DTYPES}
    bandwidth = measure.copy_bandwidth(profile.probe // 8, device)
    entries = {w: describe(w, candidates, peaks, bandwidth) for w in profile.workloads}
    print(tables.predictions([*entries.values()]), flush=True)
    _warm_up(device, bool(profile.compiled))
    # Cheap workloads come first and leave time to those that need more.
    order = sorted(entries, key=lambda w: entries[w].predicted_seconds.get(NAIVE) or 0.0)
    for done, workload in enumerate(command.progress(order)):
        seconds = (end - time.monotonic()) / (len(order) - done)
        complete(entries[workload], workload, candidates, device, seconds, profile.max_rounds)
    return schema.Benchmark(
        profile=job.name,
        environment=environment.describe(device),
        peaks={"matmul_flops": peaks, "copy_bytes": bandwidth},
        providers=[schema.Provider(p.name, p.reason) for p in candidates],
        workloads=[*entries.values()],
    )


def failures(result: schema.Benchmark) -> list[str]:
    """The workloads on which ours failed or was wrong."""
    lines = [] if any(w.results for w in result.workloads) else ["nothing was measured"]
    for w in result.workloads:
        for name, outcome in w.results.items():
            if name.startswith(OURS) and (outcome.reason or outcome.wrong):
                lines.append(f"{name}: {w.measure} {w.shape}: {outcome.reason or 'wrong'}")
    return lines


def _warm_up(device: torch.device, compiled: bool) -> None:
    """Do what a process does once and slowly, whatever the workload."""
    ones = torch.ones(1, device=device, requires_grad=True)
    first = Provider("first", {"": lambda inputs: inputs.students[0] * inputs.teachers[0]})
    measure.peak_memory(Task(first, "", Inputs([ones], [ones.detach()])), device)
    if compiled:
        try:
            torch.compile(lambda x: x.sin().sum())(ones).backward()
        except Exception as error:
            # Each workload will then say so in its place.
            print(f"torch.compile does not work here: {error}")


class NotMeasuredError(Exception):
    """The reason why a workload or a provider was left out."""


def describe(
    workload: Workload, candidates: Sequence[Provider], peaks: Mapping[str, float], bandwidth: float
) -> schema.Workload:
    """A workload's entry in the result, with what is known before anything is measured.

    ``peaks`` are FLOP/s of a matrix product for each dtype, ``bandwidth`` is bytes/s of a copy.
    """
    dtype, optimal, floor = dtype_name(workload.dtype), flops.optimal(workload), None
    if optimal is not None:
        # Both features are read once and one gradient is written.
        elements = 3 * workload.rows * workload.width * workload.layers
        floor = max(optimal / peaks[dtype], elements * workload.dtype.itemsize / bandwidth)
    able = (p for p in candidates if p.can_do(workload))
    return schema.Workload(
        measure=workload.measure,
        shape=workload.shape,
        rows=workload.rows,
        width=workload.width,
        layers=workload.layers,
        dtype=dtype,
        valid=workload.valid,
        kind=workload.kind,
        floor_seconds=floor,
        predicted_seconds={p.name: p.predicted(workload, peaks) for p in able},
    )


def complete(
    entry: schema.Workload,
    workload: Workload,
    candidates: Sequence[Provider],
    device: torch.device,
    seconds: float,
    max_rounds: int,
) -> None:
    """Measure a workload in about ``seconds`` and write what was found into its entry.

    Naive eager is timed twice: the difference between the two is the noise.
    """
    start = time.monotonic()
    try:
        if seconds <= 0:
            raise NotMeasuredError("the time budget was spent before its turn")
        tasks, estimates = _prepare(entry, workload, candidates, device, start + seconds)
        # Preparing includes compiling, which may have taken the whole time.
        left = max(start + seconds - time.monotonic(), seconds / 3)
        _drop_the_slowest(entry, tasks, estimates, left)
        samples = measure.time_rounds(tasks, device, time.monotonic() + left, max_rounds)
    except (NotMeasuredError, real.UnavailableError, torch.OutOfMemoryError) as error:
        entry.reason, entry.results = sentence(error), {}
        return
    again, naive = samples.pop(AGAIN, None), samples.get(NAIVE)
    for name, rounds in samples.items():
        outcome = entry.results[name]
        outcome.seconds = measure.quantiles(rounds)
        outcome.relative = measure.relative(rounds, naive) if naive else None
        outcome.graph, outcome.graph_reason = _in_a_graph(tasks[name], device)
        entry.rounds = len(rounds)
    if again is not None:
        for clock, once in entry.results[NAIVE].seconds.items():
            entry.noise[clock] = abs(measure.quantiles(again)[clock].q50 / once.q50 - 1)


def _in_a_graph(task: Task, device: torch.device) -> tuple[schema.Quantiles | None, str]:
    """Seconds in a CUDA graph, or why there are none."""
    try:
        seconds = graphs.seconds(task, device)
    except Exception as error:
        # Other people's code may wait for the device, or run out of memory.
        return None, sentence(error)
    return seconds, "" if seconds else "CUDA graphs need a GPU"


def _essential(name: str) -> bool:
    """Whether a comparison cannot do without it."""
    return name in (NAIVE, AGAIN) or name.startswith(OURS)


def _prepare(
    entry: schema.Workload,
    workload: Workload,
    candidates: Sequence[Provider],
    device: torch.device,
    deadline: float,
) -> tuple[dict[str, Task], dict[str, float]]:
    """The tasks to time, warm, and the seconds that a call takes.

    The entry gets their errors and their memory, and the reasons of those that are left out.
    """
    inputs = features(workload, device)
    oracle = Oracle(workload, inputs)
    tasks: dict[str, Task] = {}
    estimates: dict[str, float] = {}
    for provider in (p for p in candidates if p.can_do(workload)):
        name = provider.name
        if name.startswith(COMPILED):
            # torch.compile counts shapes, and after a few silently runs the eager code.
            torch.compiler.reset()
        task = Task(provider, workload.measure, inputs)
        try:
            if not _essential(name):
                _refuse_the_hopeless(entry.predicted_seconds[name], deadline - time.monotonic())
            outcome = _examine(task, oracle, device)
            estimates[name] = measure.time_once(task, device)["wall"]
        except Exception as error:
            # Other people's code may fail in any way.
            entry.results[name] = Outcome(reason=sentence(error))
        else:
            entry.results[name], tasks[name] = outcome, task
    if NAIVE in tasks:
        tasks[AGAIN], estimates[AGAIN] = tasks[NAIVE], estimates[NAIVE]
    return tasks, estimates


def _refuse_the_hopeless(predicted: float | None, left: float) -> None:
    if left <= 0:
        raise NotMeasuredError("the time for this workload was spent before its turn")
    if predicted is not None and predicted * (CALLS_BEFORE_ROUNDS + MIN_ROUNDS) > left:
        raise NotMeasuredError(
            f"a call is predicted to take {predicted:.1f} s, too long to measure"
        )


def _examine(task: Task, oracle: Oracle, device: torch.device) -> Outcome:
    """A task's errors and memory."""
    values = task.forward()
    value_error, gradient_error = oracle.errors(values, task.backward(values))
    del values
    return Outcome(
        memory=measure.peak_memory(task, device),
        launches=graphs.launches(task, device),
        value_error=finite(value_error),
        gradient_error=finite(gradient_error),
        wrong=wrong(value_error, gradient_error),
    )


def _drop_the_slowest(
    entry: schema.Workload, tasks: dict[str, Task], estimates: Mapping[str, float], left: float
) -> None:
    """Leave out what is not essential, until the fewest rounds fit into the time left."""

    def needed(names: Iterable[str]) -> float:
        return MIN_ROUNDS * sum(estimates[name] for name in names)

    least = needed(filter(_essential, tasks))
    # The budget is divided before the sizes are known: some workloads need more than their part.
    if least > 3 * left:
        raise NotMeasuredError(
            f"{MIN_ROUNDS} rounds would take {least:.0f} s; {left:.0f} s were left"
        )
    # Tasks that add little may stay in any case.
    allowed = max(left, 1.2 * least)
    for name in sorted(tasks, key=lambda name: estimates[name], reverse=True):
        if needed(tasks) > allowed and not _essential(name):
            del tasks[name]
            reason = f"a call takes {estimates[name]:.2f} s, too long for the time left"
            entry.results[name] = Outcome(reason=reason)


def finite(error: float) -> float | None:
    """The error as result files have it."""
    return error if math.isfinite(error) else None


def sentence(error: Exception) -> str:
    """The reason as one line."""
    text = next(iter(str(error).splitlines()), "")
    if isinstance(error, NotMeasuredError | real.UnavailableError):
        return text
    return f"{type(error).__name__}: {text}"


def main(arguments: Sequence[str] | None = None) -> int:
    job, out = command.options("run", __doc__, PROFILES, arguments)
    result = run(job, providers(job.device, job.profile.compiled))
    return command.finish(result, out, tables.summary(result), failures(result))


if __name__ == "__main__":
    sys.exit(main())
