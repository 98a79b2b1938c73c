"""A weight that adjusts itself: dual ascent instead of a search over lambda."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from .dispatch import checks


class AdaptiveWeight(nn.Module):
    """The weight of a RIFT loss that holds a similarity at a target, without a search for lambda.

    It is the multiplier of the constrained problem "minimise the task's loss such that
    ``similarity >= target``". Dual ascent finds it, in one step for each call that computes
    gradients::

        weight <- clip(weight + rate * (target_similarity - similarity), 0, maximum)

    The weight grows while the student is less similar than the target. While it is more similar,
    the weight falls until it is 0 and the loss has no effect. Use it in place of a number::

        rift = rk.RIFTLoss("cka", weight=rk.AdaptiveWeight(target_similarity=0.9))

    Args:
        target_similarity: target for the mean similarity over layers, in (0, 1]. Choose one below
            the similarity of the untrained student in training mode, which dropout lowers;
            otherwise the weight grows to ``maximum``.
        initial: the weight at the start.
        rate: change of the weight in one step for each unit of missing similarity. A larger rate
            reaches the target sooner and makes the weight oscillate more around it.
        maximum: upper limit of the weight, so that an unreachable target does not drown the task.

    Raises:
        TypeError, ValueError: naming the argument, at construction.

    The weight is a float32 buffer, ``value``, without gradient. It is part of ``state_dict``,
    follows the distances to their device and is never read by the host. It does not change in eval
    mode, without gradients, or at a similarity that is not finite. On several ranks, give the loss
    its ``group``: all ranks then see the same similarity and have the same weight.

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
        with torch.inference_mode(False):  # an inference tensor could never be updated
            self.register_buffer("value", torch.tensor(initial, dtype=torch.float32))

    def forward(self, distance: Tensor) -> Tensor:
        """Return the weight for these distances, ``1 - similarity``, and take a step of ascent."""
        is_training = self.training and torch.is_grad_enabled()
        if is_training and self.value.device != distance.device:
            self.value = self.value.to(distance.device)
        # A copy, because the backward needs the value from before this step.
        weight = self.value.clone()
        if is_training:
            with torch.no_grad():
                missing = self.target_similarity - 1 + distance.detach().mean().to(weight.dtype)
                step = torch.where(missing.isfinite(), self.rate * missing, 0.0)
                self.value.add_(step).clamp_(0.0, self.maximum)
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the module; the weight stays float32, because bfloat16 would round steps away."""
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), recurse)

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"target_similarity={self.target_similarity}, rate={self.rate}, maximum={self.maximum}"
        )
