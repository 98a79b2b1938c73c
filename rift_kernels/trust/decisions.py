"""What ``auto`` has decided about each kind of call; after the first call, a dictionary look-up."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import self_test
from .verdicts import Kernels


class Kind(NamedTuple):
    """Calls that run the same kernels, or nearly."""

    backend: str
    measure: str  # "cka", "covariance_distance" or "products"
    gram: tuple[bool, ...]  # the form of each layer of CKA
    # Of CKA's layers in Gram form: "gram_cka_small" or "gram_cka", or "" without such layers.
    gram_family: str
    dtypes: tuple[torch.dtype, ...]
    device: torch.device


_decided: dict[Kind, bool] = {}


def is_trusted(kind: Kind, tracing: bool = False) -> bool:
    """Whether ``auto`` uses the kernels of such calls.

    ``tracing``: torch.compile asks.
    """
    decided = _decided.get(kind)
    if decided is not None:
        return decided
    reason, final = self_test.reason_against(kernels_of(kind), kind.device, tracing)
    if final:
        _decided[kind] = reason is None
    return reason is None


def withdraw(kind: Kind, reason: str) -> None:
    """Stop using the kernels of such calls in this process."""
    _decided[kind] = False
    self_test.warn_once(kind, kernels_of(kind), reason)


def kernels_of(kind: Kind) -> tuple[Kernels, ...]:
    """The kernels that such calls run."""
    families = [kind.measure]
    if kind.measure == "cka":
        families = [] if all(kind.gram) else ["covariance_cka"]
        families += [kind.gram_family] if kind.gram_family else []
        # The family is that of the layer with the most rows; those in Gram form may have few.
        families += ["gram_cka_small"] if families == ["covariance_cka", "gram_cka"] else []
    dtypes = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in kind.dtypes)
    return tuple(
        Kernels(kind.backend, family, dtype)
        for family in families
        for dtype in (("float32",) if family == "products" else dtypes)
    )


def forget() -> None:
    """Forget every decision and test result, as if this process had just begun."""
    _decided.clear()
    self_test.forget()
