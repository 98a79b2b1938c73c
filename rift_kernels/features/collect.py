"""One pass of a frozen teacher over a data set, for the statistics of its layers' features."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from rift_kernels.dispatch import checks
from rift_kernels.dispatch.ranks import Group, resolve

from . import statistics_files
from .capture import FeatureCapture
from .forward_pass import arguments, evaluating, token_mask
from .statistics import TeacherStatistics, group_size, read, write
from .statistics_files import StrPath

Forward = Callable[[nn.Module, Any], object]


def collect_teacher_statistics(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    layers: str | list[str] | tuple[str, ...],
    pooling: str = "cls",
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    path: StrPath | None = None,
    save_every: int = 100,
    progress: bool = True,
    group: Group = None,
) -> dict[str, TeacherStatistics]:
    """Mean and covariance of a model's features over a data set, a layer each.

    ::

        statistics = rk.collect_teacher_statistics(
            teacher, loader, layers="encoder.layer.*", pooling="mean", path="teacher.safetensors"
        )

    The model runs in eval mode and without gradients; afterwards every submodule is in the mode it
    was in. Give the bare model, not one wrapped in DDP, whose processes wait for one another.

    Args:
        model: the teacher.
        dataloader: batches. A batch is a tensor; a tuple or list whose first entry is one (the
            model gets that alone, also where a mask stands beside it: see ``forward``); or a
            mapping, passed to the model as keyword arguments, but for ``"labels"`` and ``"label"``.
            A mapping's ``"attention_mask"`` (batch, tokens), not 0 = valid, leaves out padding for
            ``pooling="mean"`` and ``"tokens"``.
        layers, pooling: see :class:`~rift_kernels.FeatureCapture`.
        forward: calls the model with batches of any other kind: ``lambda model, batch:
            model(batch.pixels)``. What it returns does not matter.
        device: batches are moved there; None is where the model's first parameter is.
        path: a file that holds the statistics and how many batches are in them, written after
            every ``save_every`` batches and at the end. A call that finds the file goes on after
            those batches, which the data loader has to give in the same order: it reads them, and
            the model does not run. The result is the same to the last bit as without the
            interruption. Where the file is complete the call returns at once. In the end,
            :func:`~rift_kernels.load_statistics` reads it.
        save_every: batches.
        progress: show a bar (tqdm).
        group: where given, the processes of this group have a part of the data set each (it may be
            empty), and each gets the statistics of all (``"world"`` is every process). Each needs a
            ``path`` of its own, whose file holds its own part, not the merged statistics:
            :func:`~rift_kernels.save_statistics` writes those.

    Returns:
        By the layer's name, on the device of its features.

    Raises:
        TypeError, ValueError: naming the argument; for a batch of another kind; where there are no
            batches; and where the file at ``path`` is damaged, or is of other layers, another
            pooling or a data loader of another length.
        ImportError: tqdm (for ``progress``) or safetensors (for ``path``) is not installed.
    """
    if forward is not None and not callable(forward):
        raise TypeError(f"forward must be callable or None; got {type(forward).__name__}")
    checks.flag("progress", progress)
    save_every = checks.positive("save_every", save_every)
    ranks = resolve(group)
    with FeatureCapture(model, layers, pooling) as capture:
        device = _device(model) if device is None else torch.device(device)
        length = operator.length_hint(dataloader, -1)  # -1 where it is not known
        run = _Run({"layers": list(capture.layers), "pooling": pooling, "length": length})
        if path is not None:
            run.resume(Path(path), device)
        if not run.complete:
            bar = _bar(dataloader, length) if progress else dataloader
            # Inference mode would leave its mark on caches.
            with evaluating(model), torch.no_grad():
                for batch in _rest(bar, run.batches):
                    _add(run.statistics, capture, _moved(batch, device), model, forward)
                    run.batches += 1
                    if path is not None and run.batches % save_every == 0:
                        run.save(path)
            run.complete = True
            if path is not None and run.statistics:
                run.save(path)
    if ranks is not None:
        return _merged(run.statistics, device, ranks.group)
    if not run.statistics:
        raise ValueError("dataloader must give at least one batch; got none")
    return run.statistics


class _Run:
    """The statistics so far, and what of the call they depend on."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.statistics: dict[str, TeacherStatistics] = {}
        self.batches = 0
        self.complete = False

    def save(self, path: StrPath) -> None:
        done = {"batches": self.batches, "complete": self.complete}
        write(self.statistics, path, self.settings | done)

    def resume(self, path: Path, device: torch.device) -> None:
        """Go on where the file ends, if there is one that is of the same call."""
        statistics_files.check_writable(path)
        if not path.exists():
            return
        found, progress = read(path)
        if progress is None:
            raise ValueError(
                f"path must be a file of collect_teacher_statistics, or none; {path} was written "
                "by save_statistics"
            )
        for name, wanted in self.settings.items():
            if progress.get(name) != wanted and -1 not in (progress.get(name), wanted):
                raise ValueError(
                    f"path must be a file of the same {name}, {wanted!r}; {path} is of "
                    f"{progress.get(name)!r}: remove it, or give another path"
                )
        self.statistics = {name: layer.to(device) for name, layer in found.items()}
        self.batches, self.complete = progress["batches"], progress["complete"]


