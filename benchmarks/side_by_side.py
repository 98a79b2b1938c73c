"""One workload, all its providers: predict, check against float64, time side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from . import flops, graphs, measure, real
from .oracle import Oracle, wrong
from .providers import NAIVE, OURS, Provider
from .workloads import COMPILED, Workload, features

AGAIN = NAIVE + " again"
# The first one, which is checked, the one whose memory is recorded, and an estimate of the time.
CALLS_BEFORE_ROUNDS = 3

Entry = dict[str, Any]


class NotMeasuredError(Exception):
    """The reason why a workload or a provider was left out."""


def describe(
    workload: Workload, candidates: Sequence[Provider], peaks: dict[str, float], bandwidth: float
) -> Entry:
    """A workload's entry in the result, with what is known before anything is measured.

    ``peaks`` are FLOP/s of a matrix product for each dtype, ``bandwidth`` is bytes/s of a copy.
    """

    def predicted(provider: Provider) -> float | None:
        count = provider.flops(workload)
        dtype = provider.products_in or workload.dtype
        return None if count is None else count / peaks[dtype_name(dtype)]

    optimal = flops.optimal(workload)
    floor = None
    if optimal is not None:
        # Both features are read once and one gradient is written.
        elements = 3 * workload.rows * workload.width * workload.layers
        floor = max(
            optimal / peaks[dtype_name(workload.dtype)],
            elements * workload.dtype.itemsize / bandwidth,
        )
    return {
        "measure": workload.measure,
        "shape": workload.shape,
        "rows": workload.rows,
        "width": workload.width,
        "layers": workload.layers,
        "dtype": dtype_name(workload.dtype),
        "valid": workload.valid,
        "kind": workload.kind,
        "floor_seconds": floor,
        "predicted_seconds": {p.name: predicted(p) for p in able(workload, candidates)},
        "reason": None,
        "rounds": 0,
        "noise": {},
        "results": {},
    }


def complete(
    entry: Entry,
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
        entry.update(reason=sentence(error), results={})
        return
    timed = {name: measure.quantiles(rounds) for name, rounds in samples.items()}
    again = timed.pop(AGAIN, None)
    if again is not None:
        for clock, once in timed[NAIVE].items():
            entry["noise"][clock] = abs(again[clock]["q50"] / once["q50"] - 1)
    for name, clocks in timed.items():
        outcome = entry["results"][name]
        outcome["seconds"] = clocks
        base = samples.get(NAIVE)
        outcome["relative"] = measure.relative(samples[name], base) if base else None
        outcome["graph"], outcome["graph_reason"] = _in_a_graph(tasks[name], device)
        entry["rounds"] = len(samples[name])


def _in_a_graph(task: measure.Task, device: torch.device) -> tuple[dict[str, float] | None, str]:
    """Seconds in a CUDA graph, or why there are none."""
    try:
        found = graphs.seconds(task, device)
    except Exception as error:
        # Code of other people may wait for the device, or run out of memory.
        return None, sentence(error)
    return found, "" if found else "CUDA graphs need a GPU"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def able(workload: Workload, candidates: Sequence[Provider]) -> list[Provider]:
    """Who can do a workload here."""
    return [
        p
        for p in candidates
        if p.reason is None and workload.measure in p.measures and p.takes(workload)
    ]


def _essential(name: str) -> bool:
    """What a comparison cannot do without."""
    return name in (NAIVE, AGAIN) or name.startswith(OURS)


def _prepare(
    entry: Entry,
    workload: Workload,
    candidates: Sequence[Provider],
    device: torch.device,
    deadline: float,
) -> tuple[dict[str, measure.Task], dict[str, float]]:
    """The tasks to time, warm, and the seconds that a call takes.

    The entry gets their errors and their memory, and the reasons of those that are left out.
    """
    inputs = features(workload, device)
    oracle = Oracle(workload, inputs)
    tasks: dict[str, measure.Task] = {}
    estimates: dict[str, float] = {}
    for provider in able(workload, candidates):
        name = provider.name
        if name.startswith(COMPILED):
            # It counts the shapes it has seen, and after a few silently runs the eager code.
            torch.compiler.reset()
        task = measure.Task(provider, workload.measure, inputs)
        try:
            if not _essential(name):
                _refuse_the_hopeless(entry["predicted_seconds"][name], deadline)
            outcome = _examine(task, oracle, device)
            estimates[name] = measure.time_once(task, device)["wall"]
        except Exception as error:
            # Code of other people may fail in any way.
            entry["results"][name] = {"reason": sentence(error)}
        else:
            entry["results"][name], tasks[name] = outcome, task
    if NAIVE in tasks:
        tasks[AGAIN], estimates[AGAIN] = tasks[NAIVE], estimates[NAIVE]
    return tasks, estimates


def _refuse_the_hopeless(predicted: float | None, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise NotMeasuredError("the time for this workload was spent before its turn")
    if predicted is not None and predicted * (CALLS_BEFORE_ROUNDS + measure.MIN_ROUNDS) > left:
        raise NotMeasuredError(
            f"a call is predicted to take {predicted:.1f} s, too long to measure"
        )


def _examine(task: measure.Task, oracle: Oracle, device: torch.device) -> dict[str, Any]:
    """Errors and memory."""
    values = task.forward()
    value_error, gradient_error = oracle.errors(values, task.backward(values))
    del values
    return {
        "reason": None,
        "memory": measure.peak_memory(task, device),
        "launches": graphs.launches(task, device),
        "value_error": value_error if math.isfinite(value_error) else None,
        "gradient_error": gradient_error if math.isfinite(gradient_error) else None,
        "wrong": wrong(value_error, gradient_error),
    }


def _drop_the_slowest(
    entry: Entry, tasks: dict[str, measure.Task], estimates: dict[str, float], left: float
) -> None:
    """Until the fewest rounds fit into what is left, leave out what can be done without."""

    def needed(names: Iterable[str]) -> float:
        return measure.MIN_ROUNDS * sum(estimates[name] for name in names)

    least = needed(filter(_essential, tasks))
    # The budget is divided before the sizes are known: some workloads need more than their part.
    if least > 3 * left:
        raise NotMeasuredError(
            f"{measure.MIN_ROUNDS} rounds would take {least:.0f} s; {left:.0f} s were left"
        )
    # What adds little may stay in any case.
    allowed = max(left, 1.2 * least)
    for name in sorted(tasks, key=lambda name: estimates[name], reverse=True):
        if needed(tasks) > allowed and not _essential(name):
            del tasks[name]
            reason = f"a call takes {estimates[name]:.2f} s, too long for the time left"
            entry["results"][name] = {"reason": reason}


def sentence(error: Exception) -> str:
    """The reason as one line."""
    text = next(iter(str(error).splitlines()), "")
    return (
        text
        if isinstance(error, NotMeasuredError | real.UnavailableError)
        else f"{type(error).__name__}: {text}"
    )
