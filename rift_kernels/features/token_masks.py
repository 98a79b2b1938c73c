"""The mask of each layer's tokens: the user's, or that of the student's own call.

A model may hold several sequences: audio samples and their frames, the tokens of an encoder and of
a decoder, a text beside an image. The mask of a layer is the one that the nearest module around it
was called with. Every module around a captured layer is therefore watched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .capture import FeatureCapture
from .forward_pass import named_arguments, parameters, unwrapped
from .hooks import Call, Recorder
from .layer_names import modules_by_name, paths_to

OneMask = str | Tensor | None | Callable[[Mapping[str, Any]], Tensor | None]
TokenMask = OneMask | Mapping[str, OneMask]

AUTO = "auto"
# Arguments that mark tokens, and whether they mark padding instead.
_MARKS_PADDING = {
    "attention_mask": False,  # transformers
    "src_key_padding_mask": True,  # torch.nn
    "tgt_key_padding_mask": True,
}
# What only a decoder gets: the tokens that it attends to beside its own.
_ATTENDED = ("encoder_hidden_states", "memory")
_IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's ignore_index


class LayerMask(NamedTuple):
    """A layer's mask, (batch, tokens) boolean or None, and where it comes from."""

    mask: Tensor | None
    source: str
    is_chosen: bool = False  # by the user
    was_dropped: bool = False  # a mask of the model's, which is not of this layer's tokens


class Seen(NamedTuple):
    """What the call of a module says of its tokens."""

    name: str  # of the argument that is a mask
    mask: Tensor | None
    leading: tuple[tuple[int, ...], ...]  # the first two axes of each argument
    is_decoder: bool
    takes_mask: bool  # whether the module's forward has an argument for one


class _Cell:
    def __init__(self) -> None:
        self.seen: Seen | None = None


