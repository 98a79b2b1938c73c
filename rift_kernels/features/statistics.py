"""Streaming mean and covariance of a frozen teacher's features, so that training needs no teacher.

:class:`TeacherStatistics` accumulates batches, in one process or several. :func:`save_statistics`
and :func:`load_statistics` keep several layers in one file; :mod:`.statistics_files` specifies its
format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn

from rift_kernels.dispatch import checks, user_warnings
from rift_kernels.measures.row_means import subtract_own_mean

from . import statistics_files
from .statistics_files import State, StrPath


class TeacherStatistics(nn.Module):
    """Mean and covariance of features that arrive in batches, exact to float64 rounding.

    With weights ``w_i`` of the valid rows ``x_i``::

        count = sum_i w_i    mean = sum_i w_i x_i / count
        scatter = sum_i w_i (x_i - mean)(x_i - mean)^T

    All weights are 1 for ``decay=1``. Otherwise the statistics are exponentially weighted:
    ``count`` and ``scatter`` are multiplied by ``decay`` before each update. The rows of update t
    of T then have weight ``decay ** (T - t)``. ::

        statistics = rk.TeacherStatistics(768)
        for batch in loader:
            statistics.update(teacher(batch))
        statistics.mean, statistics.covariance()

    ``count ()``, ``mean (D,)`` and ``scatter (D, D)`` are buffers, which ``state_dict()`` contains
    and which move with the module. They are float64 and remain so when the module is cast. There
    are no parameters.

    Args:
        width: D, the number of features in a row.
        decay: above 0, and at most 1.

    Raises:
        TypeError, ValueError: naming the argument, at construction or at a call.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    def __init__(self, width: int, *, decay: float = 1.0) -> None:
        super().__init__()
        width = checks.positive("width", width)
        self.decay = checks.number("decay", decay)
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1; got {decay!r}")
        with torch.inference_mode(False):  # inference tensors could not be updated later
            self.register_buffer("count", torch.zeros((), dtype=torch.float64))
            self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
            self.register_buffer("scatter", torch.zeros(width, width, dtype=torch.float64))

    @property
    def width(self) -> int:
        """D, the number of features in a row."""
        return self.mean.shape[0]

    @torch.no_grad()
    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch.

        The batch is centered and merged by the formula of Chan, Golub and LeVeque (1979). With
        ``decay=1``, batch boundaries make no difference beyond rounding. The relative error of the
        scatter is that of float64, times the ratio of offset to deviation where this exceeds 1; a
        plain sum of squares would lose the square of this ratio. Results are the same under
        inference mode, autocast and ``torch.compile(fullgraph=True)``. The host never waits for a
        GPU.

        Args:
            features: (..., N, D), float64, float32, bfloat16 or float16, on the statistics' device.
                All leading axes are rows. NaN or Inf in a valid row makes the statistics NaN
                permanently. A batch without valid rows changes nothing, not even by decay.
            mask: boolean (..., N), True = valid. The contents of masked rows have no effect.
        """
        checks.rows("features", features, mask, self.width, self.mean.device)
        rows = features.reshape(-1, self.width)
        mask = None if mask is None else mask.reshape(-1)
        centered, mean, n = subtract_own_mean(rows, mask, torch.float64)
        # torch.compile (2.13) loses updates of a 0-dimensional float64 tensor on a CPU.
        count = self.count.view(1)
        if self.decay != 1:
            factor = torch.where(n > 0, torch.full_like(n, self.decay), 1.0)
            count.mul_(factor)
            self.scatter.mul_(factor)
        # Without rows, the mean is NaN and the share is 0 / 0.
        share = torch.where(n > 0, n / (count + n), 0.0)
        delta = torch.where(n > 0, mean - self.mean, 0.0)
        scatter = centered.mT @ centered
        self.scatter.add_(_symmetric(scatter)).add_(_outer(delta) * (count * share))
        self.mean.add_(delta * share)
        count.add_(n)

    def covariance(self, correction: float = 1.0) -> Tensor:
        """``scatter / (count - correction)``, (D, D) in float64; NaN where count <= correction.

        ``correction=1`` is unbiased where all rows have the same weight; 0 divides by the count.
        """
        divisor = self.count - checks.number("correction", correction)
        return self.scatter / torch.where(divisor > 0, divisor, float("nan"))

    @torch.no_grad()
    def all_reduce_(self, group: distributed.ProcessGroup | None = None) -> None:
        """Merge the statistics of all processes of ``group`` in place, on each of them.

        The merge is exact by Chan's formula and identical to the last bit on every process.
        Processes without data must take part as well. Call it once, after all data are added: data
        merged twice count twice.

        Args:
            group: None is the default group of all processes. Its backend must support the
                statistics' device.

        Raises:
            RuntimeError: there is no process group, or this process is not in it.
            ValueError: on every process, if widths or decays differ between processes.
        """
        size, device = group_size(group), self.mean.device
        settings = torch.tensor([self.width, self.decay], dtype=torch.float64, device=device)
        gathered = [torch.empty_like(settings) for _ in range(size)]
        distributed.all_gather(gathered, settings, group=group)
        for name, values in zip(("width", "decay"), torch.stack(gathered).T.tolist(), strict=True):
            if len(set(values)) > 1:
                raise ValueError(f"{name} must be the same on every process; got {values}")
        sums = torch.cat([self.count[None], self.count * self.mean])
        distributed.all_reduce(sums, group=group)
        total = sums[0]
        mean = torch.where(total > 0, sums[1:] / total, 0.0)
        scatter = self.scatter + _outer(self.mean - mean) * self.count
        distributed.all_reduce(scatter, group=group)
        self.count.copy_(total)
        self.mean.copy_(mean)
        # The order of summation over processes may differ between elements.
        self.scatter.copy_(_symmetric(scatter))

    def save(self, path: StrPath) -> None:
        """Write a file like :func:`save_statistics`, with these as its only, unnamed layer."""
        save_statistics({"": self}, path)

    @classmethod
    def load(cls, path: StrPath, width: int | None = None) -> Self:
        """Read statistics on the CPU from a file that has a single layer of any name.

        Args:
            path: a file from :meth:`save`, :func:`save_statistics` or
                :func:`~rift_kernels.collect_teacher_statistics`.
            width: the required width; None accepts any.

        Raises:
            ValueError: the file has several layers or another width, or is refused as by
                :func:`load_statistics`.
            FileNotFoundError: there is no such file.
            ImportError: safetensors is not installed.
        """
        states = _read(path)
        if len(states) != 1:
            raise ValueError(
                "path must be a file with one layer for TeacherStatistics.load (load_statistics "
                f"reads any); got {path} with {', '.join(map(repr, states))}"
            )
        (state,) = states.values()
        actual = state.mean.shape[0]
        if width is not None and actual != checks.positive("width", width):
            raise ValueError(f"path must hold statistics of width {width}; got {actual} in {path}")
        return cls._from_state(state)

    @classmethod
    def _from_state(cls, state: State) -> Self:
        statistics = cls(state.mean.shape[0], decay=state.decay)
        with torch.no_grad():
            for part in statistics_files.PARTS:
                getattr(statistics, part).copy_(getattr(state, part))
        return statistics

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the module; the buffers are never cast."""

        def move(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        with torch.inference_mode(False):
            return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.width}, decay={self.decay}"


