"""What a GPU alone takes for a call: its time in a CUDA graph, and the kernels that it launches.

A graph has forward and backward of several inputs one after another, together twice as large as the
L2 cache, so that features come from memory, as they do in training. The host has no part in it.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .measure import Task, quantiles_of, synchronize
from .schema import Quantiles

MOST_COPIES = 16
REPLAYS = 10


def seconds(task: Task, device: torch.device) -> Quantiles | None:
    """The time of one forward and backward; None without a GPU.

    Raises:
        RuntimeError: the task cannot be captured, for it waits for the device.
    """
    if device.type != "cuda":
        return None
    cuda: Any = torch.cuda
    cache = cuda.get_device_properties(device).L2_cache_size
    count = min(MOST_COPIES, max(2, -(-2 * cache // task.inputs.nbytes)))
    copies = (dataclasses.replace(task, inputs=task.inputs.copy()) for _ in range(count - 1))
    tasks = [task, *copies]
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
    # The first replay loads the graph.
    gaps = [start.elapsed_time(end) / 1e3 / count for start, end in itertools.pairwise(marks)]
    return quantiles_of(gaps[1:])


def _run(tasks: list[Task]) -> None:
    for task in tasks:
        task.backward(task.forward())


def launches(task: Task, device: torch.device) -> int | None:
    """The number of kernels and copies of one forward and backward; None without a GPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        _run([task])
        synchronize(device)
    return sum(event.device_type.name == "CUDA" for event in profiler.events())
