"""The teacher's pass: the model called as the student was, and no longer than needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.checkpoint import set_device_states

from . import containers
from .adapters import without_adapters
from .capture import FeatureCapture
from .forward_pass import LABELS, evaluating, innermost, parameters, unwrapped
from .hooks import Call, CallHook, LayerHook, Pass, PassEnd, RandomState
from .layer_names import modules_by_name
from .placement import is_placed_by_hooks
from .training_warnings import TrainingWarnings

Forward = Callable[..., object]

# What a pass adds keys and values to, in transformers.
_CACHES = ("past_key_values", "cache", "cache_params", "decoder_cache")
_NOTE = (
    "This was the teacher's pass. The teacher is called as the student was; rift(...) with "
    "arguments, or forward=lambda teacher, *args, **kwargs: ..., calls it in another way"
)


class TeacherPass:
    """A frozen model, called as the student was.

    Args:
        student: the model that is trained.
        teacher: the frozen one, or None for the student with its adapters disabled.
        capture: of the teacher's layers.
        names: the teacher's layers by the names of the student's.
        forward: the user's way to call the teacher.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        capture: FeatureCapture,
        names: Mapping[str, str],
        forward: Forward | None,
    ) -> None:
        self.capture = capture
        self._student = student
        self._is_student = teacher is None
        if teacher is not None:  # outside of its passes, nothing of its calls is kept
            capture.recorder.on = False
        self._model = unwrapped(student if teacher is None else teacher)
        self._names = names
        self._forward = forward
        modules = modules_by_name(self._model)
        layers = {modules[name] for name in capture.layers}
        self._around = [m for m in self._model.modules() if not layers.isdisjoint(m.modules())]
        # The user's function may use what the pass returns.
        self._may_end_early = forward is None and not is_placed_by_hooks(self._model)
        self._are_final = False  # the first outputs of layers, in a pass that did not end early

    def features(
        self,
        given: Call | None,
        student: FeatureCapture,
        compared: Sequence[str],
        masks: Mapping[str, Tensor | None],
        warnings: TrainingWarnings,
    ) -> dict[str, Tensor]:
        """The teacher's features of the compared layers, by the names of the student's.

        Args:
            given: the user's arguments for the teacher; None for those of the student's pass.
            student: what was captured of that pass.
            compared: the layers that the student called. The teacher must call all that it has.
            masks: of the tokens of each of these.
            warnings: are told of random numbers in the first step.
        """
        latest, calls = student.latest, student.calls()
        call = _recorded(latest) if given is None else given
        if student.recorder.keeps_random and latest.random is None:
            raise RuntimeError(
                "replay_rng must be False where the student itself was not called, or is compiled "
                "as a part of another model: its random state is not known"
            )
        ends_early = self._ends_early(calls)
        own_masks = {self._names[name]: masks.get(name) for name in compared}

        def run() -> dict[str, Tensor]:
            adapters_off = without_adapters(self._student) if self._is_student else nullcontext()
            with adapters_off, self.capture.fresh(ends_early) as capture:
                self._run(call, latest)
                if not ends_early:
                    self._are_final = capture.are_final()
                outputs = capture.all_outputs()
                return capture.pooled({name: outputs[name] for name in own_masks}, own_masks)

        before = RandomState.now(call.tensors()) if warnings.is_first_step else None
        features = run()
        if before is not None and not before.equals(RandomState.now(call.tensors())):
            # Numbers that are drawn need not be used: a second pass tells.
            warnings.warn_of_random_numbers(features, run())
        return {name: features[self._names[name]] for name in compared}

    def _ends_early(self, calls: Mapping[str, int]) -> bool:
        """Whether the pass may end after the last layer, as the student called its layers.

        Only if nothing after it is known to change an output: another call of its layer, or an
        operation in place; and if no hook is skipped, which may undo what another did before.
        """
        are_final = self._are_final and all(count <= 1 for count in calls.values())
        has_hooks = bool(_global_forward_hooks) or any(map(_has_forward_hooks, self._around))
        return self._may_end_early and are_final and not has_hooks

    def _run(self, call: Call, latest: Pass) -> None:
        """Run the teacher in eval mode and without gradients."""
        model = self._model
        with torch.no_grad(), evaluating(model), _only(self.capture, model), _state_of(latest):
            try:
                if self._forward is not None:
                    self._forward(model, *call.inputs, **call.keywords)
                else:
                    inputs, keywords = _accepted(model, self._student, call)
                    model(*inputs, **keywords)
            except PassEnd:
                pass
            except Exception as error:
                error.add_note(_NOTE)
                raise


def _recorded(latest: Pass) -> Call:
    """The arguments that the student's pass was called with, if they are still those.

    Raises:
        RuntimeError: the student itself was not called, or has changed or used up its inputs.
    """
    if latest.call is None:
        raise RuntimeError(
            "the student itself was not called, only parts of it, or one of its layers again after "
            "it, so the teacher's arguments are not known: call rift(...) with them (a "
            "RIFTCallback has inputs= for that), and set forward= if the teacher, too, is to run "
            "in parts"
        )
    for name in _CACHES:
        if latest.call.keywords.get(name) is not None:
            raise RuntimeError(
                f"{name} must be None in the student's call, because its pass adds to the cache; "
                f"got {type(latest.call.keywords[name]).__name__}: call rift(...) with the "
                "teacher's arguments"
            )
    if any(isinstance(value, Iterator) for value in containers.values(latest.call)):
        raise RuntimeError(
            "the student's arguments must not be iterators, which its pass has used up: call "
            "rift(...) with the teacher's arguments"
        )
    if any(tensor._version != version for tensor, version in latest.versions):
        raise RuntimeError(
            "an input of the student was changed in place after its pass began, so the teacher "
            "would see another: call rift(...) with the arguments for the teacher"
        )
    return latest.call


def _has_forward_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks, not of a capture, that do not run after an exception."""
    always = module._forward_hooks_always_called
    hooks = [hook for key, hook in module._forward_hooks.items() if key not in always]
    owners = [getattr(hook, "__self__", hook) for hook in hooks]
    return not all(isinstance(owner, CallHook | LayerHook) for owner in owners)


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
    names, takes_rest = parameters(teacher)
    # Of another class, it may ignore the rest, or hand it to functions that know no labels.
    is_same_class = type(innermost(teacher)) is type(innermost(student))
    takes_labels = takes_rest and (is_same_class or not names)
    keywords = {
        name: value
        for name, value in call.keywords.items()
        if name not in LABELS or name in names or takes_labels
    }
    # Without a cache, transformers reads from positions which sequences are packed into one.
    if "use_cache" in names[len(call.inputs) :] and call.keywords.get("position_ids") is None:
        keywords["use_cache"] = False
    accepted = Call(call.inputs, keywords)
    dtypes = _dtypes(teacher)
    if len(dtypes) != 1 or dtypes == _dtypes(student):
        return accepted
    return _cast(accepted, *dtypes)


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}


def _cast(call: Call, dtype: torch.dtype) -> Call:
    """A call with its floating tensors in a dtype, unless autocast casts them."""

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value if torch.is_autocast_enabled(value.device.type) else value.to(dtype)

    return Call(*containers.mapped(cast, tuple(call)))
