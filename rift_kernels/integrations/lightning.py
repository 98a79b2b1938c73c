"""RIFT in Lightning; needs ``pip install ".[lightning]"``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rift_kernels.regularizer import RIFTRegularizer

from . import same_model

ADVICE = "make rift of the LightningModule that is fitted, or of a module in it"


class RIFTCallback(Callback):
    """A callback that adds a :class:`~rift_kernels.RIFTRegularizer` to the training loss.

    ::

        rift = rk.RIFTRegularizer(module.model, teacher, layers="blocks.11", group="world")
        lightning.Trainer(callbacks=[RIFTCallback(rift)]).fit(module, loader)

    Lightning has no hook that can change a loss. During ``fit``, the callback therefore wraps
    ``training_step`` and adds to the tensor or ``"loss"`` that it returns. This needs automatic
    optimisation. ``rift/...`` is logged in each step. Checkpoints include the schedule and an
    adaptive weight. The teacher is moved to the module's device.

    Args:
        rift: a regulariser of the model that ``training_step`` runs. If it has a learned rotation,
            make it an attribute of the LightningModule and give its parameters to the optimiser.
        inputs: maps a batch to what the teacher is called with: a mapping, by name; a pair of a
            tuple or list and a mapping, by position and by name; another tuple or list, or a
            tensor, by position. By default, the teacher is called as the student was.
        name: of this callback where a module has several. Checkpoints keep its state under it, and
            the metrics are ``rift/<name>/...``.

    Raises:
        TypeError, ValueError: naming the argument, or what the LightningModule lacks; for a
            regulariser of another model when ``fit`` begins.
    """

    def __init__(
        self,
        rift: RIFTRegularizer,
        inputs: Callable[[Any], Any] | None = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(rift, RIFTRegularizer):
            raise TypeError(f"rift must be a RIFTRegularizer; got {type(rift).__name__}")
        if inputs is not None and not callable(inputs):
            raise TypeError(f"inputs must be callable or None; got {type(inputs).__name__}")
        self.rift = rift
        self.inputs = inputs
        self.name = name

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint."""
        return super().state_key if self.name is None else self._generate_state_key(name=self.name)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Wrap ``training_step``."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                "RIFTCallback needs automatic optimisation; with manual optimisation add "
                "rift() to the loss yourself"
            )
        same_model.check(self.rift, pl_module, ADVICE)
        registered = {id(parameter) for parameter in pl_module.parameters()}
        if any(id(parameter) not in registered for parameter in self.rift.parameters()):
            raise ValueError(
                "rift must be an attribute of the LightningModule if it has parameters, those of a "
                "learned rotation; also give them to the optimiser; got parameters outside the "
                "module"
            )
        pl_module.training_step = self._wrapped(pl_module)  # type: ignore[method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Move the regulariser and its teacher; the module is on its device by now."""
        self.rift.to(pl_module.device)
        self.rift.move_teacher(pl_module.device)
        self.rift.clear()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Restore the module's own ``training_step``."""
        if stage == "fit":
            _restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, _: BaseException) -> None:  # noqa: ARG002
        """Restore it here too: after an error Lightning skips ``teardown``, and the next ``fit``
        would add the loss twice.
        """
        _restore(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The regulariser's state, for the checkpoint."""
        return dict(self.rift.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the regulariser's state from the checkpoint."""
        self.rift.load_state_dict(state_dict)

    def _wrapped(self, module: LightningModule) -> Callable[..., Any]:
        """The module's ``training_step``, plus the regulariser's loss."""
        original = module.training_step

        @functools.wraps(original)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(batch, *args, **kwargs)
            if output is None:  # a skipped batch, which the model may have seen
                self.rift.clear()
                return None
            positional, keywords = (
                ((), {}) if self.inputs is None else _arguments(self.inputs(batch))
            )
            loss = self.rift(*positional, **keywords)
            module.log_dict(self._metrics(), on_step=True, on_epoch=False)
            if isinstance(output, Mapping):
                return {**output, "loss": output["loss"] + loss}
            return output + loss

        training_step.is_rift = True  # type: ignore[attr-defined]
        return training_step

    def _metrics(self) -> dict[str, float]:
        metrics = self.rift.metrics()
        if self.name is None:
            return metrics
        return {f"rift/{self.name}/{key.removeprefix('rift/')}": metrics[key] for key in metrics}


def _restore(module: LightningModule) -> None:
    """Remove the wrappers of all callbacks from the ``training_step``, which may be compiled."""
    step = vars(module).pop("training_step", None)
    while hasattr(step, "is_rift"):
        step = step.__wrapped__
    if step is not None and step != module.training_step:
        module.training_step = step  # type: ignore[method-assign]


def _arguments(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``inputs`` returned, as arguments by position and by name."""
    if isinstance(value, Mapping):
        return (), dict(value)
    if isinstance(value, tuple | list) and value:
        if len(value) == 2 and isinstance(value[0], tuple | list) and isinstance(value[1], Mapping):
            return tuple(value[0]), dict(value[1])
        return tuple(value), {}
    if isinstance(value, Tensor):
        return (value,), {}
    raise TypeError(
        "inputs must return a mapping, a pair of a tuple and a mapping, a tuple or list of "
        f"arguments, or a tensor; got {type(value).__name__}"
    )
