"""A weight that finds itself: dual ascent instead of a search over lambda."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from .dispatch import checks


class AdaptiveWeight(nn.Module):
    """The weight of a RIFT loss that holds a similarity at a target: nobody searches for lambda.

    Of the constrained problem "minimise the task's loss such that ``similarity >= target``" it is
    the multiplier, found by dual ascent, one step a call that computes gradients ::

        weight <- clip(weight + rate * (target_similarity - similarity), 0, maximum)

    so it grows while the student is less similar than wanted and falls to 0, no pull at all, while
    it is more similar. Use it in place of a number::

        rift = rk.RIFTLoss("cka", weight=rk.AdaptiveWeight(target_similarity=0.9))

    Args:
        target_similarity: of the mean over layers, in (0, 1].
        initial: the weight at first.
        rate: change of the weight a step for each unit of similarity missing. The larger, the
            sooner the target is reached, and the more the weight swings about it.
        maximum: the weight grows no further, so that a target out of reach does not drown the task.

    The weight is a float32 buffer, ``value``, that follows the distances to their device: part of
    ``state_dict``, never read by the host, no gradient. In eval mode or without gradients it stays
    as it is, and so it does at a similarity that is not finite. On several ranks give the loss its
    ``group``: then all have the same similarity, and the same weight.

    Source: dual ascent, Boyd et al. 2011, section 2.1; the constraint is that of RIFT, arXiv
    2503.07399.
    """

    value: Tensor

    def __init__(
        self,
        target_similarity: float,
        *,
        initial: float = 1.0,
        rate: float = 0.1,
        maximum: float = 100.0,
    ) -> None:
        super().__init__()
        self.target_similarity = checks.number("target_similarity", target_similarity)
        if not 0 < self.target_similarity <= 1:
            raise ValueError(
                f"target_similarity must be above 0 and at most 1; got {target_similarity!r}"
            )
        self.rate = checks.number("rate", rate)
        self.maximum = checks.number("maximum", maximum)
        initial = checks.number("initial", initial)
        if initial > self.maximum:
            raise ValueError(f"initial must be at most maximum, {maximum!r}; got {initial!r}")
        with torch.inference_mode(False):  # or it could never move
            self.register_buffer("value", torch.tensor(initial))

    def forward(self, distance: Tensor) -> Tensor:
        """The weight for these distances, ``1 - similarity``, and a step of ascent."""
        moves = self.training and torch.is_grad_enabled()
        if moves and self.value.device != distance.device:
            self.value = self.value.to(distance.device)
        # A copy: the buffer changes before the backward needs what it was.
        weight = self.value.clone()
        if moves:
            with torch.no_grad():
                missing = self.target_similarity - 1 + distance.detach().mean().to(weight.dtype)
                step = torch.where(missing.isfinite(), self.rate * missing, 0.0)
                self.value.add_(step).clamp_(0.0, self.maximum)
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Whatever moves or casts a module; the weight stays float32, as bfloat16 cannot add up."""
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), recurse)

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"target_similarity={self.target_similarity}, rate={self.rate}, maximum={self.maximum}"
        )
