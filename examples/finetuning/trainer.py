"""What the finetuning examples share: the loop, validation, early stop, going on, and logs."""

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
from .logs import Board, bar_of, line, write_rows
from .options import resumable
from .pretrained import needed
from .processes import UserError, World

LEAST_ROWS = 4  # of a batch of all processes, for debiased CKA
_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Examples(Dataset[Any]):
    """A dataset whose augmentation depends on the epoch and the index alone."""

    epoch = 0

    def __len__(self) -> int:
        raise NotImplementedError


class Data(NamedTuple):
    """To train on, to validate on, and how examples become a batch."""

    train: Examples
    val: Examples
    collate: Callable[[list[Any]], Any] | None = None


class Losses(NamedTuple):
    """Of a batch: what is minimised, the task's part of it, and what was predicted."""

    total: Tensor
    task: Tensor
    logits: Tensor
    labels: Tensor


LossOf = Callable[[nn.Module, Any, rk.RIFTRegularizer | None], Losses]
SaveModel = Callable[[nn.Module, Path], None]


class Trainer:
    """Finetunes a model, with what a RIFTRegularizer adds to its loss where there is one.

    Args:
        model: wrapped for its processes already, and on their device.
        rift: None for plain finetuning.
        loss_of: the losses of a batch, by the model and the regulariser that it is given.
        save_model: writes the model into a folder that is not there yet.
    """

    def __init__(
        self,
        model: nn.Module,
        rift: rk.RIFTRegularizer | None,
        data: Data,
        loss_of: LossOf,
        save_model: SaveModel,
        options: argparse.Namespace,
        world: World,
    ) -> None:
        self.model, self.rift, self.data, self.loss_of = model, rift, data, loss_of
        self.save_model, self.options, self.world = save_model, options, world
        self.plain = model.module if isinstance(model, DistributedDataParallel) else model
        self.is_main = world.rank == 0
        self.progress = Progress()
        self.checkpoints = options.out / "checkpoints"
        if rift is not None:
            rift.to(world.device)
            rows = options.batch_size * world.size
            if min(rows, len(data.val)) < max(LEAST_ROWS, world.size):
                raise UserError(
                    f"--batch-size: RIFT compares {LEAST_ROWS} examples or more, one of each "
                    f"process at least; got {rows}, and {len(data.val)} to validate on"
                )
        self.passes = len(self.order(0))
        if not self.passes:
            needed_rows = options.batch_size * options.accumulate * world.size
            raise UserError(
                f"--batch-size: a step takes {needed_rows} examples (batch size x passes x "
                f"processes), and there are {len(data.train)} to train on"
            )
        self.steps = self.passes // options.accumulate
        self.optimiser = _adamw(self.model, options)
        self.scheduler = _cosine(self.optimiser, self.steps * options.epochs, options.warmup)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.amp == "fp16")
        self.sums = torch.zeros(4, dtype=torch.float64, device=world.device)
        self._start = 0.0
        if options.tensorboard:
            needed("tensorboard", "--tensorboard")
        # From here on processes differ, in their dropout.
        torch.manual_seed(options.seed + 1 + world.rank)

    def fit(self) -> Progress:
        """Train to the end, or until the accuracy has ceased to rise."""
        options = self.options
        self._resume()
        with Board(options.out, self.is_main and options.tensorboard, self.progress.step) as board:
            while self.progress.epoch < options.epochs and not self._is_stale():
                self._start = time.perf_counter() - self.progress.seconds
                self._train_epoch(board)
                self._end_epoch(board)
        return self.progress

    def order(self, epoch: int) -> list[list[int]]:
        """The batches of this process, of an epoch. They follow from seed and epoch alone."""
        options, world = self.options, self.world
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.data.train, world.size, world.rank, seed=options.seed, drop_last=True
        )
        sampler.set_epoch(epoch)
        indices, size = list(sampler), options.batch_size
        whole = len(indices) // (size * options.accumulate) * options.accumulate
        return [indices[i * size : (i + 1) * size] for i in range(whole)]

    def _is_stale(self) -> bool:
        return 0 < self.options.patience <= self.progress.stale

    def _train_epoch(self, board: Board) -> None:
        options, progress = self.options, self.progress
        self.model.train()
        self.data.train.epoch = progress.epoch
        # What is done already is not even loaded.
        left = self.order(progress.epoch)[progress.batch :]
        with bar_of(progress, self.steps, options, self.is_main) as bar:
            for batch in self._loader(self.data.train, left):
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
                within = progress.batch < self.passes
                if within and options.save_every and progress.step % options.save_every == 0:
                    progress.seconds = time.perf_counter() - self._start
                    self._save()

    def _pass(self, batch: Any, ends_step: bool) -> Losses:
        """Forward and backward; processes average gradients at the end of a step alone."""
        model: Any = self.model
        waits = isinstance(model, DistributedDataParallel) and not ends_step
        with model.no_sync() if waits else nullcontext():
            with self._autocast():
                losses = self.loss_of(model, _moved(batch, self.world.device), self.rift)
            self.scaler.scale(losses.total / self.options.accumulate).backward()
        self.sums += _sums(losses)
        return losses

    def _update(self) -> None:
        before = self.scaler.get_scale()
        if self.options.clip:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self._trained(), self.options.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()
        if self.scaler.get_scale() >= before:  # a step skipped for an overflow is none
            self.scheduler.step()

    def _end_epoch(self, board: Board) -> None:
        """Validate, keep the best, write what was measured, checkpoint."""
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
                checkpoints.write(folder, lambda path: self.save_model(self.plain, path))
        if self.is_main:
            checkpoints.write(
                options.out / "metrics.csv", lambda path: write_rows(path, progress.history)
            )
            board.add(row, progress.step)
            print(line(row, options.epochs), flush=True)
        self._save()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and accuracy of every example, and similarities as means over batches.

        A batch is that of all processes; the last is not compared where it is too small.
        """
        self.model.eval()
        world, rows = self.world, len(self.data.val)
        whole = self.options.batch_size * world.size
        batches = [range(i, min(i + whole, rows)) for i in range(0, rows, whole)]
        own = [list(batch[world.rank :: world.size]) for batch in batches]
        sums = torch.zeros_like(self.sums)
        similar: dict[str, float] = {}
        compared = 0
        # Without DDP, whose forward would wait for processes that have nothing left.
        loader = self._loader(self.data.val, [batch for batch in own if batch])
        for indices, batch in zip(batches, loader, strict=False):
            rift = self.rift if len(indices) >= max(LEAST_ROWS, world.size) else None
            with self._autocast():
                sums += _sums(self.loss_of(self.plain, _moved(batch, world.device), rift))
            if rift is not None:
                compared += len(indices)
                for name, value in rift.metrics().items():
                    similar[name] = similar.get(name, 0.0) + value * len(indices)
        similar.pop("rift/weight", None)
        _, task, hits, seen = world.total(sums)
        found = {"val_loss": task / seen, "val_accuracy": hits / seen}
        for name, value in similar.items():
            found[f"val_{name.removeprefix('rift/')}"] = value / compared
        return found

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
            # Of its own, or it would draw from the model's, and a resumed epoch once more.
            generator=torch.Generator().manual_seed(self.options.seed),
        )

    def _log_step(self, losses: Losses, bar: Any, board: Board) -> None:
        if not self.is_main:
            return
        shown = {"loss": float(losses.total.detach()), "task": float(losses.task.detach())}
        metrics = self.rift.metrics() if self.rift is not None else {}
        bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
        rate = {"lr": float(self.scheduler.get_last_lr()[0])}
        board.add(shown | rate | metrics, self.progress.step)

    def _check_finite(self, sums: Sequence[float]) -> None:
        """Nothing else is worth a checkpoint.

        Raises:
            UserError: a loss was not finite, or a weight is not.
        """
        norm = nn.utils.get_total_norm([p.detach() for p in self._trained()])
        if not all(map(math.isfinite, [*sums, float(norm)])):
            raise UserError(
                f"the loss or the weights are not finite, in epoch {self.progress.epoch + 1} by "
                f"step {self.progress.step}: try a lower --lr, or --amp bf16 instead of fp16"
            )

    def _trained(self) -> list[nn.Parameter]:
        return [p for group in self.optimiser.param_groups for p in group["params"]]

    def _settings(self) -> dict[str, Any]:
        own = {"processes": self.world.size, "examples": len(self.data.train)}
        return resumable(self.options) | own

    def _save(self) -> None:
        """A checkpoint. What only a process itself knows comes from each: randomness and sums."""
        self._check_finite(self.world.total(self.sums))
        everybody = self.world.gathered((checkpoints.random_state(), self.sums.tolist()))
        if not self.is_main:
            return
        state = {
            "settings": self._settings(),
            "progress": asdict(self.progress),
            "random": [own for own, _ in everybody],
            "sums": [own for _, own in everybody],
            "model": checkpoints.weights(self.plain),
            "optimiser": self.optimiser.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rift": None if self.rift is None else self.rift.state_dict(),
        }
        checkpoints.save(state, self.checkpoints, self.progress.step, self.options.keep)

    def _resume(self) -> None:
        """From the newest checkpoint, if there is one.

        Raises:
            UserError: it was not asked for, or the checkpoint is of another run.
        """
        path = checkpoints.newest(self.checkpoints)
        if path is None:
            return
        if not self.options.resume:
            raise UserError(
                f"--out: {self.options.out} has checkpoints of an earlier run: give --resume to go "
                "on with it, or another folder"
            )
        state, now = checkpoints.load(path), self._settings()
        for name, then in state["settings"].items():
            if now.get(name) != then:
                raise UserError(
                    f"--resume: {path} was made with {name.replace('_', '-')} {then!r}; "
                    f"got {now.get(name)!r}"
                )
        self.progress = Progress(**state["progress"])
        checkpoints.load_weights(self.plain, state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.rift is not None:
            self.rift.load_state_dict(state["rift"])
        self.sums.copy_(torch.tensor(state["sums"][self.world.rank], dtype=self.sums.dtype))
        checkpoints.set_random_state(state["random"][self.world.rank])
        if self.is_main:
            print(f"going on from {path}, step {self.progress.step}", flush=True)


def _adamw(model: nn.Module, options: argparse.Namespace) -> torch.optim.AdamW:
    """Of what is trained; biases and norms do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, options.lr)


def _cosine(
    optimiser: torch.optim.Optimizer, steps: int, warmup: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """From near 0 up in a share of the steps, and down to 0."""
    rising = math.ceil(warmup * steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(1, steps - rising))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_moved(value, device) for value in batch)
    return batch.to(device, non_blocking=True)


def _sums(losses: Losses) -> Tensor:
    """Of a batch: both losses, what was predicted right, and how many there were."""
    rows = torch.full_like(losses.task, len(losses.labels))
    hits = (losses.logits.argmax(-1) == losses.labels).sum()
    values = (losses.total * rows, losses.task * rows, hits, rows)
    return torch.stack([value.detach().double() for value in values])
