"""Launches in covariance form: linear CKA, the covariance distance, and the gradients of both.

    raw_moments, covariance_cka, covariance_backward        three launches for up to 24 layers
    raw_moments, covariance_distance, covariance_backward

float32 and float16 features take one launch more, because their means come first. Debiased CKA
takes another, which finds long rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import (
    covariance_backward,
    covariance_cka,
    covariance_distance,
    covariance_saved,
    longest,
    raw_moments,
)
from .config import configuration
from .covariance_saved import Saved
from .layers import Layers

SAVED = len(Saved._fields)


def cka_fwd(
    layers: Layers, debiased: bool, distance: bool, student: bool, teacher: bool, low_halves: bool
) -> tuple[Tensor, list[Tensor]]:
    """Values, and what :func:`cka_bwd` needs besides the features.

    ``low_halves``: the backward may multiply them, and does so where their products matter.
    """
    config = configuration(layers, "covariance")
    values = layers.values()
    saved = covariance_saved.allocate(layers, config, (2 * student, 2 * teacher), debiased)
    if not layers.idle:
        if debiased:
            longest.launch(layers, config, saved.longest)
        moments = raw_moments.launch(
            layers, config, "covariance", "xx xy yy", longest=saved.longest if debiased else None
        )
        covariance_cka.launch(
            layers, config, moments, values, saved,
            debiased=debiased, distance=distance, student=student, teacher=teacher,
            low_halves=low_halves,
        )  # fmt: skip
    return values, list(saved)


def covariance_fwd(
    layers: Layers, scale: str, mean_weight: float, student: bool, teacher: bool
) -> tuple[Tensor, list[Tensor]]:
    """The covariance distance, and what :func:`covariance_bwd` needs besides the features."""
    config = configuration(layers, "covariance")
    values = layers.values()
    # In the relative distance, the teacher's gradient has two terms.
    matrices = int(student), teacher * (2 if scale == "relative" else 1)
    saved = covariance_saved.allocate(layers, config, matrices)
    if not layers.idle:
        moments = raw_moments.launch(layers, config, "covariance", "xx yy")
        covariance_distance.launch(
            layers, config, moments, values, saved,
            scale=scale, mean_weight=mean_weight, student=student, teacher=teacher,
        )  # fmt: skip
    return values, list(saved)


def cka_bwd(
    layers: Layers, incoming: Tensor, saved: list[Tensor], side: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """One side's gradients of CKA, side 0 being the student."""
    config = configuration(layers, "covariance")
    # The forward sums the student's shift over whole blocks, the teacher's over parts of them.
    step = config.block if side == 0 else config.sub
    return covariance_backward.launch(
        layers, config, Saved(*saved), incoming, side, dtype,
        near=layers.x.widths == layers.y.widths, bias=False, shift_step=step,
    )  # fmt: skip


def covariance_bwd(
    layers: Layers, incoming: Tensor, saved: list[Tensor], side: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """One side's gradients of the covariance distance, side 0 being the student."""
    config = configuration(layers, "covariance")
    return covariance_backward.launch(
        layers, config, Saved(*saved), incoming, side, dtype,
        near=False, bias=True, shift_step=config.sub,
    )  # fmt: skip
