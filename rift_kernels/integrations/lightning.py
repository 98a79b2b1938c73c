"""RIFT in Lightning; needs ``pip install ".[lightning]"``."""

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

    Lightning has no hook that can change a loss. During ``fit``, the callback therefore wraps
    ``training_step`` and adds to the tensor or ``"loss"`` that it returns. This needs automatic
    optimisation. ``rift/...`` is logged in each step. Checkpoints include the schedule and an
    adaptive weight. The teacher is moved to the module's device.

    Args:
        rift: a regulariser of the model that ``training_step`` runs. If it has a learned rotation,
            make it an attribute of the LightningModule and give its parameters to the optimiser.
        inputs: maps a batch to the teacher's inputs: a tensor, a tuple or list whose first entry is
            used, or a mapping, used without its labels. By default the batch itself.

    Raises:
        TypeError, ValueError: naming the argument, or what the LightningModule lacks.
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
        """Wrap ``training_step``."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                "RIFTCallback needs automatic optimisation; with manual optimisation add "
                "rift(batch) to the loss yourself"
            )
        registered = {id(parameter) for parameter in pl_module.parameters()}
        if any(id(parameter) not in registered for parameter in self.rift.parameters()):
            raise ValueError(
                "rift must be an attribute of the LightningModule if it has parameters, those of a "
                "learned rotation; also give them to the optimiser; got parameters outside the "
                "module"
            )
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(batch, *args, **kwargs)
            if output is None:  # a skipped batch, which the model may not have seen
                return None
            positional, keywords = arguments(self.inputs(batch), "inputs= converts any batch")
            loss = self.rift(*positional, **keywords)
            pl_module.log_dict(self.rift.metrics(), on_step=True, on_epoch=False)
            if isinstance(output, Mapping):
                return {**output, "loss": output["loss"] + loss}
            return output + loss

        pl_module.training_step = training_step  # type: ignore[method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Move the regulariser and its teacher; the module is on its device by now."""
        self.rift.to(pl_module.device)
        self.rift.move_teacher(pl_module.device)

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


def _restore(module: LightningModule) -> None:
    """Remove the wrapper, which exposes the ``training_step`` of the module's class."""
    vars(module).pop("training_step", None)
