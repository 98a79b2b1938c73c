"""The benchmarks' oracle: values and student gradients of the same features in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rift_kernels import reference

from .workloads import Inputs, Workload

# A larger error is wrong. Plain bfloat16 arithmetic stays below these; an error beyond means
# another function, or one that has cancelled. The tests say how right ours is.
VALUE_TOLERANCE = 1e-2
GRADIENT_TOLERANCE = 5e-2


def cka(x: Tensor, y: Tensor, debiased: bool) -> Tensor:
    """Linear CKA without N x N matrices; safe in float64, where nothing cancels that matters."""
    n = len(x)

    def hsic(x: Tensor, y: Tensor) -> Tensor:
        value = (x.T @ y).square().sum()
        if not debiased:
            return value
        r, q = x.square().sum(1), y.square().sum(1)
        return value - n / (n - 2) * (r @ q) + r.sum() * q.sum() / ((n - 1) * (n - 2))

    x, y = x - x.mean(0), y - y.mean(0)
    return hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cka_biased": partial(cka, debiased=False),
    "cka_debiased": partial(cka, debiased=True),
    "procrustes": reference.procrustes_similarity,
    "covariance": reference.covariance_distance,
    "bures": reference.bures_distance,
}


class Oracle:
    """The right answer for one workload's features."""

    def __init__(self, workload: Workload, inputs: Inputs) -> None:
        rows = slice(None) if inputs.mask is None else inputs.mask
        students = [x.detach().double().requires_grad_() for x in inputs.students]
        pairs = zip(students, inputs.teachers, strict=True)
        values = [FUNCTIONS[workload.measure](x[rows], y.double()[rows]) for x, y in pairs]
        self.values = torch.stack(values).detach()
        self.gradients = torch.autograd.grad(torch.stack(values).sum(), students)

    def errors(self, values: Tensor, gradients: tuple[Tensor, ...]) -> tuple[float, float]:
        """The largest absolute error of a value, the largest relative error of a gradient."""
        pairs = zip(gradients, self.gradients, strict=True)
        relative = [(gradient.double() - right).norm() / right.norm() for gradient, right in pairs]
        # max() of floats may step over a NaN.
        gradient_error = torch.stack(relative).max().item()
        return (values.double() - self.values).abs().max().item(), gradient_error


def wrong(value_error: float, gradient_error: float) -> bool:
    # A comparison with NaN is false.
    return not (value_error <= VALUE_TOLERANCE and gradient_error <= GRADIENT_TOLERANCE)
