"""The teacher's pass: the model called as the student was, and no longer than needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_device_states

from .capture import FeatureCapture
from .forward_pass import LABELS, evaluating, parameters
from .hooks import Call, LayerHook, Pass, PassEnd, RandomState

Forward = Callable[..., object]

# What a pass adds keys and values to, in transformers.
_CACHES = ("past_key_values", "cache", "cache_params", "decoder_cache")
_NOTE = (
    "This was the teacher's pass. The teacher is called as the student was; rift(...) with "
    "arguments, or forward=lambda teacher, *args, **kwargs: ..., calls it in another way"
)


def recorded(latest: Pass) -> Call:
    """The arguments that the student's pass was called with, if they are still those.

    Raises:
        RuntimeError: the student itself was not called, or has changed its inputs.
    """
    if latest.call is None:
        raise RuntimeError(
            "the student itself was not called, only parts of it, so the teacher's arguments are "
            "not known: call rift(...) with them, and forward= if the teacher, too, is to run in "
            "parts"
        )
    for name in _CACHES:
        if latest.call.keywords.get(name) is not None:
            raise RuntimeError(
                f"{name} must be None in the student's call, because its pass adds to the cache; "
                f"got {type(latest.call.keywords[name]).__name__}: call rift(...) with the "
                "teacher's arguments"
            )
    if any(tensor._version != version for tensor, version in latest.versions):
        raise RuntimeError(
            "an input of the student was changed in place after its pass began, so the teacher "
            "would see another: call rift(...) with the arguments for the teacher"
        )
    return latest.call


def run(
    teacher: nn.Module,
    student: nn.Module,
    call: Call,
    latest: Pass,
    forward: Forward | None,
    capture: FeatureCapture,
) -> None:
    """Run the teacher in eval mode without gradients, for a capture to see.

    Args:
        teacher: the model inside DDP.
        student: whose dtype the arguments have.
        call: the arguments.
        latest: the student's pass, whose autocast and random state the teacher gets.
        forward: the user's way to call the teacher.
        capture: of the teacher's layers, fresh.
    """
    with torch.no_grad(), evaluating(teacher), _only(capture, teacher), _state_of(latest):
        try:
            if forward is not None:
                forward(teacher, *call.inputs, **call.keywords)
            else:
                inputs, keywords = _accepted(teacher, student, call)
                teacher(*inputs, **keywords)
        except PassEnd:
            pass
        except Exception as error:
            error.add_note(_NOTE)
            raise


def may_end_early(teacher: nn.Module) -> bool:
    """Whether a pass that ends after the last captured layer leaves the teacher as it was.

    FSDP, DeepSpeed and accelerate move parameters before and after each module's call.
    """
    for module in teacher.modules():
        names = {base.__name__ for base in type(module).__mro__}
        if names & {"FullyShardedDataParallel", "FSDPModule"} or hasattr(module, "_hf_hook"):
            return False
    return not any(hasattr(parameter, "ds_id") for parameter in teacher.parameters())


@contextmanager
def _only(capture: FeatureCapture, model: nn.Module) -> Iterator[None]:
    """Pause all captures of a model but one."""
    recorders = {
        id(hook.recorder): hook.recorder
        for module in model.modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, LayerHook) and hook.recorder is not capture.recorder
    }
    states = [(recorder, recorder.on) for recorder in recorders.values()]
    for recorder, _ in states:
        recorder.on = False
    try:
        yield
    finally:
        for recorder, was_on in states:
            recorder.on = was_on


@contextmanager
def _state_of(latest: Pass) -> Iterator[None]:
    """The autocast of the student's pass, and the random state that it began in, if kept."""
    autocast = latest.autocast
    with contextlib.ExitStack() as stack:
        if autocast is not None:
            stack.enter_context(
                torch.autocast(autocast.device_type, autocast.dtype, autocast.enabled)
            )
        if latest.random is not None:
            stack.enter_context(_replayed(latest.random))
        yield


@contextmanager
def _replayed(state: RandomState) -> Iterator[None]:
    with torch.random.fork_rng(state.devices):
        torch.set_rng_state(state.cpu)
        set_device_states(state.devices, state.states)
        yield


def _accepted(teacher: nn.Module, student: nn.Module, call: Call) -> Call:
    """The arguments that the teacher takes: without a cache, and labels only where it has them."""
    names, takes_any = parameters(teacher)
    keywords = {
        name: value
        for name, value in call.keywords.items()
        if name not in LABELS or name in names or takes_any
    }
    if "use_cache" in names[len(call.inputs) :]:
        keywords["use_cache"] = False
    accepted = Call(call.inputs, keywords)
    dtypes = _dtypes(teacher)
    if len(dtypes) != 1 or dtypes == _dtypes(student):
        return accepted
    return Call(*_cast(accepted, *dtypes))


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Arguments with floating tensors in a dtype, unless autocast casts them."""
    if isinstance(value, Tensor):
        is_cast = value.is_floating_point() and not torch.is_autocast_enabled(value.device.type)
        return value.to(dtype) if is_cast else value
    if isinstance(value, Mapping):
        return {name: _cast(each, dtype) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [_cast(each, dtype) for each in value]
    return value
