"""Forward hooks that record a model's passes: its call, and the outputs of its layers.

A pass with gradients and one without are recorded apart, so that neither replaces the other: some
trainers run a model again under ``no_grad`` before they use what the first pass captured. The hooks
of a capture share one :class:`Recorder`. None of them refers to the capture or to the model.

torch.compile traces these hooks and guards on what they read. A pass therefore begins with the same
values each time, and an output is an attribute of an object of its own, not an entry of a shared
dictionary.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states

from . import containers

# Arguments that are no batch, or one whose tensors are found.
_PLAIN = (Tensor, Mapping, tuple, list, str, bytes, complex, float, int, type(None))


class Call(NamedTuple):
    """The arguments of a model."""

    inputs: tuple[Any, ...]
    keywords: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, those in containers included."""
        return [value for value in containers.values(self) if isinstance(value, Tensor)]

    def in_first(self) -> dict[str, Any]:
        """The values by name in the first argument, if it is a batch that has them."""
        first = next(iter((*self.inputs, *self.keywords.values())), None)
        return containers.named(first)

    def batch_sizes(self) -> frozenset[int]:
        """The first axes of all tensors, and the lengths of lists, which may be batches, too.

        Empty, for unknown, if an argument may hold a batch that is not seen, as a graph does.
        """
        arguments = (*self.inputs, *self.keywords.values())
        values = [value for argument in arguments for value in containers.values(argument)]
        if not all(isinstance(x, _PLAIN) or containers.named(x) for x in values):
            return frozenset()
        tensors = {
            x.shape[0] for x in values if isinstance(x, Tensor) and x.dim() and not x.is_nested
        }
        return frozenset(tensors | {len(x) for x in values if isinstance(x, tuple | list)})


class Autocast(NamedTuple):
    """The autocast under which a model ran."""

    device_type: str
    dtype: torch.dtype
    enabled: bool


class RandomState(NamedTuple):
    """The state of the random generators when a pass began."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def now(cls, tensors: Sequence[Tensor]) -> RandomState:
        """The state of the generators on the CPU and on the devices of these tensors."""
        return cls(torch.get_rng_state(), *get_device_states(*tensors))

    def equals(self, other: RandomState) -> bool:
        """Whether no random number was drawn between the two."""
        pairs = zip((self.cpu, *self.states), (other.cpu, *other.states), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


class PassEnd(BaseException):
    """Ends a pass whose captured layers have all run. A model that catches it just runs on."""


class Pass:
    """The latest pass of one kind, with gradients or without."""

    def __init__(self) -> None:
        self.call: Call | None = None  # None also if a layer ran by itself afterwards
        self.is_unused = False  # it has ended, and no loss was made of it
        self.versions: list[tuple[Tensor, int]] = []
        self.autocast: Autocast | None = None
        self.random: RandomState | None = None


class Hook(Protocol):
    """A hook of a part of the model."""

    cells: Any  # what it recorded, a cell for each kind of pass

    def start(self, kind: int) -> None:
        """Forget the former pass of this kind, because another begins."""


class Recorder:
    """The state that all hooks of one capture share."""

    def __init__(self) -> None:
        self.on = True
        self.keeps_random = False
        self.in_call = False  # the model itself runs, not a part of it by itself
        self.kind = 0  # of the current pass: 1 with gradients
        self.passes = (Pass(), Pass())
        self.was_replaced = False  # an unused pass with gradients was replaced by another
        self.layers_left: int | None = None  # to be called before the pass ends

    def is_recording(self) -> bool:
        """Whether hooks act: not if paused, exported, or where a backward reruns a checkpoint."""
        return self.on and not _in_export() and not _in_backward()

    def find_kind(self) -> int:
        """The kind of the current pass; a part that runs by itself has that of its own."""
        if not self.in_call:
            self.kind = int(torch.is_grad_enabled() or _in_reentrant_checkpoint())
        return self.kind

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no pass, and is off until a copy of its capture switches it on."""
        return {"keeps_random": self.keeps_random}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        vars(self).update(state, on=False)


