"""Features of a model's inner layers, caught on their way by forward hooks."""

from __future__ import annotations

import difflib
import fnmatch
import re
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rift_kernels.dispatch import checks

POOLINGS = ("cls", "mean", "tokens")

# What wrappers call the module they wrap. torch's names are unmistakable, but for `module`.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPED_IN_PATTERN = re.compile(rf"(?:^|(?<=\.))(?:module|{'|'.join(_WRAPPED)})(?:\.|$)")
_PEFT_IN_PATTERN = re.compile(r"^base_model\.model(?:\.|$)")
_CLOSE, _TOP = 5, 12  # how many names an error shows


class FeatureCapture:
    """The outputs of chosen submodules, as features for the losses, without changing the model.

    ::

        with rk.FeatureCapture(model, "encoder.layer.*", pooling="mean") as capture:
            logits = model(**batch)
            features = capture.features(batch["attention_mask"].bool())

    or, for a whole training, ``capture = rk.FeatureCapture(...)`` and at the end
    ``capture.remove()``. Hooks go when the ``with`` block ends or the capture is deleted; what was
    captured stays readable after the block. Make it after the model is wrapped (DDP, FSDP1, FSDP2,
    PEFT), and before the first call of a compiled model, which sees no later hooks. Copies and
    pickles of a hooked model are not captured.

    Args:
        model: any ``nn.Module``.
        layers: names as in ``model.named_modules()``, or fnmatch patterns: ``"blocks.*"``,
            ``"*.layer.11"``. Of the modules that a pattern matches the outermost are taken
            (``"blocks.*"``: each block, nothing inside it), and no ``ModuleList`` or
            ``ModuleDict``, which are never called. ``""`` is the model itself, by that name only.
            The names that wrappers put in between (``module``, ``_orig_mod``,
            ``_fsdp_wrapped_module``, ``_checkpoint_wrapped_module``, PEFT's ``base_model.model``)
            may be given or left out, and are left out in :attr:`layers`; such a name means the
            wrapper, whose output has all that the wrapper does to it.
        pooling: how a layer's output becomes rows.

            ================  ===================  ================  =====================
            output            ``"cls"``            ``"mean"``        ``"tokens"``
            ================  ===================  ================  =====================
            (batch, tokens,   token 0, whatever    mean of the       (batch * tokens, D)
            D)                the mask says        valid tokens
            (batch, D)        as it is             as it is          as it is
            (batch, C, H, W)  error                mean over H, W    (batch * H * W, C)
            ================  ===================  ================  =====================

            Four axes are always read as (batch, C, H, W): of models with the channels last, take a
            layer after their pooling. Means of half precision are accumulated in float32; every
            dtype is kept.

    Attributes:
        layers: the resolved names, in the order of ``model.named_modules()``.

    What is captured is the output itself, differentiable: a tensor, the first tensor of a tuple or
    list, or ``last_hidden_state`` (else the first tensor) of a transformers ``ModelOutput``. An
    operation in place on it changes the features. The latest call of a layer wins, and is kept
    until :meth:`clear`: call that before a forward that may skip layers. Nothing is captured in a
    backward, where activation checkpointing runs layers again. Inside a reentrant checkpoint
    (``use_reentrant=True``) features carry no gradient, which :meth:`features` warns of, once; the
    output of the checkpointed module itself does. Under FSDP, the loss must also use the output of
    the FSDP unit around a captured layer, or be of it: that is what gathers the unit's parameters.

    Raises:
        TypeError, ValueError: naming the argument, at construction; a pattern without a match
            tells which layers there are. TypeError in the forward, for an output of another type.
    """

    def __init__(self, model: nn.Module, layers: str | Sequence[str], pooling: str = "cls") -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
        checks.option("pooling", pooling, POOLINGS)
        modules = _clean_names(model)
        self.layers = _resolve(_patterns(layers), modules)
        self.pooling = pooling
        self._warned = False
        # The model's hooks hold the slots, which hold neither capture nor model: no cycles.
        self._model = weakref.ref(model)
        self._switch = _Switch()
        self._slots = [_Slot(name, self._switch) for name in self.layers]
        handles = [modules[slot.name].register_forward_hook(slot) for slot in self._slots]
        self._hooks = weakref.finalize(self, _remove, handles)
        self._hooks.atexit = False

    def __enter__(self) -> Self:
        if not self._hooks.alive:
            raise RuntimeError("the hooks of this capture were removed: make a new FeatureCapture")
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"FeatureCapture(layers={self.layers!r}, pooling={self.pooling!r})"

    def remove(self) -> None:
        """Take the hooks away; what was captured stays. May be called again."""
        self._hooks()

    def clear(self) -> None:
        """Forget what was captured, and with it the graph of that forward."""
        for slot in self._slots:
            slot.forget()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, nothing is captured, and what was before stays."""
        before, self._switch.on = self._switch.on, False
        try:
            yield
        finally:
            self._switch.on = before

    @contextmanager
    def fresh(self) -> Iterator[Self]:
        """Within, nothing is captured yet; at its end comes back what was captured before.

        For a teacher that is the student without its adapter, with the same hooks::

            with torch.no_grad(), model.disable_adapter(), capture.fresh():
                model(batch)
                teacher_features = capture.features()
        """
        before = [(slot.output, slot.in_checkpoint) for slot in self._slots]
        self.clear()
        try:
            yield self
        finally:
            for slot, caught in zip(self._slots, before, strict=True):
                slot.output, slot.in_checkpoint = caught

    def features(self, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The pooled features (rows, D) of each layer, in the order of :attr:`layers`.

        Args:
            mask: (batch, tokens) boolean, True = valid, for outputs (batch, tokens, D). Tokens are
                selected, so NaN in padding does no harm; with ``"tokens"`` all rows stay, and
                :meth:`mask` gives the rows' mask. An output (batch, D) needs none, and
                (batch, C, H, W) has none.

        Raises:
            RuntimeError: layers were not called since the capture was made or cleared.
            TypeError, ValueError: a layer's output or the mask has another shape or dtype; a row
                of ``"mean"`` has no valid token (on a CPU; on a GPU, the row is NaN).
        """
        missing = [slot.name for slot in self._slots if slot.output is None]
        if missing:
            raise RuntimeError(
                f"nothing was captured of {', '.join(map(repr, missing))}: was the model called "
                "before this (RIFTRegularizer uses each pass of the student once), this model and "
                "no copy of it, while the capture's hooks were there and not paused? Is the layer "
                "on the path of that call? Was the model compiled and called before the capture "
                "was made (then torch.compiler.reset() first)?"
            )
        self._warn_of_checkpoints()
        result = {}
        for slot in self._slots:
            assert slot.output is not None
            result[slot.name] = _pool(slot.name, slot.output, self.pooling, mask)
        return result

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask of the features' rows: (batch * tokens,) for ``"tokens"``, otherwise None."""
        if mask is None:
            return None
        checks.token_mask(mask)
        return mask.flatten() if self.pooling == "tokens" else None

    def _warn_of_checkpoints(self) -> None:
        model = self._model()
        if self._warned or model is None or not (model.training and torch.is_grad_enabled()):
            return
        # The output of the checkpoint itself gets its gradient when the checkpoint ends.
        cut = [slot.name for slot in self._slots if slot.is_cut()]
        if cut and any(parameter.requires_grad for parameter in model.parameters()):
            self._warned = True
            warnings.warn(
                f"the features of {', '.join(map(repr, cut))} carry no gradient: the layer runs "
                "inside a reentrant activation checkpoint, whose forward records none. Checkpoint "
                "with use_reentrant=False",
                stacklevel=3,
            )


