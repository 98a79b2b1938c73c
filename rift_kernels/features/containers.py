"""What a model's arguments hold: tensors in lists, mappings, named tuples and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


def values(value: Any) -> Iterator[Any]:
    """A value, and all values in it if it is a container."""
    yield value
    inner = value if isinstance(value, tuple | list) else named(value).values()
    for each in inner:
        yield from values(each)


def named(value: Any) -> dict[str, Any]:
    """The values in a container by name; empty for any other value."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return dict(value._asdict())
    if _is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """A copy of the containers of a value, with a function applied to all else in them."""
    if type(value) in (list, tuple):
        return type(value)([mapped(function, each) for each in value])
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make([mapped(function, each) for each in value])
    if type(value) is dict:
        return {name: mapped(function, each) for name, each in value.items()}
    if isinstance(value, Mapping):
        copied: Any = value.copy() if hasattr(value, "copy") else dict(value)
        for name, each in value.items():
            copied[name] = mapped(function, each)
        return copied
    if _is_dataclass(value) and not torch.compiler.is_compiling():
        copied = copy.copy(value)
        for name, each in named(value).items():
            object.__setattr__(copied, name, mapped(function, each))  # it may be frozen
        return copied
    return function(value)


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type | nn.Module)
