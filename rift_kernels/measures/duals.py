"""What Procrustes and Bures share: each is the other with rows and columns exchanged."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import matrix_functions
from .centered import Centered


def polar(
    features: Centered, backend: ModuleType, gram: bool, exact: bool
) -> tuple[Tensor, Tensor]:
    """Polar factor and nuclear norm of the cross block."""
    _, xy, _ = features.ranks.blocks(*backend.moments(features.x, features.y, gram, "xy"))()
    if exact:
        return matrix_functions.polar_svd(xy.double())
    return matrix_functions.polar(xy.double(), backend)


def transport(
    features: Centered, backend: ModuleType, gram: bool, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Transport maps between the own blocks, and their fidelity.

    The blocks are summed in float64: the map inverts one of them, and where that is singular the
    rounding of a float32 sum would be what is inverted.
    """
    xx, _, yy = features.ranks.blocks(
        *backend.moments(features.x.double(), features.y.double(), gram, "xx yy")
    )()
    if exact:
        return matrix_functions.transport_eigh(xx, yy)
    return matrix_functions.transport(xx, yy, backend)
