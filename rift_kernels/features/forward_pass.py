"""Run a user's model in eval mode, without labels, and without its wrapper or adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

LABELS = ("labels", "label")  # given these, a model also computes a loss


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode within the context, then restore the mode of each submodule."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def without_labels(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments except labels, so that the model computes no loss."""
    return {name: value for name, value in keywords.items() if name not in LABELS}


def token_mask(
    keywords: Mapping[str, Any], model: nn.Module | None = None, inputs: tuple[Any, ...] = ()
) -> Tensor | None:
    """``attention_mask`` as booleans, from the keywords or from its position in the inputs."""
    mask = keywords.get("attention_mask")
    if mask is None and model is not None and inputs:
        inner: Any = _inner(model)
        inner = getattr(inner, "get_base_model", lambda: inner)()  # PEFT's own forward takes *args
        try:
            parameters = inspect.signature(inner.forward).bind_partial(*inputs).arguments
            mask = parameters.get("attention_mask")
        except TypeError:
            mask = None  # the model itself raises a better error for wrong inputs
    return mask.bool() if isinstance(mask, Tensor) else None


def arguments(batch: Any, advice: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as arguments of a model: a mapping by keyword, else a tensor or a tuple's first.

    ``advice`` ends the error about any other batch.
    """
    if isinstance(batch, Mapping):
        return (), without_labels(batch)
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise TypeError(
            "a batch must be a tensor, a tuple or list whose first entry is one, or a mapping; "
            f"got {type(batch).__name__}: {advice}"
        )
    return (batch,), {}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, whose forward would prepare a backward and communicate."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _inner(model: nn.Module) -> nn.Module:
    """The model inside DDP and torch.compile, in either order."""
    inner = unwrapped(model)
    return unwrapped(getattr(inner, "_orig_mod", inner))


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
