"""RIFT in the Hugging Face Trainer; needs ``pip install ".[transformers]"``."""

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

    Everything else, including the other arguments, is as in ``Trainer``. The teacher is moved to
    the training device and runs under the same autocast. Evaluation and its loss are unchanged. The
    weight of the loss does not depend on ``gradient_accumulation_steps``; each micro-batch is
    compared separately. ``rift/...`` is logged with the loss. The optimiser gets the parameters of
    a learned rotation. Checkpoints include the schedule and an adaptive weight.

    Args:
        rift: a regulariser of the same ``model``; ``group="world"`` compares the batch of all
            processes.

    Raises:
        TypeError, ValueError: naming the argument; also for a model in ``nn.DataParallel``, which
            copies it without its hooks. Start one process per GPU with torchrun instead.
        FileNotFoundError: at ``train``, if ``resume_from_checkpoint`` is not from a RIFTTrainer.
    """

    def __init__(self, *args: Any, rift: RIFTRegularizer, **kwargs: Any) -> None:
        if not isinstance(rift, RIFTRegularizer):
            raise TypeError(f"rift must be a RIFTRegularizer; got {type(rift).__name__}")
        self.rift = rift
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"RIFTTrainer needs one GPU per process; got {self.args.n_gpu}: start it with "
                "torchrun"
            )
        _check_shared(rift, self.args.world_size)
        rift.to(self.args.device)
        rift.move_teacher(self.args.device)
        self.add_callback(_SaveCallback(rift))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The task's loss, plus the regulariser's during training."""
        rift_inputs = dict(inputs)  # copied, because label smoothing removes the labels
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if model.training:
            with self.accelerator.autocast():
                rift_loss = self.rift(**rift_inputs)
            if self._is_sum_over_micro_batches(num_items_in_batch):
                rift_loss = rift_loss / self.current_gradient_accumulation_steps
            loss = loss + rift_loss.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _is_sum_over_micro_batches(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the Trainer sums the losses of micro-batches instead of averaging them."""
        is_scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if is_scaled is not None:
            return bool(is_scaled)
        counts_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(counts_items or self.compute_loss_func is not None)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the regulariser's metrics with the loss."""
        if "loss" in logs and self.rift.distances:
            logs = {**logs, **self.rift.metrics()}
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in ``Trainer``, plus the parameters of a learned rotation."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        parameters = list(self.rift.parameters())
        if is_new and parameters:
            optimizer.add_param_group({"params": parameters, "weight_decay": 0.0})
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        path = Path(resume_from_checkpoint) / FILE
        if not path.exists():
            raise FileNotFoundError(
                "resume_from_checkpoint must be a checkpoint of a RIFTTrainer; "
                f"got one where {path} is missing"
            )
        self.rift.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def _check_shared(rift: RIFTRegularizer, processes: int) -> None:
    """Refuse a learned state without a group: processes would diverge, and only one saves it."""
    has_state = list(rift.parameters()) or isinstance(rift.loss.weight, AdaptiveWeight)
    if processes > 1 and has_state and rift.loss.group is None:
        raise ValueError(
            "rift must have group='world' for an adaptive weight or a learned rotation in "
            f"{processes} processes; got group=None"
        )


class _SaveCallback(TrainerCallback):
    """Writes the regulariser's state into each checkpoint."""

    def __init__(self, rift: RIFTRegularizer) -> None:
        self.rift = rift

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Write where the model is written: in one process, or in one of each node.

        The Trainer has created the folder before.
        """
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.rift.state_dict(), folder / FILE)
