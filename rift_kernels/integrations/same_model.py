"""Whether a regulariser's student is the model that a trainer trains."""

from __future__ import annotations

from typing import Any

from torch import nn

from rift_kernels.regularizer import RIFTRegularizer


def check(rift: RIFTRegularizer, model: nn.Module, advice: str) -> None:
    """Refuse a regulariser of another model before its first step; ``advice`` ends the error."""
    student = rift.student
    if student is model or any(module is model for module in student.modules()):
        return
    wrapper = next((module for module in model.modules() if _adapted(module) is student), None)
    if wrapper is not None:  # adapters call the forward of the model in them without its hooks
        raise ValueError(
            f"rift must be of the {type(wrapper).__name__} that is trained; got one of the "
            f"{type(student).__name__} inside it: {advice}"
        )
    if all(module is not student for module in model.modules()):
        raise ValueError(
            "rift must be of the model that is trained, or of a part of it; got one of another "
            f"{type(student).__name__}: {advice}"
        )


def _adapted(module: Any) -> nn.Module | None:
    """The model inside a PEFT model."""
    is_peft = hasattr(module, "peft_config") and hasattr(module, "get_base_model")
    return module.get_base_model() if is_peft else None
