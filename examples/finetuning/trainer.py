"""The training loop of the finetuning examples, with validation, early stopping and resuming."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import rift_kernels as rk

from . import checkpoints
from .checkpoints import Progress
from .logs import Board, epoch_line, progress_bar, write_rows
from .options import fixed_settings
from .pretrained import import_optional
from .processes import UserError, World

MIN_ROWS = 4  # required by debiased CKA, in a batch of all processes
_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Examples(Dataset[Any]):
    """A dataset whose augmentation depends only on the epoch and the index."""

    epoch = 0

    def __len__(self) -> int:
        raise NotImplementedError


class Data(NamedTuple):
    """Examples for training and validation, and the function that makes a batch of them."""

    train: Examples
    val: Examples
    collate: Callable[[list[Any]], Any] | None = None


class Losses(NamedTuple):
    """The total loss of a batch, the task's part of it, and the predictions."""

    total: Tensor
    task: Tensor
    logits: Tensor
    labels: Tensor


ComputeLosses = Callable[[nn.Module, Any, rk.RIFTRegularizer | None], Losses]
SaveModel = Callable[[nn.Module, Path], None]


class Trainer:
    """Finetunes a model, with or without a RIFTRegularizer.

    Args:
        model: the model on its device, wrapped by :meth:`.World.wrap`.
        rift: None for plain finetuning.
        compute_losses: maps model, batch and regulariser to the losses of the batch.
        save_model: writes the model into a new folder.
    """

    def __init__(
        self,
        model: nn.Module,
        rift: rk.RIFTRegularizer | None,
        data: Data,
        compute_losses: ComputeLosses,
        save_model: SaveModel,
        options: argparse.Namespace,
        world: World,
    ) -> None:
        self.model, self.rift, self.data, self.compute_losses = model, rift, data, compute_losses
        self.save_model, self.options, self.world = save_model, options, world
        self.unwrapped = model.module if isinstance(model, DistributedDataParallel) else model
        self.is_main = world.rank == 0
        self.progress = Progress()
        self.checkpoints = options.out / "checkpoints"
        if rift is not None:
            rift.to(world.device)
            rows = options.batch_size * world.size
            if min(rows, len(data.val)) < max(MIN_ROWS, world.size):
                raise UserError(
                    f"--batch-size must give RIFT at least {MIN_ROWS} examples, and one for each "
                    f"process; got {rows}, and {len(data.val)} for validation"
                )
        self.passes = len(self.epoch_batches(0))
        if not self.passes:
            step_rows = options.batch_size * options.accumulate * world.size
            raise UserError(
                f"--batch-size must leave at least one step in an epoch; got a step of {step_rows} "
                f"examples (batch size x passes x processes) from {len(data.train)} training "
                "examples"
            )
        self.steps = self.passes // options.accumulate
        self.optimiser = _adamw(self.model, options)
        self.scheduler = _cosine(self.optimiser, self.steps * options.epochs, options.warmup)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.amp == "fp16")
        self.sums = torch.zeros(4, dtype=torch.float64, device=world.device)
        self._start = 0.0
        if options.tensorboard:
            import_optional("tensorboard", "--tensorboard")
        # From here on, dropout must differ between processes.
        torch.manual_seed(options.seed + 1 + world.rank)

    def fit(self) -> Progress:
        """Train for all epochs, or until the validation accuracy stops improving."""
        options = self.options
        self._resume()
        with Board(options.out, self.is_main and options.tensorboard, self.progress.step) as board:
            while self.progress.epoch < options.epochs and not self._is_stale():
                self._start = time.perf_counter() - self.progress.seconds
                self._train_epoch(board)
                self._end_epoch(board)
        return self.progress

    def epoch_batches(self, epoch: int) -> list[list[int]]:
        """The batches of this process in an epoch, which depend only on seed and epoch."""
        options, world = self.options, self.world
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.data.train, world.size, world.rank, seed=options.seed, drop_last=True
        )
        sampler.set_epoch(epoch)
        indices, size = list(sampler), options.batch_size
        passes = len(indices) // (size * options.accumulate) * options.accumulate
        return [indices[i * size : (i + 1) * size] for i in range(passes)]

    def _is_stale(self) -> bool:
        return 0 < self.options.patience <= self.progress.stale

    def _train_epoch(self, board: Board) -> None:
        options, progress = self.options, self.progress
        self.model.train()
        self.data.train.epoch = progress.epoch
        # Batches from before a resumption are not loaded again.
        remaining = self.epoch_batches(progress.epoch)[progress.batch :]
        with progress_bar(progress, self.steps, options, self.is_main) as bar:
            for batch in self._loader(self.data.train, remaining):
                ends_step = (progress.batch + 1) % options.accumulate == 0
                losses = self._pass(batch, ends_step)
                progress.batch += 1
                if not ends_step:
                    continue
                self._update()
                progress.step += 1
                bar.update()
                if progress.step % options.log_every == 0:
                    self._log_step(losses, bar, board)
                in_epoch = progress.batch < self.passes
                if in_epoch and options.save_every and progress.step % options.save_every == 0:
                    progress.seconds = time.perf_counter() - self._start
                    self._save()

    def _pass(self, batch: Any, ends_step: bool) -> Losses:
        """Run forward and backward; DDP averages gradients only in the last pass of a step."""
        model: Any = self.model
        skips_sync = isinstance(model, DistributedDataParallel) and not ends_step
        with model.no_sync() if skips_sync else nullcontext():
            with self._autocast():
                batch = _to_device(batch, self.world.device)
                losses = self.compute_losses(model, batch, self.rift)
            self.scaler.scale(losses.total / self.options.accumulate).backward()
        self.sums += _sums(losses)
        return losses

    def _update(self) -> None:
        old_scale = self.scaler.get_scale()
        if self.options.clip:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self._trained(), self.options.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()
        if self.scaler.get_scale() >= old_scale:  # not after a step skipped for an overflow
            self.scheduler.step()

    def _end_epoch(self, board: Board) -> None:
        """Validate, save the best model, write metrics and a checkpoint."""
        options, progress = self.options, self.progress
        total, task, hits, rows = sums = self.world.total(self.sums)
        self._check_finite(sums)
        rate = float(self.scheduler.get_last_lr()[0])
        row: dict[str, float] = {"epoch": progress.epoch + 1, "step": progress.step, "lr": rate}
        row |= {"train_loss": total / rows, "train_task_loss": task / rows}
        row |= {"train_accuracy": hits / rows, **self.validate()}
        if self.rift is not None:
            row["rift_weight"] = self.rift.metrics()["rift/weight"]
        row["seconds"] = round(time.perf_counter() - self._start, 3)
        progress.history.append(row)
        progress.epoch, progress.batch, progress.seconds = progress.epoch + 1, 0, 0.0
        self.sums.zero_()
        progress.stale += 1
        if row["val_accuracy"] > progress.best:
            progress.best, progress.best_epoch = row["val_accuracy"], progress.epoch
            progress.stale = 0
            if self.is_main:
                folder = options.out / "best"
                checkpoints.write(folder, lambda path: self.save_model(self.unwrapped, path))
        if self.is_main:
            checkpoints.write(
                options.out / "metrics.csv", lambda path: write_rows(path, progress.history)
            )
            board.add(row, progress.step)
            print(epoch_line(row, options.epochs), flush=True)
        self._save()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and accuracy over all examples, and similarities as means over batches.

        A batch here is that of all processes. The last is not compared if it is too small.
        """
        self.model.eval()
        world, rows = self.world, len(self.data.val)
        size = self.options.batch_size * world.size
        batches = [range(i, min(i + size, rows)) for i in range(0, rows, size)]
        own_batches = [list(batch[world.rank :: world.size]) for batch in batches]
        sums = torch.zeros_like(self.sums)
        comparisons: dict[str, float] = {}
        compared_rows = 0
        # Without DDP, whose forward would wait for processes that have no batch left.
        loader = self._loader(self.data.val, [batch for batch in own_batches if batch])
        for indices, batch in zip(batches, loader, strict=False):
            rift = self.rift if len(indices) >= max(MIN_ROWS, world.size) else None
            with self._autocast():
                batch = _to_device(batch, world.device)
                sums += _sums(self.compute_losses(self.unwrapped, batch, rift))
            if rift is not None:
                compared_rows += len(indices)
                for name, value in rift.metrics().items():
                    comparisons[name] = comparisons.get(name, 0.0) + value * len(indices)
        comparisons.pop("rift/weight", None)
        _, task, hits, count = world.total(sums)
        metrics = {"val_loss": task / count, "val_accuracy": hits / count}
        for name, value in comparisons.items():
            metrics[f"val_{name.removeprefix('rift/')}"] = value / compared_rows
        return metrics

    def _autocast(self) -> AbstractContextManager[Any]:
        kind, dtype = self.world.device.type, _AMP.get(self.options.amp)
        return torch.autocast(kind, dtype, enabled=dtype is not None)

    def _loader(self, examples: Examples, batches: Sequence[list[int]]) -> DataLoader[Any]:
        return DataLoader(
            examples,
            batch_sampler=batches,
            num_workers=self.options.workers,
            collate_fn=self.data.collate,
            pin_memory=self.world.device.type == "cuda",
            # The default generator is the model's; a resumed epoch would draw from it once more.
            generator=torch.Generator().manual_seed(self.options.seed),
        )

    def _log_step(self, losses: Losses, bar: Any, board: Board) -> None:
        if not self.is_main:
            return
        values = {"loss": float(losses.total.detach()), "task": float(losses.task.detach())}
        metrics = self.rift.metrics() if self.rift is not None else {}
        bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
        rate = {"lr": float(self.scheduler.get_last_lr()[0])}
        board.add(values | rate | metrics, self.progress.step)

    def _check_finite(self, sums: Sequence[float]) -> None:
        """Check that the state is worth saving.

        Raises:
            UserError: a loss or a weight is not finite.
        """
        norm = nn.utils.get_total_norm([p.detach() for p in self._trained()])
        if not all(map(math.isfinite, [*sums, float(norm)])):
            raise UserError(
                f"the loss or the weights are not finite in epoch {self.progress.epoch + 1}, by "
                f"step {self.progress.step}: try a lower --lr, or --amp bf16 instead of fp16"
            )

    def _trained(self) -> list[nn.Parameter]:
        return [p for group in self.optimiser.param_groups for p in group["params"]]

    def _settings(self) -> dict[str, Any]:
        sizes = {"processes": self.world.size, "examples": len(self.data.train)}
        return fixed_settings(self.options) | sizes

    def _save(self) -> None:
        """Save a checkpoint, with the random state and the sums of every process."""
        self._check_finite(self.world.total(self.sums))
        states = self.world.gather((checkpoints.random_state(), self.sums.tolist()))
        if not self.is_main:
            return
        state = {
            "settings": self._settings(),
            "progress": asdict(self.progress),
            "random": [random for random, _ in states],
            "sums": [sums for _, sums in states],
            "model": checkpoints.weights(self.unwrapped),
            "optimiser": self.optimiser.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rift": None if self.rift is None else self.rift.state_dict(),
        }
        checkpoints.save(state, self.checkpoints, self.progress.step, self.options.keep)

    def _resume(self) -> None:
        """Resume from the newest checkpoint, if there is one.

        Raises:
            UserError: ``--resume`` is missing, or the checkpoint is from another run.
        """
        path = checkpoints.newest(self.checkpoints)
        if path is None:
            return
        if not self.options.resume:
            raise UserError(
                f"--out must be a folder without checkpoints unless --resume is given; got "
                f"{self.options.out}, which has checkpoints of an earlier run"
            )
        state, settings = checkpoints.load(path), self._settings()
        for name, saved in state["settings"].items():
            if settings.get(name) != saved:
                raise UserError(
                    f"--resume needs {name.replace('_', '-')} {saved!r}, as in {path}; "
                    f"got {settings.get(name)!r}"
                )
        self.progress = Progress(**state["progress"])
        checkpoints.load_weights(self.unwrapped, state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.rift is not None:
            self.rift.load_state_dict(state["rift"])
        self.sums.copy_(torch.tensor(state["sums"][self.world.rank], dtype=self.sums.dtype))
        checkpoints.set_random_state(state["random"][self.world.rank])
        if self.is_main:
            print(f"resuming from {path}, step {self.progress.step}", flush=True)


def _adamw(model: nn.Module, options: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW for the trained parameters, without decay for biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, options.lr)


def _cosine(
    optimiser: torch.optim.Optimizer, steps: int, warmup: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up in a share of the steps, then cosine decay to 0."""
    warmup_steps = math.ceil(warmup * steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {name: _to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_to_device(value, device) for value in batch)
    return batch.to(device, non_blocking=True)


def _sums(losses: Losses) -> Tensor:
    """Sums over a batch: both losses, correct predictions, and examples."""
    rows = torch.full_like(losses.task, len(losses.labels))
    hits = (losses.logits.argmax(-1) == losses.labels).sum()
    values = (losses.total * rows, losses.task * rows, hits, rows)
    return torch.stack([value.detach().double() for value in values])