class MaskHook:
    """The forward pre-hook of a module around a layer."""

    def __init__(self, recorder: Recorder, positions: dict[str, int]) -> None:
        self.recorder = recorder
        self.positions = positions  # of the arguments, where they are given without names
        self.cells = (_Cell(), _Cell())

    def start(self, kind: int) -> None:
        """Forget the former pass of this kind."""
        self.cells[kind].seen = None

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Note the mask of this call."""
        recorder = self.recorder
        if not recorder.is_recording():
            return
        self.cells[recorder.find_kind()].seen = self.look(Call(inputs, keywords))

    def look(self, call: Call) -> Seen:
        """What these arguments say."""
        values = [*call.inputs, *call.keywords.values()]
        named = dict(call.keywords)
        for name, position in self.positions.items():
            if position < len(call.inputs):
                named[name] = call.inputs[position]
        batch = call.in_first()  # as sentence-transformers has it
        named = {**batch, **named}
        values += batch.values()
        tensors = [value for value in values if isinstance(value, Tensor)]
        leading = tuple(
            (x.shape[0], x.shape[1]) for x in tensors if x.dim() > 1 and not x.is_nested
        )
        is_decoder = any(named.get(name) is not None for name in _ATTENDED)
        takes_mask = any(name in self.positions for name in _MARKS_PADDING)
        for name in _MARKS_PADDING:
            mask = named.get(name)
            if isinstance(mask, Tensor):
                return Seen(name, mask, leading, is_decoder, takes_mask)
        return Seen("", None, leading, is_decoder, takes_mask)

    def __getstate__(self) -> dict[str, Any]:
        return {"recorder": self.recorder, "positions": self.positions}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class TokenMasks:
    """The masks of a capture's layers by the user's setting."""

    def __init__(self, setting: TokenMask, capture: FeatureCapture, model: nn.Module) -> None:
        self._model = model
        self._pooling = capture.pooling
        self._settings = _by_layer(setting, capture.layers)
        self._hooks: dict[str, MaskHook] = {}
        modules = modules_by_name(model)
        for layer, each in self._settings.items():
            if not _is_auto(each) or self._pooling == "cls":
                continue
            for path in paths_to(layer):
                if path in modules and path not in self._hooks:
                    module = modules[path] if path else unwrapped(model)
                    hook = MaskHook(capture.recorder, _positions(module))
                    self._hooks[path] = hook
                    capture.watch(module, hook)

    def of(
        self,
        outputs: Mapping[str, Any],
        call: Call | None,
        kind: int,
        is_recorded: bool = True,
        setting: TokenMask = AUTO,
    ) -> dict[str, LayerMask]:
        """The mask of each layer with tokens.

        Args:
            outputs: of the student's layers.
            call: the arguments of the student, if they are known.
            kind: of the student's pass.
            is_recorded: whether the call is the student's own, not that of the user's.
            setting: overrides the constructor's, unless it is ``"auto"``.
        """
        if self._pooling == "cls":
            return {}
        settings = self._settings if _is_auto(setting) else _by_layer(setting, outputs)
        masks = {}
        for layer, output in outputs.items():
            if not isinstance(output, Tensor) or output.dim() == 2:
                continue
            if not _is_auto(settings[layer]):
                masks[layer] = _chosen(settings[layer], call, self._model)
                continue
            seen = {path: hook.cells[kind].seen for path, hook in self._hooks.items()}
            if call is not None and not is_recorded and "" in self._hooks:
                seen[""] = self._hooks[""].look(call)
            chain = [(path, seen[path]) for path in paths_to(layer) if seen.get(path)]
            labels = call.keywords.get("labels") if call is not None else None
            masks[layer] = _nearest(chain, labels, output)  # type: ignore[arg-type]
        return masks

    def overlooked(
        self, outputs: Mapping[str, Any], call: Call | None, masks: Mapping[str, LayerMask]
    ) -> tuple[str, list[str]] | None:
        """An argument that may be the mask of layers that have none, and these layers."""
        named = {} if call is None else named_arguments(self._model, call)
        for name, value in named.items():
            if name in _MARKS_PADDING or not isinstance(value, Tensor) or value.dim() != 2:
                continue
            if value.dtype != torch.bool and not re.search("mask|pad|valid", name.lower()):
                continue
            layers = [
                layer
                for layer, found in masks.items()
                if found.mask is None and not found.is_chosen
                if value.shape == outputs[layer].shape[:2]
            ]
            if layers:
                return name, layers
        return None


def _is_auto(setting: TokenMask) -> bool:
    return isinstance(setting, str) and setting == AUTO  # a tensor compares each element


def _by_layer(setting: TokenMask, layers: Sequence[str] | Mapping[str, Any]) -> dict[str, OneMask]:
    """The setting of each layer; in a mapping, the first pattern that matches it counts."""
    if not isinstance(setting, Mapping):
        if not (setting is None or isinstance(setting, str | Tensor) or callable(setting)):
            raise TypeError(
                "token_mask must be 'auto', the name of an argument, a boolean tensor, a function "
                "of the call's arguments, None, or a mapping from layers to these; got "
                f"{type(setting).__name__}"
            )
        return dict.fromkeys(layers, setting)
    unknown = [name for name in setting if not any(fnmatchcase(layer, name) for layer in layers)]
    if unknown:
        raise ValueError(
            f"token_mask must map names or patterns of the layers {', '.join(map(repr, layers))}; "
            f"got {unknown[0]!r}"
        )
    settings: dict[str, OneMask] = {}
    for layer in layers:
        matches = [each for name, each in setting.items() if fnmatchcase(layer, name)]
        settings[layer] = _by_layer(matches[0], [layer])[layer] if matches else AUTO
    return settings


def _positions(module: nn.Module) -> dict[str, int]:
    names, _ = parameters(module)
    return {n: i for i, n in enumerate(names) if n in _MARKS_PADDING or n in _ATTENDED}


def _nearest(chain: Sequence[tuple[str, Seen]], labels: Any, output: Tensor) -> LayerMask:
    """The mask that the nearest module around a layer was called with."""
    mask, source, was_dropped, unusable = None, "none", False, ""
    in_decoder = False
    for path, seen in chain:
        where = f"{path}.{seen.name}".removeprefix(".")
        enters_decoder = seen.is_decoder and not in_decoder
        in_decoder = in_decoder or seen.is_decoder
        if mask is not None and seen.mask is not None and _is_added_form(seen.mask, mask):
            continue
        if seen.mask is not None and seen.mask.dim() == 2:
            _refuse_inner_numbers(seen.mask, where, path)
            mask, source, was_dropped, unusable = _as_booleans(seen.mask, where), where, False, ""
            if _MARKS_PADDING[seen.name]:
                mask, source = mask.logical_not(), f"~{where}"
        elif mask is not None and (enters_decoder or tuple(mask.shape) not in seen.leading):
            was_dropped = not _is_another_input(seen, chain[0][1], mask)
            mask, source = None, f"none ({source} is not of the tokens in {path!r})"
        elif mask is None and seen.mask is not None and not path:
            unusable = f"{where} of shape {tuple(seen.mask.shape)}"
    are_labels = isinstance(labels, Tensor) and labels.shape == output.shape[:2]
    if mask is None and in_decoder and are_labels:
        return LayerMask(labels != _IGNORED_LABEL, "labels != -100")
    if unusable:
        raise ValueError(
            f"token_mask must say which tokens are valid, which {unusable} does not: got 'auto'. "
            "Give a boolean mask (batch, tokens), True = valid, or None if there is no padding"
        )
    return LayerMask(mask, source, was_dropped=was_dropped)


def _is_another_input(seen: Seen, outer: Seen, mask: Tensor) -> bool:
    """Whether a module gets another of the model's inputs, as images beside a text are."""
    others = set(outer.leading) - {tuple(mask.shape)}
    return not seen.takes_mask and bool(seen.leading) and others.issuperset(seen.leading)


