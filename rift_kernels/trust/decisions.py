"""What ``auto`` has decided about calls of a kind: a look into a dictionary, but for the first."""

from __future__ import annotations

import torch

from . import self_test
from .verdicts import Kernels

# A backend, what it computes, for CKA each layer's form and the family of those in Gram form,
# dtypes, a device.
Kind = tuple[str, str, tuple[bool, ...], str, tuple[torch.dtype, ...], torch.device]
_decided: dict[Kind, bool] = {}


def is_trusted(kind: Kind, tracing: bool = False) -> bool:
    """Whether ``auto`` uses the kernels of such calls.

    ``tracing``: torch.compile asks.
    """
    known = _decided.get(kind)
    if known is not None:
        return known
    reason, final = self_test.reason_against(kernels_of(kind), kind[-1], tracing)
    if final:
        _decided[kind] = reason is None
    return reason is None


def withdraw(kind: Kind, reason: str) -> None:
    """Use the kernels of such calls no more, in this process."""
    _decided[kind] = False
    self_test.say_once(kind, kernels_of(kind), reason)


def kernels_of(kind: Kind) -> tuple[Kernels, ...]:
    """The kernels that such calls run."""
    backend, measure, gram, few, dtypes, _ = kind
    families = [measure]
    if measure == "cka":
        families = [] if all(gram) else ["covariance"]
        families += [few] if few else []
        # Of both forms, those of the Gram form may have fewer rows than the others.
        families += ["small"] if families == ["covariance", "gram"] else []
    names = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return tuple(
        Kernels(backend, family, name)
        for family in families
        for name in (("float32",) if family == "products" else names)
    )


def forget() -> None:
    """Know nothing, as a process that begins."""
    _decided.clear()
    self_test.forget()
