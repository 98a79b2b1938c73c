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
    nbytes = sum(t.nbytes for t in (*task.inputs.students, *task.inputs.teachers))
    copies = -(-2 * cuda.get_device_properties(device).L2_cache_size // nbytes)
    tasks = [task, *(_copy(task) for _ in range(min(MOST_COPIES, max(2, copies)) - 1))]
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
    gaps = [a.elapsed_time(b) / 1e3 / len(tasks) for a, b in itertools.pairwise(marks)]
    # The first replay loads the graph.
    return quantiles_of(gaps[1:])


def launches(task: Task, device: torch.device) -> int | None:
    """The number of kernels and copies of one forward and backward; None without a GPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        _run([task])
        synchronize(device)
    return sum(event.device_type.name == "CUDA" for event in profiler.events())


def _copy(task: Task) -> Task:
    """The same in other memory."""
    students = [x.detach().clone().requires_grad_() for x in task.inputs.students]
    teachers = [y.clone() for y in task.inputs.teachers]
    inputs = dataclasses.replace(task.inputs, students=students, teachers=teachers)
    return dataclasses.replace(task, inputs=inputs)


def _run(tasks: list[Task]) -> None:
    for task in tasks:
        task.backward(task.forward())
