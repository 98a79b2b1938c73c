"""What a GPU alone takes for a call: its time in a CUDA graph, and the kernels that it launches.

A graph has forward and backward of several inputs one after another, together twice as large as the
L2 cache, so that features come from memory, as they do in training. The host has no part in it.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .measure import Task, quantiles_of, synchronize

MOST_COPIES = 16
REPLAYS = 10


def seconds(task: Task, device: torch.device) -> dict[str, float] | None:
    """Quantiles for one forward and backward; None without a GPU.

    Raises:
        RuntimeError: the task cannot be captured, for it waits for the device.
    """
    if device.type != "cuda":
        return None
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(MOST_COPIES, max(2, -(-2 * cache // task.inputs.nbytes)))
    tasks = [task, *(task.on(task.inputs.copy()) for _ in range(count - 1))]
    _warm_up(tasks)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in tasks:
            one.backward(one.forward())
    event: Any = torch.cuda.Event
    marks = [event(enable_timing=True) for _ in range(REPLAYS + 2)]
    for mark in marks:
        mark.record()
        graph.replay()
    synchronize(device)
    # The first replay loads the graph.
    gaps = [start.elapsed_time(end) / 1e3 / count for start, end in itertools.pairwise(marks)]
    return quantiles_of(gaps[1:])


def launches(task: Task, device: torch.device) -> int | None:
    """Kernels and copies of one forward and backward; None without a GPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        task.backward(task.forward())
        synchronize(device)
    return sum(event.device_type.name == "CUDA" for event in profiler.events())


def _warm_up(tasks: list[Task]) -> None:
    """On a stream of its own, as capture wants it."""
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for one in tasks:
            one.backward(one.forward())
    torch.cuda.current_stream().wait_stream(stream)
