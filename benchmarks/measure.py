"""How things are measured: time in interleaved rounds, peak memory, and the machine's two peaks.

Time on a GPU is between events, and so includes the gaps between launches that the host leaves.
Beside it stand the host's own time until the calls return, and the wall time until the device is
done. Every call gets the same features, so that what fits into a cache may still be there; what the
device alone takes, with features that come from memory, graphs.py measures.

Memory is what torch's allocator handed out, above what was allocated before: inputs do not count,
results do. Scratch space that a BLAS library takes for itself is not seen on a CPU.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from .providers import Provider
from .workloads import Inputs

PHASES = ("forward", "backward", "both")
CLOCKS = (*PHASES, "host", "wall")
CPU_TIME = "cpu"
MIN_ROUNDS = 5
QUANTILES = {"q20": 0.2, "q50": 0.5, "q80": 0.8}

Seconds = dict[str, float]


class Timed(Protocol):
    """What has the two phases that are timed."""

    def forward(self) -> Tensor: ...

    def backward(self, values: Tensor, /) -> object: ...


class Task:
    """One provider's computation, on given features."""

    def __init__(self, provider: Provider, measure: str, inputs: Inputs) -> None:
        self.name = provider.name
        self._values, self._settings = provider.measures[measure], provider.settings
        self.inputs = inputs

    def forward(self) -> Tensor:
        with self._settings():
            return self._values(self.inputs)

    def backward(self, values: Tensor) -> tuple[Tensor, ...]:
        with self._settings():
            return torch.autograd.grad(values, self.inputs.students, torch.ones_like(values))

    def on(self, inputs: Inputs) -> Task:
        """The same computation on others."""
        other = copy.copy(self)
        other.inputs = inputs
        return other


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(task: Timed, device: torch.device) -> Seconds:
    """Seconds of each clock for one forward and backward, and of the process's CPU time."""
    synchronize(device)
    busy = time.process_time()
    marks = [_Mark(device)]
    values = task.forward()
    marks.append(_Mark(device))
    task.backward(values)
    marks.append(_Mark(device))
    returned = time.perf_counter()
    synchronize(device)
    start, middle, end = marks
    return {
        "forward": middle.since(start),
        "backward": end.since(middle),
        "both": end.since(start),
        "host": returned - start.host,
        "wall": time.perf_counter() - start.host,
        # In which nothing is that other processes take.
        CPU_TIME: time.process_time() - busy,
    }


class _Mark:
    """A point in time: on a GPU, when the device has come to it."""

    def __init__(self, device: torch.device) -> None:
        self.host = time.perf_counter()
        self._event: Any = None
        if device.type == "cuda":
            event: Any = torch.cuda.Event
            self._event = event(enable_timing=True)
            self._event.record()

    def since(self, earlier: _Mark) -> float:
        """Seconds; on a GPU both marks have been passed."""
        if self._event is None:
            return self.host - earlier.host
        return earlier._event.elapsed_time(self._event) / 1e3


def time_rounds(
    tasks: Mapping[str, Timed], device: torch.device, deadline: float, max_rounds: int
) -> dict[str, list[Seconds]]:
    """Every task once a round, each round starting with another, until ``deadline``.

    Whatever disturbs the machine thus disturbs all of them. There are at least ``MIN_ROUNDS``.
    """
    samples: dict[str, list[Seconds]] = {name: [] for name in tasks}
    names = deque(tasks)
    for done in range(max_rounds):
        if done >= MIN_ROUNDS and time.monotonic() > deadline:
            break
        for name in names:
            samples[name].append(time_once(tasks[name], device))
        names.rotate(-1)
    return samples


def quantiles(samples: list[Seconds]) -> dict[str, dict[str, float]]:
    """Clock -> quantile -> seconds."""
    return {clock: quantiles_of([sample[clock] for sample in samples]) for clock in CLOCKS}


def quantiles_of(seconds: list[float]) -> dict[str, float]:
    found = torch.tensor(seconds, dtype=torch.float64)
    return {name: found.quantile(q).item() for name, q in QUANTILES.items()}