def _refuse_inner_numbers(mask: Tensor, name: str, path: str) -> None:
    if path and mask.is_floating_point():
        raise TypeError(
            f"token_mask must be given for layers in {path!r}: the mask that the model made for "
            f"them, {name}, is {mask.dtype}, added to scores; got 'auto'. Give a boolean mask of "
            f"these {tuple(mask.shape)} tokens, such as lambda call: torch.nn.functional.pad("
            "call['attention_mask'].bool(), (0, more)), or None to compare them all"
        )


def _is_added_form(mask: Tensor, outer: Tensor) -> bool:
    """Whether a module has made numbers that are added to scores of the mask that it got."""
    return mask.is_floating_point() and mask.shape == outer.shape


def _chosen(setting: OneMask, call: Call | None, model: nn.Module) -> LayerMask:
    """The mask that the user's setting chooses."""
    if setting is None:
        return LayerMask(None, "none", is_chosen=True)
    if isinstance(setting, Tensor):
        return LayerMask(setting, "token_mask", is_chosen=True)
    if call is None:
        raise RuntimeError(
            f"token_mask={setting!r} needs the student's arguments, and the student itself was not "
            "called: give them to rift(...)"
        )
    named = named_arguments(model, call)
    if not isinstance(setting, str):
        try:
            return LayerMask(setting(named), "token_mask", is_chosen=True)
        except KeyError as error:
            error.add_note(f"token_mask: the arguments are {', '.join(map(repr, named)) or 'none'}")
            raise
    if setting not in named:
        raise ValueError(
            "token_mask must name an argument of the student's call; got "
            f"{setting!r}, which is not one of {', '.join(map(repr, named)) or 'its (none)'}"
        )
    mask = named[setting]
    mask = None if mask is None else _as_booleans(mask, setting)
    return LayerMask(mask, setting, is_chosen=True)


def _as_booleans(mask: Any, name: str) -> Tensor:
    """A mask with True at valid tokens; integers are 0 at padding."""
    if isinstance(mask, Tensor) and mask.is_floating_point():
        raise TypeError(
            f"{name} must be boolean or integer to tell which tokens are valid; got {mask.dtype}: "
            f"give token_mask=lambda call: call[{name.rpartition('.')[2]!r}] == 0 if it is added "
            "to scores (0 = valid, -inf = padding), or == 1 if it is 1 at valid tokens"
        )
    return mask.bool()
