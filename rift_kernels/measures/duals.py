"""The parts that Procrustes and Bures share; each is the other with rows and columns swapped."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import matrix_functions
from .centering import CenteredFeatures
from .sums_over_ranks import sum_blocks_over_ranks


def polar(
    features: CenteredFeatures, primitives: ModuleType, gram: bool, exact: bool
) -> tuple[Tensor, Tensor]:
    """Polar factor and nuclear norm of the cross block."""
    _, xy, _ = sum_blocks_over_ranks(
        features.ranks, *primitives.moments(features.x, features.y, gram, "xy")
    )()
    if exact:
        return matrix_functions.polar_svd(xy.double())
    return matrix_functions.polar(xy.double(), primitives)


def transport(
    features: CenteredFeatures, primitives: ModuleType, gram: bool, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Transport maps between the blocks of X and of Y, and their fidelity.

    The blocks are summed in float64: the map inverts one of them, and if that is singular, it would
    invert the rounding of a float32 sum.
    """
    xx, _, yy = sum_blocks_over_ranks(
        features.ranks, *primitives.moments(features.x.double(), features.y.double(), gram, "xx yy")
    )()
    if exact:
        return matrix_functions.transport_eigh(xx, yy)
    return matrix_functions.transport(xx, yy, primitives)
