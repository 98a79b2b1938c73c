"""RIFT in the Hugging Face Trainer; needs ``pip install ".[transformers]"``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from rift_kernels.regularizer import RIFTRegularizer
from rift_kernels.weighting import AdaptiveWeight

from . import same_model

FILE = "rift.pt"  # in a checkpoint's folder
ADVICE = (
    "make rift of the model that you give to the trainer, or give a function that makes it of the "
    "trainer's, rift=lambda model: rk.RIFTRegularizer(model, ...)"
)


class RIFTTrainer(Trainer):
    """A ``Trainer`` that adds a :class:`~rift_kernels.RIFTRegularizer` to the training loss.

    ::

        rift = rk.RIFTRegularizer(model, teacher, layers="vit.layers.11", group="world")
        trainer = RIFTTrainer(model=model, args=args, train_dataset=data, rift=rift)
        trainer.train()

    Everything else, including the other arguments, is as in ``Trainer``. It also makes a RIFT
    trainer of a subclass: ``class RIFTSFTTrainer(RIFTTrainer, SFTTrainer)``. In each step, the
    pass of ``compute_loss`` that has gradients is compared. If there are several, as for the
    columns of a ``SentenceTransformerTrainer``, that is the latest, which warns once.

    The teacher is moved to the training device and called as the model was. Evaluation and its loss
    are unchanged. The weight of the loss does not depend on ``gradient_accumulation_steps``; each
    micro-batch is compared separately. ``rift/...`` is logged with the loss. The optimiser gets the
    parameters of a learned rotation. Checkpoints include the schedule and an adaptive weight.

    Args:
        rift: a regulariser of the same ``model``, or of a part of it that is called as a module;
            ``group="world"`` compares the batch of all processes. Or a function that makes the
            regulariser of the trainer's model. This is needed with ``model_init``, which makes a
            model for each training, and with a ``peft_config``, which wraps the model. It is called
            again for each new model.

    Raises:
        TypeError, ValueError: naming the argument; also for a regulariser of another model, and for
            a model in ``nn.DataParallel``, which copies it without its hooks. Start one process per
            GPU with torchrun instead.
        FileNotFoundError: at ``train``, if ``resume_from_checkpoint`` is not from a RIFTTrainer.
    """

    rift: RIFTRegularizer
    _make_rift: Callable[[Any], Any] | None = None

    def __init__(
        self,
        *args: Any,
        rift: RIFTRegularizer | Callable[[nn.Module], RIFTRegularizer],
        **kwargs: Any,
    ) -> None:
        if not callable(rift):
            raise TypeError(
                f"rift must be a RIFTRegularizer or a function that makes one of the model; got "
                f"{type(rift).__name__}"
            )
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"RIFTTrainer needs one GPU per process; got {self.args.n_gpu}: start it with "
                "torchrun"
            )
        model: Any = self.model
        if not isinstance(rift, RIFTRegularizer):
            self._make_rift = rift
            rift = rift(model)
        elif self.model_init is not None:
            raise ValueError(
                "rift must be a function with model_init, which makes a model for each training: "
                "rift=lambda model: rk.RIFTRegularizer(model, ...); got a RIFTRegularizer"
            )
        self._use(rift, model)
        self.add_callback(_StartCallback(self))

    def _use(self, rift: Any, model: Any) -> None:
        """Check a regulariser of the model, and place it on the training device."""
        if not isinstance(rift, RIFTRegularizer):
            raise TypeError(f"rift must return a RIFTRegularizer; got {type(rift).__name__}")
        same_model.check(rift, model, ADVICE)
        _check_shared(rift, self.args.world_size)
        rift.to(self.args.device)
        rift.move_teacher(self.args.device)
        self.rift = rift

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in ``Trainer``. A training gets a regulariser of its new model."""
        model = super().call_model_init(*args, **kwargs)
        if self._make_rift is not None:  # not while the Trainer is made, which calls this, too
            self.rift.remove()
            self._use(self._make_rift(model), model)
        return model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The task's loss, plus the regulariser's during training."""
        result: Any = super().compute_loss(
            model,
            inputs,
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
            **kwargs,
        )
        if not model.training:
            return result
        rift_loss = self.rift()
        if self._is_sum_over_micro_batches(num_items_in_batch):
            rift_loss = rift_loss / self.current_gradient_accumulation_steps
        if return_outputs:
            loss, outputs = result
            return loss + rift_loss.to(loss.device), outputs
        return result + rift_loss.to(result.device)

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
        groups = getattr(optimizer, "param_groups", [])
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        if any(id(parameter) not in trained for parameter in parameters):
            raise ValueError(
                "optimizers must have the parameters of rift, those of a learned rotation; got an "
                f"optimizer without them: {type(optimizer).__name__}"
            )
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in ``Trainer``, with the regulariser's state beside the model.

        Every checkpoint passes through here, whichever folder it is in: those of a trial of
        ``hyperparameter_search`` or of a preempted job, too.
        """
        super().save_model(output_dir, _internal_call=_internal_call)
        if self.args.should_save:  # in one process, or in one of each node
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)  # FSDP makes it only with its shards
            torch.save(self.rift.state_dict(), folder / FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in ``Trainer``, and the regulariser's state. DeepSpeed's resuming passes here, too."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / FILE
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


class _StartCallback(TrainerCallback):
    """Forgets a pass that no loss has used: of a training that failed, or did not fit in memory."""

    def __init__(self, trainer: RIFTTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Start afresh; ``auto_find_batch_size`` begins again after each failure."""
        self.trainer.rift.clear()
