"""Right or wrong: values and student gradients in float64 of the very same features."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rift_kernels import reference

from .workloads import Inputs, Workload

# A larger error is wrong. Plain bfloat16 arithmetic stays below these; an error beyond means
# another function, or one that has cancelled. The tests say how right ours is.
VALUE_TOLERANCE = 1e-2
GRADIENT_TOLERANCE = 5e-2

# Up to here, the definition itself is affordable.
MAX_ROWS_OF_DEFINITION = 1024

_OTHERS = {
    "procrustes": reference.procrustes_similarity,
    "covariance": reference.covariance_distance,
    "bures": reference.bures_distance,
}


class Oracle:
    """The right answer for one workload's features."""

    def __init__(self, workload: Workload, inputs: Inputs) -> None:
        small = workload.rows <= MAX_ROWS_OF_DEFINITION
        cka = partial(
            reference.linear_cka if small else _large_cka,
            debiased=workload.measure == "cka_debiased",
        )
        function = _OTHERS.get(workload.measure, cka)
        rows = slice(None) if inputs.mask is None else inputs.mask
        values: list[Tensor] = []
        self.gradients: list[Tensor] = []
        for student, teacher in zip(inputs.students, inputs.teachers, strict=True):
            x = student.detach().double().requires_grad_()
            value = function(x[rows], teacher.double()[rows])
            self.gradients += torch.autograd.grad(value, x)
            values.append(value.detach())
        self.values = torch.stack(values)

    def errors(self, values: Tensor, gradients: tuple[Tensor, ...]) -> tuple[float, float]:
        """The largest absolute error of a value, the largest relative error of a gradient."""
        value_error = (values.double() - self.values).abs().max().item()
        gradient_errors = [
            ((gradient.double() - right).norm() / right.norm()).item()
            for gradient, right in zip(gradients, self.gradients, strict=True)
        ]
        # max() of floats may step over a NaN.
        return value_error, torch.tensor(gradient_errors).max().item()


def wrong(value_error: float, gradient_error: float) -> bool:
    # A comparison with NaN is false.
    return not (value_error <= VALUE_TOLERANCE and gradient_error <= GRADIENT_TOLERANCE)


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
