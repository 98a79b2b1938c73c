"""A student with adapters is its own teacher: the model with its adapters disabled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from .forward_pass import inner_model as _inner


def check_adapters(model: nn.Module) -> None:
    """Refuse a model without adapters."""
    without_adapters(model)


def virtual_tokens(model: nn.Module) -> int:  # noqa: ARG001
    """The number of tokens that prompt learning puts before the inputs."""
    return 0


def running_statistics(model: nn.Module) -> list[str]:  # noqa: ARG001
    """The modules with running statistics in training mode."""
    return []


def trained_base_parameters(features: Iterable[Tensor], model: nn.Module) -> list[str]:  # noqa: ARG001
    """The trained parameters outside adapters that affect these features."""
    return []


def without_adapters(model: nn.Module) -> AbstractContextManager[Any]:
    """A context in which the model behaves as before its adapters were added.

    Raises:
        ValueError: the model has no adapters.
    """
    inner = _inner(model)
    if hasattr(inner, "disable_adapter"):  # peft
        return _preserving_trained(inner, inner.disable_adapter())  # type: ignore[operator]
    if getattr(inner, "_hf_peft_config_loaded", False):  # transformers' add_adapter
        return _preserving_trained(inner, _disabled_adapters(inner))
    raise ValueError(
        "teacher must not be None for a student without adapters (a PEFT model, or a transformers "
        "model with add_adapter); use copy.deepcopy(student) from before finetuning; got None for "
        f"{type(inner).__name__}"
    )


@contextmanager
def _preserving_trained(model: nn.Module, context: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter ``context`` and afterwards restore ``requires_grad`` of every parameter.

    When PEFT enables an adapter again, it also unfreezes what the user had frozen in it.
    """
    states = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with context:
            yield
    finally:
        for parameter, requires_grad in states:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


@contextmanager
def _disabled_adapters(model: Any) -> Iterator[None]:
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
