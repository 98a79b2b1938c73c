"""Features of a model's inner layers, captured by forward hooks."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rift_kernels.dispatch import user_warnings

from .layer_names import matching_names, modules_by_name
from .pooling import Pooling, check_pooling, check_token_mask, pool


class FeatureCapture:
    """Capture the outputs of chosen submodules as features, without changing the model.

    ::

        with rk.FeatureCapture(model, "encoder.layer.*", pooling="mean") as capture:
            logits = model(**batch)
            features = capture.features(batch["attention_mask"].bool())

    or, throughout training, ``capture = rk.FeatureCapture(...)`` and ``capture.remove()`` at the
    end. The hooks are removed when the ``with`` block ends or the capture is deleted; captured
    features stay readable. Create it after wrapping the model (DDP, FSDP1, FSDP2, PEFT), and before
    the first call of a compiled model, which ignores later hooks. Copies and pickles of a hooked
    model are not captured.

    Args:
        model: any ``nn.Module``.
        layers: names as in ``model.named_modules()``, or fnmatch patterns: ``"blocks.*"``,
            ``"*.layer.11"``. A pattern selects only the outermost modules that match:
            ``"blocks.*"`` is each block and nothing inside it. It never selects a ``ModuleList`` or
            ``ModuleDict``, because they are not called. ``""`` is the model itself; no pattern
            matches it. Names that wrappers insert (``module``, ``_orig_mod``,
            ``_fsdp_wrapped_module``, ``_checkpoint_wrapped_module``, PEFT's ``base_model.model``)
            are optional here and omitted in :attr:`layers`. The name without them means the
            wrapper, so the captured output includes the wrapper's effect.
        pooling: the way a layer's output becomes rows.

            ================  ===================  ================  =====================
            output            ``"cls"``            ``"mean"``        ``"tokens"``
            ================  ===================  ================  =====================
            (batch, tokens,   token 0, ignoring    mean of the       (batch * tokens, D)
            D)                the mask             valid tokens
            (batch, D)        unchanged            unchanged         unchanged
            (batch, C, H, W)  error                mean over H, W    (batch * H * W, C)
            ================  ===================  ================  =====================

            ``"last"`` is the last valid token of each row, whether padding is left or right: in a
            causal language model, the one that has seen the others. It takes the outputs that
            ``"cls"`` takes. Five axes are (batch, C, T, H, W), and as four. Means of half precision
            are accumulated in float32. The dtype is preserved.

            For anything else, ``pooling`` is a function of the layer's output and its mask (None
            without one) that returns (rows, D): ``lambda x, mask: x.flatten(1, 2).mean(1)`` for
            channels last.

    Attributes:
        layers: the resolved names, in the order of ``model.named_modules()``.

    The captured output is the layer's own tensor, still differentiable. It is the output itself,
    the first tensor of a tuple or list, or ``last_hidden_state`` (else the first tensor) of a
    transformers ``ModelOutput``. In-place operations on it change the features. The latest call of
    a layer replaces earlier ones and is kept until :meth:`clear`; call that before a forward that
    may skip layers.

    Nothing is captured during a backward, in which activation checkpointing reruns layers. Inside a
    reentrant checkpoint (``use_reentrant=True``) features have no gradient, and :meth:`features`
    warns once; the output of the checkpointed module itself has one. Under FSDP, the loss must also
    depend on the output of the FSDP unit that a captured layer is or belongs to, because that
    gathers the unit's parameters.

    Raises:
        TypeError, ValueError: naming the argument, at construction. The message for a pattern
            without a match lists layers of the model. TypeError in the forward for an output of
            another type.
    """

    def __init__(
        self, model: nn.Module, layers: str | Sequence[str], pooling: Pooling = "cls"
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
        check_pooling(pooling)
        modules = modules_by_name(model)
        self.layers = matching_names(layers, modules)
        self.pooling = pooling
        self._warned = False
        # The model's hooks refer to the slots, and slots to neither capture nor model: no cycles.
        self._model = weakref.ref(model)
        self._switch = _Switch()
        self._slots = [_Slot(name, self._switch) for name in self.layers]
        handles = [modules[slot.name].register_forward_hook(slot) for slot in self._slots]
        self._hooks = weakref.finalize(self, _remove, handles)
        self._hooks.atexit = False

    def __enter__(self) -> Self:
        if not self._hooks.alive:
            raise RuntimeError(
                "the hooks of this capture were removed: create another FeatureCapture"
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"FeatureCapture(layers={self.layers!r}, pooling={self.pooling!r})"

    def remove(self) -> None:
        """Remove the hooks and keep the captured outputs. Further calls have no effect."""
        self._hooks()

    def clear(self) -> None:
        """Release the captured outputs, and with them the graph of that forward."""
        for slot in self._slots:
            slot.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend capturing within the context; earlier outputs are kept."""
        was_on, self._switch.on = self._switch.on, False
        try:
            yield
        finally:
            self._switch.on = was_on

    @contextmanager
    def fresh(self) -> Iterator[Self]:
        """Start empty within the context, and restore the earlier outputs at its end.

        This serves a teacher that is the student without its adapter, with the same hooks::

            with torch.no_grad(), model.disable_adapter(), capture.fresh():
                model(batch)
                teacher_features = capture.features()
        """
        states = [(slot.output, slot.in_checkpoint) for slot in self._slots]
        self.clear()
        try:
            yield self
        finally:
            for slot, state in zip(self._slots, states, strict=True):
                slot.output, slot.in_checkpoint = state

    def features(self, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The pooled features (rows, D) of each layer, in the order of :attr:`layers`.

        Args:
            mask: (batch, tokens) boolean, True = valid, for outputs (batch, tokens, D). Tokens are
                selected, so NaN in padding is harmless. With ``"tokens"`` all rows remain, and
                :meth:`mask` returns the rows' mask. For (batch, D) the mask is unused; for
                (batch, C, H, W) it must be None.

        Raises:
            RuntimeError: a layer was not called since the capture was created or cleared.
            TypeError, ValueError: a layer's output or the mask has another shape or dtype, or a
                row of ``"mean"`` has no valid token (on a CPU; on a GPU, the row is NaN).
        """
        missing = [slot.name for slot in self._slots if slot.output is None]
        if missing:
            raise RuntimeError(
                f"nothing was captured of {', '.join(map(repr, missing))}. Was the model called "
                "before this (RIFTRegularizer uses each pass of the student once)? Was it this "
                "model, not a copy, while the hooks were in place and not paused? Is the layer "
                "on the path of that call? Was the model compiled and called before the capture "
                "was created (then call torch.compiler.reset() first)?"
            )
        self._warn_of_checkpoints()
        features = {}
        for slot in self._slots:
            assert slot.output is not None
            features[slot.name] = pool(slot.name, slot.output, self.pooling, mask)
        return features

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask of the features' rows: (batch * tokens,) for ``"tokens"``, otherwise None."""
        if mask is None:
            return None
        check_token_mask(mask)
        return mask.flatten() if self.pooling == "tokens" else None

    def _warn_of_checkpoints(self) -> None:
        model = self._model()
        if self._warned or model is None or not (model.training and torch.is_grad_enabled()):
            return
        # The output of the checkpointed module itself gets its gradient when the checkpoint ends.
        detached = [slot.name for slot in self._slots if slot.is_detached()]
        if detached and any(parameter.requires_grad for parameter in model.parameters()):
            self._warned = True
            user_warnings.warn(
                f"the features of {', '.join(map(repr, detached))} have no gradient: the layer is "
                "inside a reentrant activation checkpoint, whose forward records no graph. Use "
                "use_reentrant=False"
            )


class _Switch:
    """Enables the hooks of a capture; compiled models guard on it."""

    def __init__(self) -> None:
        self.on = True


class _Slot:
    """The hook of one layer and its latest output. Copies and pickles are inert."""

    def __init__(self, name: str, switch: _Switch | None = None) -> None:
        self.name = name
        self.switch = switch
        self.clear()

    def clear(self) -> None:
        self.output: Tensor | None = None
        self.in_checkpoint = False

    def is_detached(self) -> bool:
        """Whether a checkpoint detached the output from its graph."""
        return self.in_checkpoint and self.output is not None and not self.output.requires_grad

    # torch.compile traces an attribute of each slot without a guard, unlike a shared dictionary.
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
    """Whether autograd runs a backward, in which activation checkpointing reruns layers."""
    # torch has no public test for this; torch.utils.checkpoint calls the same function.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _in_reentrant_checkpoint() -> bool:
    """Whether a caller is the forward of a reentrant checkpoint, from torch or elsewhere."""
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