def relative(samples: list[Seconds], base: list[Seconds]) -> dict[str, float]:
    """The median over rounds of the ratio to another task in the same round, and how sure it is.

    Whatever slows the machine for longer than a round is in both and cancels. ``low`` and ``high``
    hold the median of all such rounds with 95 %, whatever their distribution (order statistics).
    """
    pairs = zip(samples, base, strict=True)
    return middle_of([own["both"] / other["both"] for own, other in pairs])


def added(
    more: list[Seconds], less: list[Seconds] | None, whole: list[Seconds], clock: str = "both"
) -> dict[str, float]:
    """How much longer one task takes than another, as a share of a third in the same round.

    Without another, how long it takes at all. Bounds as of :func:`relative`.
    """
    less = less or [{clock: 0.0}] * len(more)
    rounds = zip(more, less, whole, strict=True)
    return middle_of([(m[clock] - n[clock]) / w[clock] for m, n, w in rounds])


def middle_of(values: list[float]) -> dict[str, float]:
    """A median, and bounds that hold that of many more with 95 %, whatever their distribution."""
    values = sorted(values)
    count = len(values)
    outside = max(0, math.floor((count - 1.96 * math.sqrt(count)) / 2))
    middle = torch.tensor(values, dtype=torch.float64).quantile(0.5).item()
    return {"low": values[outside], "q50": middle, "high": values[count - 1 - outside]}


def noise(once: list[float], again: list[float]) -> float:
    """How far apart two medians of the same step may be, relative.

    Those of one step timed twice may agree by chance, and what is looked for is small, so at
    least two standard errors of such a difference: for a normal distribution, about twice the range
    from the 20th to the 80th percentile over the root of the number of rounds.
    """
    first, second, all_of_them = map(quantiles_of, (once, again, once + again))
    spread = 2 * (all_of_them["q80"] - all_of_them["q20"]) / len(once) ** 0.5
    return max(abs(second["q50"] / first["q50"] - 1), spread / all_of_them["q50"])


def peak_memory(task: Timed, device: torch.device) -> dict[str, int]:
    """Bytes at the peak of each phase; what the forward keeps counts in the backward."""
    peaks = _peaks_on_gpu(task, device) if device.type == "cuda" else _peaks_on_cpu(task)
    forward, backward = peaks
    return {"forward": forward, "backward": backward, "both": max(peaks)}


def kept_memory(task: Timed, device: torch.device) -> int:
    """Bytes that a forward leaves: what it returns, and what it keeps for its backward."""
    return peak_memory(_OnlyForward(task), device)["backward"]


class _OnlyForward:
    """A task whose backward never comes."""

    def __init__(self, task: Timed) -> None:
        self.forward = task.forward

    def backward(self, _values: object) -> None:
        """Nothing, while the forward's values are there."""


def _peaks_on_gpu(task: Timed, device: torch.device) -> tuple[int, int]:
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    values = task.forward()
    forward = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    task.backward(values)
    return forward - before, torch.cuda.max_memory_allocated(device) - before


def _peaks_on_cpu(task: Timed) -> tuple[int, int]:
    """The largest running sum of the allocations and releases that torch's profiler records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with record_function("benchmark_forward"):
            values = task.forward()
        with record_function("benchmark_backward"):
            task.backward(values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    (middle,) = (event["ts"] for event in events if event.get("name") == "benchmark_backward")
    changes = [event for event in events if event.get("name") == "[memory]"]
    allocated = forward = backward = 0
    for change in sorted(changes, key=lambda event: event["ts"]):
        allocated += change["args"]["Bytes"]
        if change["ts"] < middle:
            forward = max(forward, allocated)
            # The backward starts from what the forward leaves.
            backward = allocated
        else:
            backward = max(backward, allocated)
    return forward, backward


def matmul_peak(dtype: torch.dtype, width: int, device: torch.device) -> float:
    """FLOP/s of a large square product, the best of a few."""
    a = torch.randn(width, width, device=device).to(dtype)
    b = torch.randn(width, width, device=device).to(dtype)
    return 2 * width**3 / _best(lambda: a @ b, device)


def copy_bandwidth(mebibytes: int, device: torch.device) -> float:
    """Bytes/s read and written by a copy, the best of a few."""
    source = torch.rand(mebibytes << 18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def _best(function: Callable[[], Tensor], device: torch.device, repeats: int = 10) -> float:
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    # The first one warms up.
    return min(seconds[1:])
