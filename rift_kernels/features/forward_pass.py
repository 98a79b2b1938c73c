"""Run a user's model in eval mode, and find what its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .hooks import Call
from .layer_names import wrapped_in

LABELS = ("labels", "label")  # given these, a model also computes a loss


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode within the context, then restore the mode of each submodule.

    Only the flag is set, because ``train`` and ``eval`` of some models also merge weights. The
    inference path of ``torch.nn`` is off: it drops padding and calls no submodules.
    """
    trained = [module for module in model.modules() if module.training]
    has_inference_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(has_inference_path)
        for module in trained:
            module.training = True


def arguments(batch: Any, advice: str) -> Call:
    """A batch as arguments of a model: a mapping by keyword, else a tensor or a tuple's first.

    ``advice`` ends the error about any other batch.
    """
    if isinstance(batch, Mapping):
        return Call((), dict(batch))
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise TypeError(
            "a batch must be a tensor, a tuple or list whose first entry is one, or a mapping; "
            f"got {type(batch).__name__}: {advice}"
        )
    return Call((batch,), {})


def without_unused_labels(model: nn.Module, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments without labels that only a loss needs.

    Models of transformers that encode and decode make the decoder's inputs from labels.
    """
    names, takes_rest = parameters(model)
    config = getattr(innermost(model), "config", None)
    takes_any = takes_rest and not names
    only_for_loss = config is not None and not getattr(config, "is_encoder_decoder", False)
    return {
        name: value
        for name, value in keywords.items()
        if name not in LABELS or (not only_for_loss and (name in names or takes_any))
    }


def parameters(model: nn.Module) -> tuple[list[str], bool]:
    """The names of the parameters of the model's forward, and whether it takes others, too."""
    try:
        found = list(inspect.signature(innermost(model).forward).parameters.values())
    except (TypeError, ValueError):  # compiled by TorchScript
        return [], True
    names = [p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return names, any(p.kind is p.VAR_KEYWORD for p in found)


def named_arguments(model: nn.Module, call: Call) -> dict[str, Any]:
    """The arguments of a call by name, and those in the first one, if it is a batch with names."""
    try:
        signature = inspect.signature(innermost(model).forward)
        named = dict(signature.bind_partial(*call.inputs).arguments)
    except (TypeError, ValueError):  # the model itself raises a better error for wrong inputs
        named = {}
    return {**call.in_first(), **named, **call.keywords}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, whose forward would prepare a backward and communicate."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def innermost(model: nn.Module) -> nn.Module:
    """The model inside all wrappers, whose forward has the parameters' names."""
    inner: nn.Module | None = model
    while inner is not None:
        model, inner = inner, wrapped_in(inner)
    return model
