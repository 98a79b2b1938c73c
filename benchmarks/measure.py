"""How things are measured: time in interleaved rounds, peak memory, and the machine's two peaks.

Time on a GPU is between events, and so includes the gaps between launches that the host leaves.
Beside it stand the host's own time until the calls return, and the wall time until the device is
done. All calls get the same features, which may still be in a cache; CUDA graphs get others in
turn, and the host has no part in them.

Memory is what torch's allocator handed out, above what was allocated before: inputs do not count,
results do. Scratch space that a BLAS library takes for itself is not seen on a CPU.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from .providers import Provider
from .schema import Bounds, Quantiles
from .workloads import Inputs

PHASES = ("forward", "backward", "both")
CPU_TIME = "cpu"
CLOCKS = (*PHASES, "host", "wall", CPU_TIME)
MIN_ROUNDS = 5
MOST_COPIES, REPLAYS = 16, 10  # in a CUDA graph

Seconds = dict[str, float]


class Timed(Protocol):
    """The two phases that are timed."""

    def forward(self) -> Tensor: ...
    def backward(self, values: Tensor, /) -> object: ...


class Call(NamedTuple):
    """Two functions as phases; the second may do nothing."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], object] = lambda _: None


@dataclass(frozen=True)
class Task:
    """A provider's computation, on some features."""

    provider: Provider
    measure: str
    inputs: Inputs

    def forward(self) -> Tensor:
        with self.provider.settings():
            return self.provider.measures[self.measure](self.inputs)

    def backward(self, values: Tensor) -> tuple[Tensor, ...]:
        with self.provider.settings():
            return torch.autograd.grad(values, self.inputs.students, torch.ones_like(values))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(task: Timed, device: torch.device) -> Seconds:
    """Seconds of each clock for one forward and backward."""

    def mark() -> Any:
        """A point in time: on a GPU, when the device has come to it."""
        if device.type != "cuda":
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(first: Any, last: Any) -> float:
        return first.elapsed_time(last) / 1e3 if device.type == "cuda" else last - first

    synchronize(device)
    busy, called, start = time.process_time(), time.perf_counter(), mark()
    values, middle = task.forward(), mark()
    task.backward(values)
    end, returned = mark(), time.perf_counter()
    synchronize(device)
    return {
        "forward": between(start, middle),
        "backward": between(middle, end),
        "both": between(start, end),
        "host": returned - called,
        "wall": time.perf_counter() - called,
        CPU_TIME: time.process_time() - busy,  # which excludes other processes
    }


