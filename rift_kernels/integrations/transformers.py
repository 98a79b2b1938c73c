"""RIFT in the Trainer of Hugging Face: ``pip install ".[transformers]"``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from rift_kernels.regularizer import RIFTRegularizer
from rift_kernels.weighting import AdaptiveWeight

FILE = "rift.pt"  # in a checkpoint's folder


class RIFTTrainer(Trainer):
    """A ``Trainer`` that adds a :class:`~rift_kernels.RIFTRegularizer` to the training loss.

    ::

        rift = rk.RIFTRegularizer(model, teacher, layers="vit.layers.11", group="world")
        trainer = RIFTTrainer(model=model, args=args, train_dataset=data, rift=rift)
        trainer.train()

    Everything else is as in ``Trainer``, whose arguments it takes. The teacher is moved to the
    training's device and runs under its autocast. Evaluation is left alone, its loss too. The
    loss counts the same for any ``gradient_accumulation_steps``; each micro-batch is compared for
    itself. ``rift/...`` is logged with the loss, the parameters of a learned rotation are given to
    the optimiser, and the schedule and an adaptive weight are saved in checkpoints.

    Args:
        rift: made of the same ``model``; with ``group="world"`` the batch of all processes is
            compared.

    Raises:
        TypeError, ValueError: naming the argument; for a model in ``nn.DataParallel``, which copies
            it without its hooks: start one process a GPU, by torchrun.
    """

    def __init__(self, *args: Any, rift: RIFTRegularizer, **named: Any) -> None:
        if not isinstance(rift, RIFTRegularizer):
            raise TypeError(f"rift must be a RIFTRegularizer; got {type(rift).__name__}")
        self.rift = rift
        super().__init__(*args, **named)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"RIFTTrainer needs one GPU a process; got {self.args.n_gpu}: start it by torchrun"
            )
        _check_shared(rift, self.args.world_size)
        rift.to(self.args.device)
        rift.move_teacher(self.args.device)
        self.add_callback(_Saves(rift))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **named: Any,
    ) -> Any:
        """The task's loss, and while training the regulariser's beside it."""
        given = dict(inputs)  # label smoothing takes the labels out
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **named
        )
        if model.training:
            with self.accelerator.autocast():
                added = self.rift(**given)
            if self._is_sum_over_micro_batches(num_items_in_batch):
                added = added / self.current_gradient_accumulation_steps
            loss = loss + added.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _is_sum_over_micro_batches(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the Trainer leaves the loss as it is, or divides it by the micro-batches."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return bool(said)
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(counted or self.compute_loss_func is not None)

    def log(self, logs: dict[str, float], *args: Any, **named: Any) -> None:
        """With the loss, how similar the layers are and what weighs it."""
        if "loss" in logs and self.rift.distances:
            logs = {**logs, **self.rift.metrics()}
        super().log(logs, *args, **named)

    def create_optimizer(self, *args: Any, **named: Any) -> torch.optim.Optimizer:
        """As in Trainer; a learned rotation is trained, too."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **named)
        parameters = list(self.rift.parameters())
        if made and parameters:
            optimizer.add_param_group({"params": parameters, "weight_decay": 0.0})
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **named: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **named)
        path = Path(resume_from_checkpoint) / FILE
        if not path.exists():
            raise FileNotFoundError(
                f"resume_from_checkpoint must be a checkpoint of a RIFTTrainer; {path} is missing"
            )
        self.rift.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def _check_shared(rift: RIFTRegularizer, processes: int) -> None:
    """What each process finds for itself would differ, and one process alone saves it."""
    own = list(rift.parameters()) or isinstance(rift.loss.weight, AdaptiveWeight)
    if processes > 1 and own and rift.loss.group is None:
        raise ValueError(
            "rift must have group='world' for an adaptive weight or a learned rotation in "
            f"{processes} processes; got group=None"
        )


class _Saves(TrainerCallback):
    """Writes the regulariser's state into each checkpoint."""

    def __init__(self, rift: RIFTRegularizer) -> None:
        self.rift = rift

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Who writes the model does, after the Trainer has made the folder: one, or one a node."""
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.rift.state_dict(), folder / FILE)