class CallHook:
    """Three hooks of the model itself: a pass begins, leaves the model, and was whole."""

    def __init__(self, recorder: Recorder, hooks: list[Hook]) -> None:
        self.recorder = recorder
        self.hooks = hooks  # of its parts

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Note the arguments, and the state that the pass begins in."""
        recorder = self.recorder
        if not recorder.is_recording():
            return
        kind = int(torch.is_grad_enabled())
        recorder.in_call, recorder.kind = True, kind
        latest = recorder.passes[kind]
        if kind and latest.is_unused:
            recorder.was_replaced = True
        latest.is_unused = False
        for hook in self.hooks:
            hook.start(kind)
        latest.call = Call(_copied(inputs), _copied(keywords))
        tensors = latest.call.tensors()
        latest.autocast = _autocast(tensors[0].device.type) if tensors else None
        latest.random = None
        if torch.compiler.is_compiling():
            return
        latest.versions = [(x, x._version) for x in tensors if not x.is_inference()]
        if recorder.keeps_random:
            latest.random = RandomState.now(tensors)

    def leave(self, *_: Any) -> None:
        """The forward hook that also runs after an exception."""
        self.recorder.in_call = False

    def end(self, *_: Any) -> None:
        """The forward hook that does not."""
        recorder = self.recorder
        if recorder.is_recording():
            recorder.passes[recorder.kind].is_unused = True


class LayerCell:
    """What a layer did in a pass."""

    def __init__(self) -> None:
        self.output: Any = None  # a tensor, or what has none, for a function as pooling
        self.version: int | None = None  # of that tensor, when the layer ended
        self.calls = 0
        self.in_checkpoint = False

    def is_final(self) -> bool:
        """Whether the layer was called once, and its output not changed in place since."""
        return (
            self.calls == 1 and self.version is not None and _version(self.output) == self.version
        )

    def is_detached(self) -> bool:
        """Whether a checkpoint detached the output from its graph."""
        is_tensor = isinstance(self.output, Tensor)
        return self.in_checkpoint and is_tensor and not self.output.requires_grad


class LayerHook:
    """The forward hook of a layer."""

    def __init__(self, name: str, recorder: Recorder) -> None:
        self.name = name
        self.recorder = recorder
        self.cells = (LayerCell(), LayerCell())

    def start(self, kind: int) -> None:
        """Forget the former pass of this kind."""
        cell = self.cells[kind]
        cell.output, cell.calls, cell.in_checkpoint = None, 0, False

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        """Keep the output; end the pass where nothing else is captured in it."""
        recorder = self.recorder
        if not recorder.is_recording():
            return
        kind = recorder.find_kind()
        cell, latest = self.cells[kind], recorder.passes[kind]
        if not recorder.in_call:
            latest.call = None  # it is not of these outputs
        tensor = first_tensor(output)
        cell.output = output if tensor is None else tensor
        cell.in_checkpoint = _in_reentrant_checkpoint()
        if torch.compiler.is_compiling():
            return
        cell.calls += 1
        cell.version = _version(tensor)
        # A model's forward may begin an autocast of its own, as accelerate's do, or end one.
        is_known = recorder.in_call and latest.autocast is not None and latest.autocast.enabled
        if tensor is not None and not is_known:
            latest.autocast = _autocast(tensor.device.type)
        if recorder.layers_left is not None and cell.calls == 1:
            recorder.layers_left -= 1
            if recorder.layers_left == 0:
                raise PassEnd

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "recorder": self.recorder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def first_tensor(output: Any) -> Tensor | None:
    """The tensor of an output: itself, the first of a tuple, or the last hidden state."""
    values: Any = (output,)
    if isinstance(output, tuple | list):
        values = output
    elif hasattr(output, "to_tuple"):  # a transformers ModelOutput
        values = (getattr(output, "last_hidden_state", None), *output.to_tuple())
    return next((value for value in values if isinstance(value, Tensor)), None)


def _version(x: Any) -> int | None:
    """The number of changes in place of a tensor that counts them."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else None


def _in_export() -> bool:
    """Whether torch.export traces the model, with fake tensors."""
    # Inside torch.compile, older versions of torch say so, too.
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


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


def _autocast(device_type: str) -> Autocast | None:
    if device_type == "meta":  # has none, which torch 2.11 cannot tell inside torch.compile
        return None
    enabled = torch.is_autocast_enabled(device_type)
    return Autocast(device_type, torch.get_autocast_dtype(device_type), enabled)


def _copied(value: Any) -> Any:
    """The containers of a value copied: models add their outputs to the batch that they get."""
    return containers.mapped(lambda each: each, value)
