"""Running somebody's model: in eval mode, without its labels, without its wrapper or adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

LABELS = ("labels", "label")  # a model that gets them computes a loss


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, no submodule is in training mode; after it, each is in the one it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def without_labels(named: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments with which a model computes no loss."""
    return {name: value for name, value in named.items() if name not in LABELS}


def token_mask(
    named: Mapping[str, Any], model: nn.Module | None = None, inputs: tuple[Any, ...] = ()
) -> Tensor | None:
    """The valid tokens by ``attention_mask``, if it is there, by name or where the model has it."""
    mask = named.get("attention_mask")
    if mask is None and model is not None and inputs:
        inner: Any = _inner(model)
        inner = getattr(inner, "get_base_model", lambda: inner)()  # PEFT's passes everything on
        try:
            given = inspect.signature(inner.forward).bind_partial(*inputs).arguments
            mask = given.get("attention_mask")
        except TypeError:
            mask = None  # the model will say what it does not take
    return mask.bool() if isinstance(mask, Tensor) else None


def arguments(batch: Any, otherwise: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: a mapping by name, else a tensor or the first of a tuple.

    ``otherwise`` tells what to do about a batch of another kind.
    """
    if isinstance(batch, Mapping):
        return (), without_labels(batch)
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise TypeError(
            "a batch must be a tensor, a tuple or list whose first entry is one, or a mapping; "
            f"got {type(batch).__name__}: {otherwise}"
        )
    return (batch,), {}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without DDP, whose forward prepares a backward and talks to other processes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _inner(model: nn.Module) -> nn.Module:
    """The model without DDP and torch.compile, whichever is around the other."""
    inner = unwrapped(model)
    return unwrapped(getattr(inner, "_orig_mod", inner))


def without_adapters(model: nn.Module) -> AbstractContextManager[Any]:
    """Within, the model is what it was before its adapters were added.

    Raises:
        ValueError: it has none.
    """
    inner = _inner(model)
    if hasattr(inner, "disable_adapter"):  # peft
        return _same_trained(inner, inner.disable_adapter())  # type: ignore[operator]
    if getattr(inner, "_hf_peft_config_loaded", False):  # transformers' add_adapter
        return _same_trained(inner, _disabled(inner))
    raise ValueError(
        "teacher must be given for a student without adapters (a PEFT model, or a transformers "
        "model with add_adapter): copy.deepcopy(student) before the finetuning; got None for "
        f"{type(inner).__name__}"
    )


@contextmanager
def _same_trained(model: nn.Module, context: AbstractContextManager[Any]) -> Iterator[None]:
    """``context``; after it the same parameters are trained as before.

    PEFT would train all of an adapter that it enables, also what its user had frozen.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with context:
            yield
    finally:
        for parameter, trained in before:
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)


@contextmanager
def _disabled(model: Any) -> Iterator[None]:
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
