"""Features of a model's inner layers, captured by forward hooks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rift_kernels.dispatch import user_warnings

from .axes import layer_axes
from .forward_pass import unwrapped
from .hooks import CallHook, Hook, LayerCell, LayerHook, Pass, Recorder
from .layer_names import matching_names, modules_by_name
from .pooling import Pooling, check_pooling, check_token_mask, pool

Masks = Tensor | Mapping[str, Tensor | None] | None


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
    transformers ``ModelOutput``; of anything else, a function as ``pooling`` can make rows.
    In-place operations on it change the features. The outputs are those of the model's latest pass,
    and of a layer's latest call in it, and are kept until :meth:`clear`. A pass with gradients and
    one without are kept apart: with gradients enabled, :meth:`features` returns those of the
    former, if there is one.

    A pooling by name refuses outputs whose axes are not those of its table, as far as the modules
    around the layer and the sizes of the model's inputs tell.

    Nothing is captured during a backward, in which activation checkpointing reruns layers. Inside a
    reentrant checkpoint (``use_reentrant=True``) features have no gradient, and :meth:`features`
    warns once; the output of the checkpointed module itself has one. Under FSDP, the loss must also
    depend on the output of the FSDP unit that a captured layer is or belongs to, because that
    gathers the unit's parameters.

    Raises:
        TypeError, ValueError: naming the argument, at construction. The message for a pattern
            without a match lists layers of the model.
    """

    def __init__(
        self, model: nn.Module, layers: str | Sequence[str], pooling: Pooling = "cls"
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
        check_pooling(pooling)
        modules = modules_by_name(model)
        self.layers = matching_names(layers, modules)
        _refuse_scripted(model, [modules[name] for name in self.layers])
        self.pooling = pooling
        self._axes = layer_axes(self.layers, modules)
        self._warned = False
        self._model = weakref.ref(model)
        # No hook refers to the capture or to the model, and so none makes a cycle.
        self.recorder = Recorder()
        self._layers = [LayerHook(name, self.recorder) for name in self.layers]
        self._hooks: list[Hook] = [*self._layers]
        root, call = unwrapped(model), CallHook(self.recorder, self._hooks)
        self._handles = [
            # First, because a teacher has the other hooks that change arguments, too.
            root.register_forward_pre_hook(call, with_kwargs=True, prepend=True),
            *(modules[layer.name].register_forward_hook(layer) for layer in self._layers),
            root.register_forward_hook(call.leave, always_call=True),
            root.register_forward_hook(call.end),
        ]
        self._remove_at_deletion()

    def _remove_at_deletion(self) -> None:
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        self._finalizer.atexit = False

    def __enter__(self) -> Self:
        if not self._finalizer.alive:
            raise RuntimeError(
                "the hooks of this capture were removed: create another FeatureCapture"
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"FeatureCapture(layers={self.layers!r}, pooling={self.pooling!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the weak references; a copy has copies of the model and its hooks."""
        is_on = self._finalizer.alive and self.recorder.on
        state = {**vars(self), "_model": self._model(), "_is_on": is_on}
        del state["_finalizer"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        model, is_on = state.pop("_model"), state.pop("_is_on")
        vars(self).update(state)
        self._model = weakref.ref(model)
        self._remove_at_deletion()
        self.recorder.on = is_on

    def watch(self, module: nn.Module, hook: Hook) -> None:
        """Also run this hook before a module of the model is called."""
        self._hooks.append(hook)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))  # type: ignore[arg-type]

    def remove(self) -> None:
        """Remove the hooks and keep the captured outputs. Further calls have no effect."""
        self._finalizer()

    def clear(self) -> None:
        """Release what was captured, and with it the graph of that forward."""
        self.recorder.passes = (Pass(), Pass())
        self.recorder.was_replaced = False
        for hook in self._hooks:
            hook.start(0)
            hook.start(1)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend capturing within the context; earlier outputs are kept."""
        was_on, self.recorder.on = self.recorder.on, False
        try:
            yield
        finally:
            self.recorder.on = was_on

    @contextmanager
    def fresh(self, ends_early: bool = False) -> Iterator[Self]:
        """Start empty within the context, and restore the earlier outputs at its end.

        With ``ends_early``, a pass ends by ``hooks.PassEnd`` once each layer was called.

        This serves a teacher that is the student without its adapter, with the same hooks::

            with torch.no_grad(), model.disable_adapter(), capture.fresh():
                model(batch)
                teacher_features = capture.features()
        """
        recorder = self.recorder
        state, cells = {**vars(recorder)}, [hook.cells for hook in self._hooks]
        recorder.passes, recorder.on, recorder.in_call = (Pass(), Pass()), True, False
        if ends_early:
            recorder.layers_left = len(self._layers)
        for hook in self._hooks:
            hook.cells = tuple(type(cell)() for cell in hook.cells)
        try:
            yield self
        finally:
            vars(recorder).update(state)
            for hook, pair in zip(self._hooks, cells, strict=True):
                hook.cells = pair

    def features(self, mask: Masks = None) -> dict[str, Tensor]:
        """The pooled features (rows, D) of each layer, in the order of :attr:`layers`.

        Args:
            mask: (batch, tokens) boolean, True = valid, for outputs (batch, tokens, D); or a
                mapping from layers to such masks, where a layer that is missing has none. Tokens
                are selected, so NaN in padding is harmless. With ``"tokens"`` all rows remain, and
                :meth:`mask` returns the rows' mask. For (batch, D) the mask is unused; for
                (batch, C, H, W) it must be None.

        Raises:
            RuntimeError: a layer was not called since the capture was created or cleared.
            TypeError, ValueError: a layer's output or the mask has another shape or dtype, or a
                row of ``"mean"`` or ``"last"`` has no valid token (on a CPU; on a GPU, the row is
                NaN).
        """
        return self.pooled(self.all_outputs(), mask)

    def all_outputs(self) -> dict[str, Any]:
        """The captured outputs of all layers; RuntimeError if one was not called."""
        outputs = self.outputs()
        missing = [name for name in self.layers if name not in outputs]
        if missing:
            raise RuntimeError(nothing_captured(missing, self.latest.call is not None))
        return outputs

    def outputs(self) -> dict[str, Any]:
        """The captured outputs of the layers that were called."""
        cells = self._cells()
        return {name: cell.output for name, cell in cells.items() if cell.output is not None}

    def calls(self) -> dict[str, int]:
        """How often each layer was called, 0 also where torch.compile ran it."""
        return {name: cell.calls for name, cell in self._cells().items()}

    def are_final(self) -> bool:
        """Whether no later part of the pass changed what was captured first."""
        return all(cell.is_final() for cell in self._cells().values())

    def detached(self) -> list[str]:
        """The layers whose output a reentrant checkpoint detached from its graph."""
        # The output of the checkpointed module itself gets its gradient when the checkpoint ends.
        return [name for name, cell in self._cells().items() if cell.is_detached()]

    def _cells(self) -> dict[str, LayerCell]:
        return {layer.name: layer.cells[self.kind] for layer in self._layers}

    def pooled(self, outputs: Mapping[str, Any], mask: Masks = None) -> dict[str, Tensor]:
        """The features of these outputs."""
        self._warn_of_checkpoints()
        if isinstance(self.pooling, str):
            call = self.latest.call
            batch_sizes = frozenset() if call is None else call.batch_sizes()
            for name, output in outputs.items():
                _check_tensor(name, output)
                self._axes[name].check(tuple(output.shape), batch_sizes)
        return {
            name: pool(name, output, self.pooling, _of_layer(mask, name))
            for name, output in outputs.items()
        }

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask of the features' rows: (batch * tokens,) for ``"tokens"``, otherwise None."""
        if mask is None:
            return None
        check_token_mask(mask)
        return mask.flatten() if self.pooling == "tokens" else None

    @property
    def kind(self) -> int:
        """The kind of pass that counts: that of the present grad mode, else the other."""
        wanted = int(torch.is_grad_enabled())
        passes = self.recorder.passes
        has_wanted = passes[wanted].call is not None or any(
            layer.cells[wanted].output is not None for layer in self._layers
        )
        return wanted if has_wanted else 1 - wanted

    @property
    def latest(self) -> Pass:
        """The pass that counts now."""
        return self.recorder.passes[self.kind]

    def _warn_of_checkpoints(self) -> None:
        model = self._model()
        if self._warned or model is None or not (model.training and torch.is_grad_enabled()):
            return
        detached = self.detached()
        if detached and any(parameter.requires_grad for parameter in model.parameters()):
            self._warned = True
            user_warnings.warn(
                f"the features of {', '.join(map(repr, detached))} have no gradient: the layer is "
                "inside a reentrant activation checkpoint, whose forward records no graph. Use "
                "use_reentrant=False"
            )


def nothing_captured(layers: Sequence[str], was_called: bool) -> str:
    """The error of layers that were not called, in a pass of the model or without one."""
    names = ", ".join(map(repr, layers))
    if was_called:
        return (
            f"nothing was captured of {names}: the model ran, but did not call this layer, or the "
            "layer returned None. Is it on the path of that call? Was the model compiled and "
            "called before the capture was created (then call torch.compiler.reset() first)?"
        )
    return (
        f"nothing was captured of {names}: there was no pass of the model since the last call of "
        "clear(), or of rift(), which uses each pass once. Was it this model, not a copy, while "
        "the hooks were in place and not paused? Was it compiled and called before the capture "
        "was created (then call torch.compiler.reset() first)?"
    )


def _check_tensor(name: str, output: Any) -> None:
    """Refuse what a pooling by name makes no rows of."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the output of layer {name!r} must be a tensor, a tuple or list with one, or a "
            f"transformers ModelOutput; got {type(output).__name__}: choose a layer inside it, or "
            "give a function as pooling that takes the tensor out of it"
        )
    if output.is_nested:
        raise ValueError(
            f"the output of layer {name!r} must not be nested, as torch.nn's inference path makes "
            "it: torch.backends.mha.set_fastpath_enabled(False) switches it off"
        )


def _refuse_scripted(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    scripted = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    if any(layer in module.modules() for module in scripted for layer in layers):
        raise TypeError(
            "layers must not be in a module that is compiled by TorchScript, which runs no hooks; "
            f"got a {type(scripted[0]).__name__}: give the model that it was made of"
        )


def _of_layer(mask: Masks, name: str) -> Tensor | None:
    return mask.get(name) if isinstance(mask, Mapping) else mask


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
