"""RIFT in Lightning: ``pip install ".[lightning]"``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rift_kernels.features.forward_pass import arguments
from rift_kernels.regularizer import RIFTRegularizer


class RIFTCallback(Callback):
    """A callback that adds a :class:`~rift_kernels.RIFTRegularizer` to the training loss.

    ::

        rift = rk.RIFTRegularizer(module.model, teacher, layers="blocks.11", group="world")
        lightning.Trainer(callbacks=[RIFTCallback(rift)]).fit(module, loader)

    Lightning has no hook that may change a loss, so for the time of ``fit`` the callback stands
    around ``training_step``, whose tensor or ``"loss"`` it adds to. It needs automatic
    optimisation. ``rift/...`` is logged each step, and the schedule and an adaptive weight are
    saved in checkpoints. The teacher is moved to the module's device.

    Args:
        rift: made of the model that ``training_step`` runs. A learned rotation has parameters: make
            ``rift`` an attribute of the LightningModule and give them to the optimiser.
        inputs: what of a batch the teacher is called with; by default a tensor, the first entry of
            a tuple or list, or a mapping without its labels.

    Raises:
        TypeError, ValueError: naming the argument, or the module where it does not fit.
    """

    def __init__(
        self, rift: RIFTRegularizer, inputs: Callable[[Any], Any] = lambda batch: batch
    ) -> None:
        if not isinstance(rift, RIFTRegularizer):
            raise TypeError(f"rift must be a RIFTRegularizer; got {type(rift).__name__}")
        if not callable(inputs):
            raise TypeError(f"inputs must be callable; got {type(inputs).__name__}")
        self.rift = rift
        self.inputs = inputs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Step around ``training_step``."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                "RIFTCallback needs automatic optimisation; with manual optimisation add "
                "rift(batch) to the loss yourself"
            )
        known = {id(parameter) for parameter in pl_module.parameters()}
        if any(id(parameter) not in known for parameter in self.rift.parameters()):
            raise ValueError(
                "rift has parameters, a learned rotation, that the LightningModule does not know: "
                "make it an attribute of the module and give them to the optimiser"
            )
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(batch: Any, *args: Any, **named: Any) -> Any:
            output = original(batch, *args, **named)
            if output is None:  # a batch to skip, of which the model may have seen nothing
                return None
            positional, by_name = arguments(self.inputs(batch), "inputs= takes any")
            added = self.rift(*positional, **by_name)
            pl_module.log_dict(self.rift.metrics(), on_step=True, on_epoch=False)
            if isinstance(output, Mapping):
                return {**output, "loss": output["loss"] + added}
            return output + added

        pl_module.training_step = training_step  # type: ignore[method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """The module is on its device now."""
        self.rift.to(pl_module.device)
        self.rift.move_teacher(pl_module.device)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """The module is what it was."""
        if stage == "fit":
            _restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, _: BaseException) -> None:  # noqa: ARG002
        """Lightning calls no ``teardown`` then, and the next ``fit`` would add the loss twice."""
        _restore(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Part of the checkpoint."""
        return dict(self.rift.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.rift.load_state_dict(state_dict)


def _restore(module: LightningModule) -> None:
    """The step that the module's class has."""
    vars(module).pop("training_step", None)