def time_rounds(
    tasks: Mapping[str, Timed], device: torch.device, deadline: float, max_rounds: int
) -> dict[str, list[Seconds]]:
    """Every task once a round, each round starting with another, until ``deadline``.

    Whatever disturbs the machine thus disturbs all tasks. There are at least ``MIN_ROUNDS``.
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


def quantiles(samples: list[Seconds]) -> dict[str, Quantiles]:
    """Clock -> seconds; nothing of nothing."""
    clocks = CLOCKS if samples else ()
    return {clock: quantiles_of([sample[clock] for sample in samples]) for clock in clocks}


def quantiles_of(seconds: list[float]) -> Quantiles:
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Quantiles(*torch.tensor(seconds, dtype=torch.float64).quantile(shares).tolist())


def relative(samples: list[Seconds], base: list[Seconds]) -> Bounds:
    """The ratio to another task in the same round; what slows a whole round cancels."""
    return added(samples, None, base)


def added(
    more: list[Seconds], less: list[Seconds] | None, whole: list[Seconds], clock: str = "both"
) -> Bounds:
    """How much longer one task takes than another, as a share of a third in the same round.

    Without another, how long it takes at all.
    """
    less = less or [{clock: 0.0}] * len(more)
    rounds = zip(more, less, whole, strict=True)
    return bounds_of([(m[clock] - n[clock]) / w[clock] for m, n, w in rounds])


def bounds_of(values: list[float]) -> Bounds:
    """A median, and bounds that hold the median of many more values with 95 %.

    These are order statistics, which suppose nothing about the distribution.
    """
    values = sorted(values)
    outside = max(0, math.floor((len(values) - 1.96 * math.sqrt(len(values))) / 2))
    return Bounds(values[outside], statistics.median(values), values[-1 - outside])


def noise(once: list[Seconds], again: list[Seconds], clock: str) -> float:
    """How far apart two medians of the same step may be, relative.

    They may agree by chance. So this is at least two standard errors of their difference: about
    twice the range from the 20th to the 80th percentile over the root of the number of rounds.
    """
    first, second = ([sample[clock] for sample in samples] for samples in (once, again))
    together = quantiles_of(first + second)
    spread = 2 * (together.q80 - together.q20) / len(first) ** 0.5 / together.q50
    return max(abs(quantiles_of(second).q50 / quantiles_of(first).q50 - 1), spread)


def graph_seconds(task: Task, device: torch.device) -> Quantiles | None:
    """The time that a GPU alone takes for one forward and backward; None without a GPU.

    A task that waits for the device raises: it cannot be captured.
    """
    if device.type != "cuda":
        return None
    cuda: Any = torch.cuda
    tasks = in_turn(task, device)
    # Capture wants a warm-up on a stream of its own.
    stream = cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        _run(tasks)
    cuda.current_stream().wait_stream(stream)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        _run(tasks)
    marks = [cuda.Event(enable_timing=True) for _ in range(REPLAYS + 2)]
    for mark in marks:
        mark.record()
        graph.replay()
    synchronize(device)
    gaps = [a.elapsed_time(b) / 1e3 / len(tasks) for a, b in pairwise(marks)]
    # The first replay loads the graph.
    return quantiles_of(gaps[1:])


def in_turn(task: Task, device: torch.device) -> list[Task]:
    """The task, and copies of it with features of their own.

    Together, these are twice as large as the L2 cache, so that features come from memory, as they
    do in training.
    """
    inputs = task.inputs
    nbytes = sum(t.nbytes for t in (*inputs.students, *inputs.teachers))
    copies = -(-2 * torch.cuda.get_device_properties(device).L2_cache_size // nbytes)
    tasks = [task]
    for _ in range(min(MOST_COPIES, max(2, copies)) - 1):
        students = [x.detach().clone().requires_grad_() for x in inputs.students]
        teachers = [y.clone() for y in inputs.teachers]
        other = dataclasses.replace(inputs, students=students, teachers=teachers)
        tasks.append(dataclasses.replace(task, inputs=other))
    return tasks


def launches(task: Timed, device: torch.device) -> int | None:
    """The number of kernels and copies of one forward and backward; None without a GPU."""
    return len(device_events([task], device)) if device.type == "cuda" else None


def device_events(tasks: Sequence[Timed], device: torch.device) -> list[Any]:
    """Kernels and copies of forward and backward, as torch's profiler sees them."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        _run(tasks)
        synchronize(device)
    return [event for event in profiler.events() if event.device_type.name == "CUDA"]


def _run(tasks: Sequence[Timed]) -> None:
    for task in tasks:
        task.backward(task.forward())


def peak_memory(task: Timed, device: torch.device) -> dict[str, int]:
    """Bytes at the peak of each phase; what the forward keeps counts in the backward."""
    peaks = _peaks_on_gpu(task, device) if device.type == "cuda" else _peaks_on_cpu(task)
    return dict(zip(PHASES, (*peaks, max(peaks)), strict=True))


def kept_memory(forward: Callable[[], Tensor], device: torch.device) -> int:
    """Bytes that a forward leaves: what it returns, and what it keeps for its backward."""
    return peak_memory(Call(forward), device)["backward"]


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
        values = task.forward()
        with record_function("benchmark_backward"):
            task.backward(values)
    results: Any = profiler.profiler
    events = sorted(results.kineto_results.events(), key=lambda event: event.start_ns())
    names = [event.name() for event in events]
    changes = [event.nbytes() if event.name() == "[memory]" else 0 for event in events]
    allocated = list(accumulate(changes, initial=0))
    # The backward starts from what the forward leaves.
    middle = names.index("benchmark_backward") + 1
    return max(allocated[:middle]), max(allocated[middle - 1 :])


def matmul_peak(dtype: torch.dtype, width: int, device: torch.device) -> float:
    """FLOP/s of a large square product, the best of a few."""
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    return 2 * width**3 / _best(lambda: a @ b, device)


def copy_bandwidth(mebibytes: int, device: torch.device) -> float:
    """Bytes/s read and written by a copy, the best of a few."""
    source = torch.rand(mebibytes << 18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def _best(function: Callable[[], Tensor], device: torch.device, repeats: int = 10) -> float:
    """Seconds of the fastest call after one that warms up."""
    seconds = [time_once(Call(function), device)["wall"] for _ in range(repeats + 1)]
    return min(seconds[1:])
