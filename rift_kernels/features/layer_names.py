"""The layers of a model by name: patterns, and names without those that wrappers insert."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence

from torch import nn

# Names under which wrappers keep the wrapped module. Only `module` may also be a model's own name.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPED_IN_PATTERN = re.compile(rf"(?:^|(?<=\.))(?:module|{'|'.join(_WRAPPED)})(?:\.|$)")
_PEFT_IN_PATTERN = re.compile(r"^base_model\.model(?:\.|$)")
_CLOSE, _TOP = 5, 12  # numbers of names in an error message


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by their names without wrappers; the outermost wrapper wins a shared name."""
    clean_names: dict[str, str] = {}
    modules: dict[str, nn.Module] = {}
    by_full_name = dict(model.named_modules())
    for name, module in by_full_name.items():
        parent, _, last = name.rpartition(".")
        if not name or _is_wrapped(by_full_name[parent], last):
            clean_names[name] = clean_names.get(parent, "")
        else:
            clean_names[name] = f"{clean_names[parent]}.{last}".removeprefix(".")
        modules.setdefault(clean_names[name], module)
    return modules


def paths_to(layer: str) -> list[str]:
    """The names of the modules around a layer and of itself, outermost first: the model is ""."""
    parts = layer.split(".") if layer else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def wrapped_in(module: nn.Module) -> nn.Module | None:
    """The module that this one wraps, or None if it is no wrapper."""
    children = module.named_children()
    return next((child for name, child in children if _is_wrapped(module, name)), None)


def _is_wrapped(parent: nn.Module, name: str) -> bool:
    """Whether the parent is a wrapper and ``name`` is the module that it wraps."""
    if name == "module":  # may also be a model's own name
        wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        return isinstance(parent, wrappers)
    if name == "base_model":
        return hasattr(parent, "peft_config")
    if name == "model":  # inside PEFT's tuner, but not inside a transformers model
        return hasattr(parent, "peft_config") and hasattr(parent, "inject_adapter")
    return name in _WRAPPED


def matching_names(layers: object, modules: dict[str, nn.Module]) -> list[str]:
    """The names that these names or patterns match, in the order of the modules."""
    names: set[str] = set()
    for pattern in _patterns(layers):
        matches = _matches(pattern, modules)
        if not matches:
            clean = _PEFT_IN_PATTERN.sub("", _WRAPPED_IN_PATTERN.sub("", pattern)).rstrip(".")
            matches = _matches(clean, modules) if clean != pattern else []
        if not matches:
            raise ValueError(_no_match_message(pattern, list(modules)))
        names.update(matches)
    return [name for name in modules if name in names]


def _patterns(layers: object) -> list[str]:
    if isinstance(layers, str):
        return [layers]
    if not isinstance(layers, Sequence) or not all(isinstance(name, str) for name in layers):
        raise TypeError(f"layers must be a string or a sequence of strings; got {layers!r}")
    if not layers:
        raise ValueError("layers must have at least one name; got an empty sequence")
    return list(layers)


def _matches(pattern: str, modules: dict[str, nn.Module]) -> list[str]:
    if pattern in modules:
        if not _is_called(modules[pattern]):
            raise ValueError(
                f"layers must name modules that are called; {pattern!r} is a "
                f"{type(modules[pattern]).__name__}: use the modules in it, {pattern + '.*'!r}"
            )
        return [pattern]
    matches: list[str] = []
    covered: set[str] = set()  # matches and all modules inside them
    for name, module in modules.items():
        parent = name.rpartition(".")[0]
        if parent in covered:
            covered.add(name)
        elif name and _is_called(module) and fnmatch.fnmatchcase(name, pattern):
            covered.add(name)
            matches.append(name)
    return matches


def _is_called(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _no_match_message(pattern: str, names: list[str]) -> str:
    message = f"layers: {pattern!r} matches no module of the model"
    close = difflib.get_close_matches(pattern, names, n=_CLOSE, cutoff=0.4)
    if close:
        message += f"; the closest are {', '.join(map(repr, close))}"
    top = [name for name in names if name and "." not in name]
    rest = f" and {len(top) - _TOP} more" if len(top) > _TOP else ""
    return message + f"; the top level has {', '.join(map(repr, top[:_TOP])) or 'none'}{rest}"
