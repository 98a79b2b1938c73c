"""Collect statistics of a frozen teacher's features in one pass over a data set."""

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
from .forward_pass import arguments, evaluating, without_unused_labels
from .hooks import Call
from .pooling import Pooling
from .statistics import TeacherStatistics, group_size, read, write
from .statistics_files import StrPath
from .token_masks import AUTO, TokenMask, TokenMasks

Forward = Callable[[nn.Module, Any], object]


def collect_teacher_statistics(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    layers: str | list[str] | tuple[str, ...],
    pooling: Pooling = "cls",
    token_mask: TokenMask = AUTO,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    path: StrPath | None = None,
    save_every: int = 100,
    progress: bool = True,
    group: Group = None,
) -> dict[str, TeacherStatistics]:
    """Mean and covariance of a model's features over a data set, for each layer.

    ::

        statistics = rk.collect_teacher_statistics(
            teacher, loader, layers="encoder.layer.*", pooling="mean", path="teacher.safetensors"
        )

    The model runs in eval mode and without gradients; afterwards the mode of every submodule is
    restored. Pass the model itself, not a DDP wrapper, whose processes wait for one another.

    Args:
        model: the teacher.
        dataloader: batches, each a tensor, a tuple or list whose first entry is a tensor, or a
            mapping. The model gets only the first entry of a tuple, even where a mask follows it
            (see ``forward``). It gets a mapping as keyword arguments, without ``"labels"`` and
            ``"label"`` where only a loss needs them.
        layers, pooling: see :class:`~rift_kernels.FeatureCapture`.
        token_mask: see :class:`~rift_kernels.RIFTRegularizer`.
        forward: calls the model with any other kind of batch: ``lambda model, batch:
            model(batch.pixels)``. The return value is ignored.
        device: the device that batches are moved to; None is that of the model's first parameter.
        path: a file for the statistics and the number of batches in them, written after every
            ``save_every`` batches and at the end. If the file exists, the call resumes after these
            batches. The data loader must repeat them in the same order; they are read, but the
            model does not run. The result is identical to the last bit to that of an uninterrupted
            call. If the file is complete, the call returns at once.
            :func:`~rift_kernels.load_statistics` reads it.
        save_every: number of batches between writes.
        progress: show a progress bar (tqdm).
        group: the processes of this group each have a part of the data set, possibly an empty one,
            and each returns the statistics of all parts. ``"world"`` is every process. Each process
            needs a separate ``path``. Its file holds the process's own part;
            :func:`~rift_kernels.save_statistics` writes the merged statistics.

    Returns:
        The statistics by the layer's name, on the device of the layer's features.

    Raises:
        TypeError, ValueError: naming the argument; for any other kind of batch; if there are no
            batches; or if the file at ``path`` is damaged, or has other layers, another pooling or
            a data loader of another length.
        ImportError: tqdm (for ``progress``) or safetensors (for ``path``) is not installed.
    """
    if forward is not None and not callable(forward):
        raise TypeError(f"forward must be callable or None; got {type(forward).__name__}")
    checks.flag("progress", progress)
    save_every = checks.positive("save_every", save_every)
    ranks = resolve(group)
    with FeatureCapture(model, layers, pooling) as capture:
        masks = TokenMasks(token_mask, capture, model)
        device = _device(model) if device is None else torch.device(device)
        length = operator.length_hint(dataloader, -1)  # -1 if unknown
        rows = pooling if isinstance(pooling, str) else "a function"
        run = _Run({"layers": list(capture.layers), "pooling": rows, "length": length})
        if path is not None:
            run.resume(Path(path), device)
        if not run.complete:
            bar = _bar(dataloader, length) if progress else dataloader
            # Not inference mode, because a model may cache inference tensors.
            with evaluating(model), torch.no_grad():
                for batch in _skip(bar, run.batches):
                    batch = _to_device(batch, device)
                    _update(run.statistics, capture, batch, model, forward, masks)
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
    """The statistics so far, and the settings of the call that they depend on."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.statistics: dict[str, TeacherStatistics] = {}
        self.batches = 0
        self.complete = False

    def save(self, path: StrPath) -> None:
        position = {"batches": self.batches, "complete": self.complete}
        write(self.statistics, path, self.settings | position)

    def resume(self, path: Path, device: torch.device) -> None:
        """Continue from the file, if it exists and is from a call with the same settings."""
        statistics_files.check_writable(path)
        if not path.exists():
            return
        statistics, progress = read(path)
        if progress is None:
            raise ValueError(
                "path must be a new file or one from collect_teacher_statistics; "
                f"got {path}, which save_statistics wrote"
            )
        for name, expected in self.settings.items():
            if progress.get(name) != expected and -1 not in (progress.get(name), expected):
                raise ValueError(
                    f"path must be a file with the same {name}, {expected!r}; got {path} with "
                    f"{progress.get(name)!r}: remove it, or choose another path"
                )
        self.statistics = {name: layer.to(device) for name, layer in statistics.items()}
        self.batches, self.complete = progress["batches"], progress["complete"]


def _update(
    statistics: dict[str, TeacherStatistics],
    capture: FeatureCapture,
    batch: Any,
    model: nn.Module,
    forward: Forward | None,
    masks: TokenMasks,
) -> None:
    """Run the model on a batch and add its features to the statistics."""
    capture.clear()
    if forward is not None:
        forward(model, batch)
    else:
        inputs, keywords = arguments(batch, "forward=lambda model, batch: ... accepts any batch")
        model(*inputs, **without_unused_labels(model, keywords))
    is_mapping = isinstance(batch, Mapping)
    call = Call((), dict(batch)) if is_mapping else capture.latest.call
    found = masks.of(capture.outputs(), call, capture.kind, is_recorded=not is_mapping)
    by_name = {name: each.mask for name, each in found.items()}
    for name, rows in capture.features(by_name).items():
        if name not in statistics:
            statistics[name] = TeacherStatistics(rows.shape[-1])
        # The layers of a model may be on different devices.
        statistics[name].to(rows.device).update(rows, capture.mask(by_name.get(name)))


def _to_device(batch: Any, device: torch.device) -> Any:
    """The batch with everything that can be moved on the device."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_to_device(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(_to_device(value, device) for value in batch)
    return batch


def _skip(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """The batches after the first ``count``."""
    iterator = iter(batches)
    skipped = sum(1 for _ in islice(iterator, count))
    if skipped < count:
        raise ValueError(
            f"dataloader must first repeat the {count} batches in the file at path; got {skipped}"
        )
    return iterator


def _merged(
    statistics: dict[str, TeacherStatistics],
    device: torch.device,
    group: distributed.ProcessGroup,
) -> dict[str, TeacherStatistics]:
    """The statistics of all processes; one without batches learns the widths from the others."""
    own_widths = {name: layer.width for name, layer in statistics.items()}
    all_widths: list[dict[str, int]] = [{} for _ in range(group_size(group))]
    distributed.all_gather_object(all_widths, own_widths, group=group)
    widths = next((layers for layers in all_widths if layers), None)
    if widths is None:
        raise ValueError("dataloader must give at least one process a batch; got none on all")
    if any(layers not in ({}, widths) for layers in all_widths):
        raise ValueError(
            f"layers and their widths must be the same on every process; got {all_widths}"
        )
    for name, width in widths.items():
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