class _Switch:
    """Whether the hooks of a capture do anything; compiled models guard on it."""

    def __init__(self) -> None:
        self.on = True


class _Slot:
    """The hook of one layer, and what it last caught. A copy or pickle of it is inert."""

    def __init__(self, name: str, switch: _Switch | None = None) -> None:
        self.name = name
        self.switch = switch
        self.forget()

    def forget(self) -> None:
        self.output: Tensor | None = None
        self.in_checkpoint = False

    def is_cut(self) -> bool:
        """Whether a checkpoint cut the output off its graph."""
        return self.in_checkpoint and self.output is not None and not self.output.requires_grad

    # An attribute a layer and no dictionary: torch.compile traces it and needs no guard for it.
    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self.switch is None or not self.switch.on or _in_backward():
            return
        self.output = _first_tensor(self.name, output)
        self.in_checkpoint = _in_reentrant_checkpoint()

    def __reduce__(self) -> tuple[type[_Slot], tuple[str]]:
        return _Slot, (self.name,)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _in_backward() -> bool:
    """Whether autograd is at work: activation checkpointing runs layers again in it."""
    # Nothing but an operation of autograd's own tells; torch.utils.checkpoint uses it, too.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _in_reentrant_checkpoint() -> bool:
    """Whether the caller is in the forward of a reentrant checkpoint, torch's or another's."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_qualname == "CheckpointFunction.forward":
            return True
        frame = frame.f_back
    return False


def _first_tensor(name: str, output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values: Any = ()
    if isinstance(output, tuple | list):
        values = output
    elif hasattr(output, "to_tuple"):  # a transformers ModelOutput
        values = (getattr(output, "last_hidden_state", None), *output.to_tuple())
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise TypeError(
        f"the output of layer {name!r} must be a tensor, a tuple or list with one, or a "
        f"transformers ModelOutput; got {type(output).__name__}: choose a layer inside it"
    )


def _patterns(layers: object) -> list[str]:
    if isinstance(layers, str):
        return [layers]
    if not isinstance(layers, Sequence) or not all(isinstance(name, str) for name in layers):
        raise TypeError(f"layers must be a string or a sequence of strings; got {layers!r}")
    if not layers:
        raise ValueError("layers must have at least one name; got an empty sequence")
    return list(layers)


def _clean_names(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by their names without wrappers'; of a wrapper and the wrapped, the wrapper."""
    clean: dict[str, str] = {}
    modules: dict[str, nn.Module] = {}
    by_name = dict(model.named_modules())
    for name, module in by_name.items():
        parent, _, last = name.rpartition(".")
        if not name or _is_wrapped(by_name[parent], last):
            clean[name] = clean.get(parent, "")
        else:
            clean[name] = f"{clean[parent]}.{last}".removeprefix(".")
        modules.setdefault(clean[name], module)
    return modules


