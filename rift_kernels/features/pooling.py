"""From a layer's output to rows: the poolings, and the mask that selects tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rift_kernels.dispatch import checks

POOLINGS = ("cls", "mean", "tokens", "last")
Pooling = str | Callable[[Tensor, Tensor | None], Tensor]


def check_pooling(pooling: object) -> None:
    """Check that ``pooling`` is one of the names, or callable."""
    if not callable(pooling) and pooling not in POOLINGS:
        raise ValueError(
            f"pooling must be one of {', '.join(map(repr, POOLINGS))}, or a function of a layer's "
            f"output and its mask that returns (rows, D); got {pooling!r}"
        )


def pool(name: str, x: Tensor, pooling: Pooling, mask: Tensor | None) -> Tensor:
    """A layer's output as rows (rows, D)."""
    if not isinstance(pooling, str):
        if mask is not None:
            check_token_mask(mask)
        return _checked_rows(name, x, pooling(x, mask))
    if not x.is_floating_point():
        raise TypeError(f"the output of layer {name!r} must be floating point; got {x.dtype}")
    if x.dim() not in (2, 3, 4, 5):
        raise ValueError(
            f"the output of layer {name!r} must be (batch, tokens, D), (batch, D), "
            f"(batch, C, H, W) or (batch, C, T, H, W); got {tuple(x.shape)}: pooling may be a "
            "function of it that returns (rows, D)"
        )
    if mask is not None:
        check_token_mask(mask, name, x, pooling in ("mean", "last"))
    if x.dim() == 2:
        return x
    if x.dim() > 3:
        if pooling in ("cls", "last"):
            axes = "(batch, C, H, W)" if x.dim() == 4 else "(batch, C, T, H, W)"
            raise ValueError(
                f"pooling must be 'mean' or 'tokens' for {axes}, which has no first or last token; "
                f"got {pooling!r} for layer {name!r} with output {tuple(x.shape)}"
            )
        x = x.flatten(2).transpose(1, 2)
    if pooling == "tokens":
        return x.flatten(0, 1)
    if pooling == "mean":
        return mean_over_tokens(x, mask)
    return x[:, 0] if pooling == "cls" else last_tokens(x, mask)


def mean_over_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the valid tokens, accumulated in at least float32, in the dtype of ``x``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mask is None:
        return x.mean(1, dtype=dtype).to(x.dtype)
    total = x.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1, dtype=dtype)
    return (total / mask.sum(1, dtype=dtype).unsqueeze(-1)).to(x.dtype)


def last_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """The last valid token of each row, whether padding is left or right; NaN without one."""
    if mask is None:
        return x[:, -1]
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, 0).amax(1)  # without reading the mask on the host
    rows = x.take_along_dim(last[:, None, None], 1).squeeze(1)
    return rows.masked_fill(~mask.any(1, keepdim=True), float("nan"))


def check_token_mask(
    mask: object, layer: str = "", output: Tensor | None = None, every_row: bool = False
) -> None:
    """Check that ``mask`` is boolean (batch, tokens), and that it fits a layer's output, if given.

    An output (batch, D) has no tokens, so it takes any mask. With ``every_row``, each row of
    (batch, tokens, D) must have a valid token.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a boolean tensor or None; got {type(mask).__name__}")
    if mask.is_floating_point():
        raise TypeError(
            f"mask must be boolean, True = valid; got {mask.dtype}, which has two opposite "
            "meanings: give mask == 0 for an additive mask (0 = valid, -inf = padding), "
            "mask.bool() for 0 and 1 (1 = valid)"
        )
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be boolean, True = valid; got {mask.dtype} (for 0 and 1: mask.bool())"
        )
    if mask.dim() != 2:
        raise ValueError(f"mask must be (batch, tokens); got {tuple(mask.shape)}")
    if output is None or output.dim() == 2:
        return
    if mask.shape != output.shape[:-1]:
        expected = tuple(output.shape[:-1]) if output.dim() == 3 else "None"
        raise ValueError(
            f"mask must be {expected} for layer {layer!r} with output {tuple(output.shape)}; "
            f"got {tuple(mask.shape)}"
        )
    if mask.device != output.device:
        raise ValueError(
            f"mask and the output of layer {layer!r} must be on the same device; "
            f"got {mask.device} and {output.device}"
        )
    if every_row and checks.is_readable(mask) and not bool(mask.any(1).all()):
        row = int(mask.any(1).int().argmin())
        raise ValueError(
            f"mask must leave at least one valid token per row; row {row} has none. True means "
            "valid: where it means padding, give ~mask"
        )


def _checked_rows(name: str, output: Any, rows: object) -> Tensor:
    """What a pooling of the user's made of a layer's output."""
    kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    accepted = f"pooling must return a floating point tensor (rows, D) of layer {name!r}, whose "
    accepted += f"output is {kind}"
    if not isinstance(rows, Tensor):
        raise TypeError(f"{accepted}; it returned {type(rows).__name__}")
    if not rows.is_floating_point() or rows.dim() != 2:
        raise ValueError(f"{accepted}; it returned {tuple(rows.shape)} of {rows.dtype}")
    return rows