def _add(
    statistics: dict[str, TeacherStatistics],
    capture: FeatureCapture,
    batch: Any,
    model: nn.Module,
    forward: Forward | None,
) -> None:
    """Run the model on a batch and add its features up."""
    capture.clear()
    if forward is not None:
        forward(model, batch)
    else:
        positional, named = arguments(batch, "forward=lambda model, batch: ... takes any")
        model(*positional, **named)
    tokens = capture.pooling != "cls" and isinstance(batch, Mapping)
    mask = token_mask(batch) if tokens else None
    for name, rows in capture.features(mask).items():
        if name not in statistics:
            statistics[name] = TeacherStatistics(rows.shape[-1])
        # A model may be spread over devices.
        statistics[name].to(rows.device).update(rows, capture.mask(mask))


def _moved(batch: Any, device: torch.device) -> Any:
    """Whatever of it can be moved, on the device."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(_moved(value, device) for value in batch)
    return batch


def _rest(batches: Iterable[Any], done: int) -> Iterator[Any]:
    """The batches after those that are done."""
    iterator = iter(batches)
    skipped = sum(1 for _ in islice(iterator, done))
    if skipped < done:
        raise ValueError(
            f"dataloader must give the batches that are in the file at path, {done}, and then the "
            f"rest; it gave {skipped}"
        )
    return iterator


def _merged(
    statistics: dict[str, TeacherStatistics],
    device: torch.device,
    group: distributed.ProcessGroup,
) -> dict[str, TeacherStatistics]:
    """Over all processes; one without batches learns the widths from the others."""
    widths = {name: layer.width for name, layer in statistics.items()}
    everyone: list[dict[str, int]] = [{} for _ in range(group_size(group))]
    distributed.all_gather_object(everyone, widths, group=group)
    known = next((found for found in everyone if found), None)
    if known is None:
        raise ValueError("dataloader must give at least one batch to a process; got none on all")
    if any(found not in ({}, known) for found in everyone):
        raise ValueError(f"layers and their widths must be the same everywhere; got {everyone}")
    for name, width in known.items():
        if name not in statistics:
            statistics[name] = TeacherStatistics(width).to(device)
        statistics[name].all_reduce_(group)
    return statistics


def _device(model: nn.Module) -> torch.device:
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def _bar(dataloader: Iterable[Any], length: int) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "progress=True needs tqdm: pip install 'rift_kernels[statistics]', or progress=False"
        ) from error
    total = None if length < 0 else length
    return tqdm(dataloader, desc="teacher statistics", unit="batch", total=total)
