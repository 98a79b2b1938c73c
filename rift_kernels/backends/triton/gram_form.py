"""Launches in Gram form: linear CKA and its gradient.

    gram_cka_small, gram_backward             two launches for up to 24 layers of up to 128 rows
    raw_moments, gram_cka, gram_backward      three for more rows

float32 and float16 features of more rows take one launch more, because their means come first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gram_backward, gram_cka, gram_cka_small, gram_saved, raw_moments
from .config import configuration
from .gram_cka_small import SMALL_GRAM_ROWS
from .gram_saved import Saved
from .launch import padded_width
from .layers import Layers

SAVED = len(Saved._fields)


def cka_fwd(
    layers: Layers, debiased: bool, distance: bool, store: bool
) -> tuple[Tensor, list[Tensor]]:
    """Values, and what :func:`cka_bwd` needs besides the features."""
    config = configuration(layers, "gram")
    values = layers.values()
    small = layers.max_rows <= SMALL_GRAM_ROWS
    saved = gram_saved.allocate(layers, 0 if small else padded_width(layers, config), store)
    settings = {"debiased": debiased, "distance": distance, "store": store}
    if layers.idle:
        return values, list(saved)
    if small:
        gram_cka_small.launch(layers, config, values, saved, **settings)
    else:
        moments = raw_moments.launch(layers, config, "gram", "xx yy", off_diagonal=debiased)
        gram_cka.launch(layers, config, moments, values, saved, **settings)
    return values, list(saved)


def cka_bwd(
    layers: Layers, incoming: Tensor, saved: list[Tensor], side: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """One side's gradients, side 0 being the student."""
    config = configuration(layers, "gram")
    return gram_backward.launch(layers, config, Saved(*saved), incoming, side, dtype)