def _is_wrapped(parent: nn.Module, name: str) -> bool:
    """Whether the parent is a wrapper and ``name`` what it wraps."""
    if name == "module":  # a model may use this name for a part of it
        wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        return isinstance(parent, wrappers)
    if name == "base_model":
        return hasattr(parent, "peft_config")
    if name == "model":  # of PEFT's tuner, but not of a transformers model
        return hasattr(parent, "peft_config") and hasattr(parent, "inject_adapter")
    return name in _WRAPPED


def _resolve(patterns: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """The names that the patterns match, in the order of the modules."""
    found: set[str] = set()
    for pattern in patterns:
        matches = _matches(pattern, modules)
        if not matches:
            plain = _PEFT_IN_PATTERN.sub("", _WRAPPED_IN_PATTERN.sub("", pattern)).rstrip(".")
            matches = _matches(plain, modules) if plain != pattern else []
        if not matches:
            raise ValueError(_no_match(pattern, list(modules)))
        found.update(matches)
    return [name for name in modules if name in found]


def _matches(pattern: str, modules: dict[str, nn.Module]) -> list[str]:
    if pattern in modules:
        if not _is_called(modules[pattern]):
            raise ValueError(
                f"layers must name modules that are called; {pattern!r} is a "
                f"{type(modules[pattern]).__name__}: take those in it, {pattern + '.*'!r}"
            )
        return [pattern]
    matches: list[str] = []
    inside: set[str] = set()
    for name, module in modules.items():
        parent = name.rpartition(".")[0]
        if parent in inside:
            inside.add(name)
        elif name and _is_called(module) and fnmatch.fnmatchcase(name, pattern):
            inside.add(name)
            matches.append(name)
    return matches


def _is_called(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _no_match(pattern: str, names: list[str]) -> str:
    message = f"layers: {pattern!r} matches no module of the model"
    close = difflib.get_close_matches(pattern, names, n=_CLOSE, cutoff=0.4)
    if close:
        message += f"; the closest are {', '.join(map(repr, close))}"
    top = [name for name in names if name and "." not in name]
    more = f" and {len(top) - _TOP} more" if len(top) > _TOP else ""
    return message + f"; the top level has {', '.join(map(repr, top[:_TOP])) or 'none'}{more}"


def _pool(name: str, x: Tensor, pooling: str, mask: Tensor | None) -> Tensor:
    """Rows (rows, D) of a layer's output."""
    if not x.is_floating_point():
        raise TypeError(f"the output of layer {name!r} must be floating point; got {x.dtype}")
    if x.dim() not in (2, 3, 4):
        raise ValueError(
            f"the output of layer {name!r} must be (batch, tokens, D), (batch, D) or "
            f"(batch, C, H, W); got {tuple(x.shape)}"
        )
    if mask is not None:
        checks.token_mask(mask, name, x, pooling == "mean")
    if x.dim() == 2:
        return x
    if x.dim() == 4:
        if pooling == "cls":
            raise ValueError(
                f"pooling must be 'mean' or 'tokens' for (batch, C, H, W), which has no cls token; "
                f"got 'cls' for layer {name!r} with output {tuple(x.shape)}"
            )
        x = x.flatten(2).transpose(1, 2)
    if pooling == "tokens":
        return x.flatten(0, 1)
    return x[:, 0] if pooling == "cls" else _mean(x, mask)


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the valid tokens, in float32 at least, of the dtype of ``x``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mask is None:
        return x.mean(1, dtype=dtype).to(x.dtype)
    total = x.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1, dtype=dtype)
    return (total / mask.sum(1, dtype=dtype).unsqueeze(-1)).to(x.dtype)
