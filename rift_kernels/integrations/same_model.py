"""Whether a regulariser's student is the model that a trainer trains."""

from __future__ import annotations

from typing import Any

from torch import nn

from rift_kernels.features.forward_pass import unwrapped
from rift_kernels.regularizer import RIFTRegularizer


def check(rift: RIFTRegularizer, model: nn.Module, advice: str) -> None:
    """Refuse a regulariser whose student the model will not call; ``advice`` ends the error."""
    student = unwrapped(rift.student)
    modules = list(model.modules())
    wrapper = next((module for module in modules if _adapted(module) is student), None)
    if wrapper is not None:  # adapters call the forward of the model in them without its hooks
        raise ValueError(
            f"rift must be of the {type(wrapper).__name__} that is trained; got one of the "
            f"{type(student).__name__} inside it: {advice}"
        )
    if all(module is not student for module in modules):
        raise ValueError(
            f"rift must be of the {type(model).__name__} that is trained, or of a module in it; "
            f"got one of another {type(student).__name__}: {advice}"
        )


def _adapted(module: Any) -> nn.Module | None:
    """The model inside a PEFT model."""
    is_peft = hasattr(module, "peft_config") and hasattr(module, "get_base_model")
    return module.get_base_model() if is_peft else None
