"""From a layer's output to rows: the poolings, and the mask that selects tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rift_kernels.dispatch import checks

POOLINGS = ("cls", "mean", "tokens")


def pool(name: str, x: Tensor, pooling: str, mask: Tensor | None) -> Tensor:
    """A layer's output as rows (rows, D)."""
    if not x.is_floating_point():
        raise TypeError(f"the output of layer {name!r} must be floating point; got {x.dtype}")
    if x.dim() not in (2, 3, 4):
        raise ValueError(
            f"the output of layer {name!r} must be (batch, tokens, D), (batch, D) or "
            f"(batch, C, H, W); got {tuple(x.shape)}"
        )
    if mask is not None:
        check_token_mask(mask, name, x, pooling == "mean")
    if x.dim() == 2:
        return x
    if x.dim() == 4:
        if pooling == "cls":
            raise ValueError(
                f"pooling must be 'mean' or 'tokens' for (batch, C, H, W), which has no cls token; "
                f"got 'cls' for layer {name!r} with output {tuple(x.shape)}"
            )
        x = x.flatten(2).transpose(1, 2)
    if pooling == "tokens":
        return x.flatten(0, 1)
    return x[:, 0] if pooling == "cls" else mean_over_tokens(x, mask)


def mean_over_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the valid tokens, accumulated in at least float32, in the dtype of ``x``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mask is None:
        return x.mean(1, dtype=dtype).to(x.dtype)
    total = x.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1, dtype=dtype)
    return (total / mask.sum(1, dtype=dtype).unsqueeze(-1)).to(x.dtype)


def check_token_mask(
    mask: object, layer: str = "", output: Tensor | None = None, every_row: bool = False
) -> None:
    """Check that ``mask`` is boolean (batch, tokens), and that it fits a layer's output, if given.

    An output (batch, D) has no tokens, so it takes any mask. With ``every_row``, each row of
    (batch, tokens, D) must have a valid token.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a boolean tensor or None; got {type(mask).__name__}")
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
        raise ValueError(f"mask must leave at least one valid token per row; row {row} has none")
