"""Right or wrong: values and student gradients in float64 of the very same features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rift_kernels import reference

from .workloads import Inputs, Workload

# More than these is wrong. Plain bfloat16 arithmetic stays below them; an error beyond means
# another function, or one that has cancelled. How right ours is, the tests say.
VALUE_TOLERANCE = 1e-2
GRADIENT_TOLERANCE = 5e-2

# Up to here the definition itself is affordable.
MAX_ROWS_OF_DEFINITION = 1024


class Oracle:
    """The right answer for one workload's features."""

    def __init__(self, workload: Workload, inputs: Inputs) -> None:
        function = _function(workload)
        rows = slice(None) if inputs.mask is None else inputs.mask
        values: list[Tensor] = []
        gradients: list[Tensor] = []
        for student, teacher in zip(inputs.students, inputs.teachers, strict=True):
            x = student.detach().double().requires_grad_()
            value = function(x[rows], teacher.double()[rows])
            gradients += torch.autograd.grad(value, x)
            values.append(value.detach())
        self.values, self.gradients = torch.stack(values), gradients

    def errors(self, values: Tensor, gradients: tuple[Tensor, ...]) -> tuple[float, float]:
        """The largest absolute error of a value, the largest relative error of a gradient."""
        value_error = (values.double() - self.values).abs().max().item()
        gradient_errors = [
            ((got.double() - right).norm() / right.norm()).item()
            for got, right in zip(gradients, self.gradients, strict=True)
        ]
        # max() of floats may step over a NaN.
        return value_error, torch.tensor(gradient_errors).max().item()


def wrong(value_error: float, gradient_error: float) -> bool:
    # A comparison with NaN is false.
    return not (value_error <= VALUE_TOLERANCE and gradient_error <= GRADIENT_TOLERANCE)


def _function(workload: Workload) -> Callable[[Tensor, Tensor], Tensor]:
    if workload.measure == "procrustes":
        return reference.procrustes_similarity
    if workload.measure == "covariance":
        return reference.covariance_distance
    if workload.measure == "bures":
        return reference.bures_distance
    debiased = workload.measure == "cka_debiased"
    if workload.rows <= MAX_ROWS_OF_DEFINITION:
        return lambda x, y: reference.linear_cka(x, y, debiased=debiased)
    return lambda x, y: _large_cka(x, y, debiased)


def _large_cka(x: Tensor, y: Tensor, debiased: bool) -> Tensor:
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
