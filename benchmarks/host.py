"""``python -m benchmarks.host``: where the host's microseconds go in a small call.

Linear CKA of 64 x 768, loss and gradient, in stages that contain one another; medians of many calls
that wait for nothing. Without a GPU, the CUDA backend runs with launches that do nothing: what is
left is what Python, torch and pybind11 cost on this machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import rift_kernels as rk
from rift_kernels.backends import cuda
from rift_kernels.dispatch import availability, plan

from . import tables

ROWS, WIDTH, SECONDS = 64, 768, 0.5

Call = Callable[[], object]


class _Identity(torch.autograd.Function):
    """The least that a differentiable function of one input costs."""

    @staticmethod
    def forward(_ctx: Any, _x: Tensor, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor, None]:
        return ctx.grad, None


@contextmanager
def without_launches() -> Iterator[None]:
    """The whole CUDA backend on CPU tensors, but for what the GPU would do."""
    launch = SimpleNamespace(cluster=True)
    extension = SimpleNamespace(
        cka_small_plan=lambda *_: launch, cka_small=lambda *_: None, scale=lambda *_: None
    )
    with (
        mock.patch.object(plan, "choose_backend", return_value="cuda"),
        mock.patch.object(cuda, "extension", return_value=extension),
        mock.patch.object(cuda, "_stream", return_value=0),
        mock.patch.object(cuda, "_plan", return_value=launch),
    ):
        yield


def stages(backend: str, device: torch.device) -> dict[str, Call]:
    """Calls that each contain the one before, from the backend's own function to the whole."""
    x, y = torch.randn(2, ROWS, WIDTH, device=device).bfloat16()
    student = x.clone().requires_grad_()
    arguments: tuple[Any, ...] = ([x], [y], [], [True], True, False, "highest")
    backend_forward: Any = cuda.cka_fwd
    operator = torch.ops.rift_kernels.cka_fwd

    def loss(features: Tensor) -> Tensor:
        return rk.linear_cka(features, y, backend=backend)

    calls: dict[str, Call] = {
        "its own function": lambda: backend_forward(*arguments, True, False),
        "the operator": lambda: operator(*arguments, backend, backend != "eager", True, False),
        "linear_cka without a gradient": lambda: loss(x),
        "linear_cka": lambda: loss(student),
        "linear_cka and its backward": lambda: torch.autograd.grad(loss(student), student),
    }
    return calls if backend == "cuda" else dict(list(calls.items())[1:])


def floor(device: torch.device) -> Call:
    student = torch.zeros(ROWS, WIDTH, device=device, requires_grad=True)
    out, grad = torch.zeros((), device=device), torch.zeros(ROWS, WIDTH, device=device)

    def call() -> object:
        value = _Identity.apply(student, out)  # type: ignore[no-untyped-call,unused-ignore]
        value.grad_fn.grad = grad
        return torch.autograd.grad(value, student)

    return call


def microseconds(call: Call) -> str:
    """The median of a call's time on the host."""
    timer = Timer("call()", globals={"call": call}, timer=time.perf_counter)
    return f"{timer.blocked_autorange(min_run_time=SECONDS).median * 1e6:.1f}"


def table() -> str:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    rows = [["an autograd.Function of one input", microseconds(floor(device))]]
    for backend in availability.BACKENDS:
        if availability.reason_against(backend) is None:
            calls = stages(backend, device).items()
            rows += [[f"{backend}: {name}", microseconds(call)] for name, call in calls]
    if not on_gpu:
        with without_launches():
            calls = stages("cuda", device).items()
            rows += [[f"cuda without launches: {name}", microseconds(call)] for name, call in calls]
    return tables.markdown([f"{ROWS} x {WIDTH} bfloat16", "us on the host"], rows)


def main() -> int:
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