def save_statistics(statistics: Mapping[str, TeacherStatistics], path: StrPath) -> None:
    """Write the statistics of several layers, by name, into one safetensors file.

    A temporary file beside ``path`` replaces it once complete, so an interrupted call leaves an
    earlier file intact.

    Args:
        statistics: at least one layer; any names.
        path: a file in an existing directory.

    Raises:
        TypeError, ValueError: ``statistics`` is not such a mapping, or is empty.
        FileNotFoundError: the directory does not exist.
        ImportError: safetensors is not installed.
    """
    write(statistics, path)


def write(
    statistics: Mapping[str, TeacherStatistics],
    path: StrPath,
    progress: dict[str, Any] | None = None,
) -> None:
    """Like :func:`save_statistics`, with the progress of an unfinished collection, if any."""
    if not isinstance(statistics, Mapping):
        raise TypeError(
            "statistics must be a mapping from names to TeacherStatistics; got "
            f"{type(statistics).__name__}"
        )
    if not statistics:
        raise ValueError("statistics must have at least one layer; got none")
    for name, layer in statistics.items():
        if not isinstance(name, str) or not isinstance(layer, TeacherStatistics):
            raise TypeError(
                "statistics must be a mapping from names to TeacherStatistics; got "
                f"{name!r}: {type(layer).__name__}"
            )
    states = {
        name: State(layer.count, layer.mean, layer.scatter, layer.decay)
        for name, layer in statistics.items()
    }
    statistics_files.write(path, states, progress)


def load_statistics(path: StrPath) -> dict[str, TeacherStatistics]:
    """Read the statistics that :func:`save_statistics` wrote, by name, in order, on the CPU.

    A file from an unfinished :func:`~rift_kernels.collect_teacher_statistics` gives a warning: its
    statistics are those of the batches so far.

    Raises:
        ValueError: the file is damaged, has another format or version, or its tensors are not
            statistics. The message names the path, the fault and the accepted format.
        FileNotFoundError: there is no such file.
        ImportError: safetensors is not installed.
    """
    return _from_states(_read(path))


def read(path: StrPath) -> tuple[dict[str, TeacherStatistics], dict[str, Any] | None]:
    """Like :func:`load_statistics`, with the progress of an unfinished collection, if any."""
    states, progress = statistics_files.read(path)
    return _from_states(states), progress


def _from_states(states: Mapping[str, State]) -> dict[str, TeacherStatistics]:
    return {name: TeacherStatistics._from_state(state) for name, state in states.items()}


def _read(path: StrPath) -> dict[str, State]:
    states, progress = statistics_files.read(path)
    if progress is not None and not progress.get("complete"):
        user_warnings.warn(
            f"{path} has statistics of the first {progress.get('batches')} batches only: "
            "collect_teacher_statistics has not finished this file"
        )
    return states


def _symmetric(x: Tensor) -> Tensor:
    """Symmetrise a matrix product, which may round an element and its mirror image differently."""
    return (x + x.mT) / 2


def _outer(x: Tensor) -> Tensor:
    """``x x^T``, symmetric to the last bit; scaling ``x`` on one side only would lose that."""
    return x[:, None] * x


def group_size(group: distributed.ProcessGroup | None) -> int:
    """The number of processes in a group that contains this one."""
    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError(
            "statistics of several processes need a process group: call "
            "torch.distributed.init_process_group first"
        )
    if distributed.get_rank(group) < 0:
        raise RuntimeError("group must contain this process; got one without it")
    return distributed.get_world_size(group)
