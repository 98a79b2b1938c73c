"""``python -m benchmarks.kernel_times``: a GPU's microseconds in each kernel of a loss.

Biased linear CKA of bfloat16 features, forward and student gradient, as torch's profiler sees it;
docs/kernels.md has a floor for each launch of Triton's. torch.mm of X^T [X Y] stands beside, which
has as many products as the moments.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch

from rift_kernels.backends import cuda

from . import kernel_tables, measure, performance
from .measure import Call, Task, Timed
from .providers import OURS, Provider, providers
from .tables import markdown
from .workloads import BFLOAT16, Workload, features

GPU = torch.device("cuda")
OUR_KERNELS = "|".join(name for _, name in kernel_tables.defined())


def candidates() -> list[Provider]:
    """Our backends with kernels, and the CUDA kernels for any GPU, which Hopper runs, too."""
    ours = {p.name: p for p in providers(GPU, compiled=()) if p.name.startswith(OURS)}
    del ours[f"{OURS}eager"]
    hopper = ours[f"{OURS}cuda"]
    general: Any = partial(mock.patch.object, cuda, "_is_hopper", return_value=False)
    return [*ours.values(), replace(hopper, name=f"{hopper.name}, any GPU's", settings=general)]


def microseconds(tasks: Sequence[Timed]) -> Counter[str]:
    """Kernel -> its time in one task; ours by the names in the sources, others together."""
    measure.device_events(tasks, GPU)  # compiles
    times = Counter[str]()
    for event in measure.device_events(tasks, GPU):
        name = re.search(rf"\b({OUR_KERNELS})_kernel\b", event.name)
        times[name[1] if name else "others"] += event.self_device_time_total / len(tasks)
    return times


def main() -> int:
    able = [provider for provider in candidates() if provider.reason is None]
    if not able:
        print(f"kernel_times is not done: {candidates()[0].reason}")
        return 0
    rows = []
    for n, d, layers, _ in performance.SHAPES:
        workload = Workload("cka_biased", n, d, BFLOAT16, layers)
        inputs = features(workload, GPU)
        for provider in (provider for provider in able if provider.can_do(workload)):
            tasks = measure.in_turn(Task(provider, workload.measure, inputs), GPU)
            for kernel, time in microseconds(tasks).items():
                rows.append([workload.shape, provider.name, kernel, f"{time:.1f}"])
        if layers == 1:
            x, y = inputs.students[0].detach(), inputs.teachers[0]
            product = Call(partial(torch.mm, x.T, torch.cat([x, y], 1)))
            rows.append([workload.shape, "torch.mm", "", f"{microseconds([product]).total():.1f}"])
    print(markdown(["features", "by", "kernel", "us"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
