"""What a regulariser says, once each, where its loss is other than the user may think."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rift_kernels.dispatch import user_warnings

from . import adapters

# Rows that differ by no more than rounding, relative to their length.
_CONSTANT = 64 * torch.finfo(torch.float32).eps


class TrainingWarnings:
    """The warnings of one regulariser, and what was checked in its first step."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self.is_first_step = True

    def warn(self, kind: str, message: str) -> None:
        """Warn of this kind of thing for the first time."""
        if kind not in self._said:
            self._said.add(kind)
            user_warnings.warn(message)

    def warn_of_a_replaced_pass(self) -> None:
        """Two passes of the student came before one call."""
        self.warn(
            "replaced",
            "the student ran more than once with gradients before this call of rift(): only its "
            "latest pass is compared. In a loop of your own, call rift() after each pass",
        )

    def warn_of_dropped_masks(self, layers: Sequence[str]) -> None:
        """A mask of the model's call is not that of these layers."""
        self.warn(
            f"masks of {layers}",
            f"every token of {', '.join(map(repr, layers))} is compared, because no mask in the "
            f"student's call is of these tokens. If they have no padding, say so by token_mask="
            f"{dict.fromkeys(layers)}; else give their mask there",
        )

    def warn_of_an_overlooked_mask(self, name: str, layers: Sequence[str]) -> None:
        """An argument of the student's call may be the mask of these layers."""
        self.warn(
            "overlooked",
            f"every token of {', '.join(map(repr, layers))} is compared, but {name!r} in the "
            f"student's call may be their mask. If it is, give token_mask={name!r} (True or "
            f"nonzero = valid), or lambda call: call[{name!r}] == 0 where that is valid; if there "
            "is no padding, token_mask=None",
        )

    def warn_without_gradient(self, layers: Sequence[str], is_all: bool) -> None:
        """These layers get no gradient."""
        names = ", ".join(map(repr, layers))
        whose = "the loss has" if is_all else f"the layers {names} have"
        self.warn(
            f"gradient of {names}",
            f"{whose} no gradient: no trained parameter affects {names}, or the student ran under "
            "no_grad, or in a checkpoint that records no graph",
        )

    def warn_of_constants(
        self, students: Mapping[str, Tensor], teachers: Mapping[str, Any]
    ) -> None:
        """In the first step, look for features that are the same in every row."""
        if not self.is_first_step:
            return
        sides = {"student": students, "teacher": teachers}
        found = [
            (side, repr(name))
            for side, features in sides.items()
            for name, layer in features.items()
            if _is_constant(layer)
        ]
        if found:
            whose, names = (dict.fromkeys(each) for each in zip(*found, strict=True))
            self.warn(
                "constant",
                f"the features of {', '.join(names)} are the same in every row of the "
                f"{' and the '.join(whose)}, so the loss has no gradient there. The first token of "
                "a causal model is such a feature: pooling='last' takes the last one",
            )

    def warn_of_random_numbers(
        self, features: Mapping[str, Tensor], again: Mapping[str, Tensor]
    ) -> None:
        """Two passes of the teacher drew other random numbers, which may have no effect."""
        if any(_differ(x, again[name]) for name, x in features.items()):
            self.warn(
                "random",
                "the teacher draws random numbers in eval mode, other ones than the student: "
                "copies of a model then differ. replay_rng=True gives it those that the student "
                "drew",
            )

    def warn_of_running_statistics(self, model: nn.Module) -> None:
        """In the first step, look for layers whose statistics move with the training."""
        names = adapters.running_statistics(model) if self.is_first_step else []
        if names:
            self.warn(
                "statistics",
                f"{names[0]!r} keeps running statistics in training mode, which the teacher shares "
                "with the student: it changes with the training. Call eval() on it, or give "
                "teacher=copy.deepcopy(model) from before the finetuning",
            )

    def check_base(self, features: Mapping[str, Tensor], model: nn.Module) -> None:
        """In the first step, refuse trained parameters that the teacher shares."""
        if not self.is_first_step:
            return
        names = adapters.trained_base_parameters(features.values(), model)
        if names:
            raise ValueError(
                "teacher must not be None where parameters outside adapters are trained that "
                f"affect the compared layers, because it changes with them; got {names[0]!r}: "
                "freeze them, or give teacher=copy.deepcopy(model) from before the finetuning"
            )


def _differ(x: Tensor, y: Tensor) -> bool:
    """Whether two features differ by more than the order of their sums may make them."""
    return x.shape != y.shape or bool((x - y).norm() > 0.01 * x.norm())


def _is_constant(x: Any) -> bool:
    """Whether all rows of features are the same up to rounding; waits for a GPU."""
    if not isinstance(x, Tensor) or len(x) < 2 or not bool(x.isfinite().all()):
        return False
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return bool((x - x.mean(0)).norm() <= _CONSTANT * x.norm())
