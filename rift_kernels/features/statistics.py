"""Streaming mean and covariance of a frozen teacher's features, so that training needs no teacher.

:class:`TeacherStatistics` adds batches up, on one process or several; :func:`save_statistics` and
:func:`load_statistics` keep those of several layers in one file, whose format is that of
:mod:`.statistics_files`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn

from rift_kernels.dispatch import checks
from rift_kernels.measures.centering import center

from . import statistics_files
from .statistics_files import State, StrPath


class TeacherStatistics(nn.Module):
    """Mean and covariance of features that come in batches, exact to the rounding of float64.

    With weights ``w_i`` of the valid rows ``x_i``::

        count = sum_i w_i    mean = sum_i w_i x_i / count
        scatter = sum_i w_i (x_i - mean)(x_i - mean)^T

    All weights are 1 for ``decay=1``. Else ``count`` and ``scatter`` are multiplied by ``decay``
    before each update, so that the rows of update t of T weigh ``decay ** (T - t)``: statistics of
    the latest updates, exponentially weighted. ::

        statistics = rk.TeacherStatistics(768)
        for batch in loader:
            statistics.update(teacher(batch))
        statistics.mean, statistics.covariance()

    ``count ()``, ``mean (D,)`` and ``scatter (D, D)`` are buffers: ``state_dict()`` holds them, and
    they move with the module. They are float64 and stay so when the module is cast. No parameters.

    Args:
        width: D, the number of features a row.
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
        with torch.inference_mode(False):  # or no later update could change them
            self.register_buffer("count", torch.zeros((), dtype=torch.float64))
            self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
            self.register_buffer("scatter", torch.zeros(width, width, dtype=torch.float64))

    @property
    def width(self) -> int:
        """D, the number of features a row."""
        return self.mean.shape[0]

    @torch.no_grad()
    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch.

        Centered within the batch and merged by the formula of Chan, Golub and LeVeque (1979). With
        ``decay=1`` it makes no difference how the data are cut into batches, beyond rounding: the
        scatter's relative error is float64's, times offset over deviation where that is more than
        1 (a sum of squares has its square). Under inference mode, autocast and
        ``torch.compile(fullgraph=True)`` it does the same. The host never waits for a GPU.

        Args:
            features: (..., N, D), float64, float32, bfloat16 or float16, on the statistics' device.
                All leading axes are rows. NaN or Inf in a valid row makes the statistics NaN, for
                good; without valid rows they stay what they are (and do not decay).
            mask: boolean (..., N), True = valid. Whatever masked rows hold has no effect.
        """
        checks.rows("features", features, mask, self.width, self.mean.device)
        rows = features.reshape(-1, self.width)
        mask = None if mask is None else mask.reshape(-1)
        centered, mean, n = center(rows, mask, torch.float64)
        # torch.compile (2.13) loses changes of a 0-dimensional float64 tensor on a CPU.
        count = self.count.view(1)
        if self.decay != 1:
            factor = torch.where(n > 0, torch.full_like(n, self.decay), 1.0)
            count.mul_(factor)
            self.scatter.mul_(factor)
        # Of no rows, the mean is NaN and the share 0 / 0.
        share = torch.where(n > 0, n / (count + n), 0.0)
        delta = torch.where(n > 0, mean - self.mean, 0.0)
        scatter = centered.mT @ centered
        self.scatter.add_(_symmetric(scatter)).add_(_outer(delta) * (count * share))
        self.mean.add_(delta * share)
        count.add_(n)

    def covariance(self, correction: float = 1.0) -> Tensor:
        """``scatter / (count - correction)``, (D, D) in float64; NaN where count <= correction.

        ``correction=1`` makes it unbiased where all rows weigh the same, 0 that of the rows alone.
        """
        divisor = self.count - checks.number("correction", correction)
        return self.scatter / torch.where(divisor > 0, divisor, float("nan"))

    @torch.no_grad()
    def all_reduce_(self, group: distributed.ProcessGroup | None = None) -> None:
        """Make these the statistics over the data of all processes of ``group``, on each of them.

        Exact, by Chan's formula; the same to the last bit on every process. Processes without data
        take part as well. Call it once, when all data are in: what is merged twice counts twice.

        Args:
            group: None is the default group, of all processes. Its backend must serve the
                statistics' device.

        Raises:
            RuntimeError: there is no process group, or this process is not in it.
            ValueError: on every process, where widths or decays differ between processes.
        """
        size = group_size(group)
        own = torch.tensor([self.width, self.decay], dtype=torch.float64, device=self.mean.device)
        everyone = [torch.empty_like(own) for _ in range(size)]
        distributed.all_gather(everyone, own, group=group)
        for name, values in zip(("width", "decay"), torch.stack(everyone).T.tolist(), strict=True):
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
        # Processes may be added up in another order for each element.
        self.scatter.copy_(_symmetric(scatter))

    def save(self, path: StrPath) -> None:
        """Write a file as :func:`save_statistics` does, with this as its only, unnamed layer."""
        save_statistics({"": self}, path)

    @classmethod
    def load(cls, path: StrPath, width: int | None = None) -> Self:
        """The statistics of a file that has one layer, whatever its name, on the CPU.

        Args:
            path: of :meth:`save`, :func:`save_statistics` or
                :func:`~rift_kernels.collect_teacher_statistics`.
            width: what their width must be; None takes any.

        Raises:
            ValueError: the file has several layers or another width, or see
                :func:`load_statistics`.
            FileNotFoundError: there is none.
        """
        states = _read(path)
        if len(states) != 1:
            raise ValueError(
                f"{path} has the layers {', '.join(map(repr, states))}: TeacherStatistics.load "
                "takes a file of one layer, load_statistics any"
            )
        (state,) = states.values()
        found = state.mean.shape[0]
        if width is not None and found != checks.positive("width", width):
            raise ValueError(f"{path} has statistics of width {found}; width asks for {width}")
        return cls._of(state)

    @classmethod
    def _of(cls, state: State) -> Self:
        result = cls(state.mean.shape[0], decay=state.decay)
        with torch.no_grad():
            for part in statistics_files.PARTS:
                getattr(result, part).copy_(getattr(state, part))
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Whatever moves or casts a module, but these are never cast."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        with torch.inference_mode(False):
            return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.width}, decay={self.decay}"


def save_statistics(statistics: Mapping[str, TeacherStatistics], path: StrPath) -> None:
    """Write the statistics of several layers, by name, into one safetensors file.

    The file is written beside ``path`` and takes its place when it is whole, so an interrupted call
    leaves what was there.

    Args:
        statistics: at least one layer; any names.
        path: in a directory that exists.

    Raises:
        TypeError, ValueError: ``statistics`` is something else, or empty.
        FileNotFoundError: there is no such directory.
        ImportError: safetensors is not installed.
    """
    write(statistics, path)


def write(
    statistics: Mapping[str, TeacherStatistics],
    path: StrPath,
    progress: dict[str, Any] | None = None,
) -> None:
    """:func:`save_statistics`, of statistics that may be unfinished."""
    if not isinstance(statistics, Mapping):
        raise TypeError(
            f"statistics must be a mapping of names to TeacherStatistics; got "
            f"{type(statistics).__name__}"
        )
    if not statistics:
        raise ValueError("statistics must have at least one layer; got none")
    for name, layer in statistics.items():
        if not isinstance(name, str) or not isinstance(layer, TeacherStatistics):
            raise TypeError(
                "statistics must be a mapping of names to TeacherStatistics; got "
                f"{name!r}: {type(layer).__name__}"
            )
    states = {
        name: State(layer.count, layer.mean, layer.scatter, layer.decay)
        for name, layer in statistics.items()
    }
    statistics_files.write(path, states, progress)


def load_statistics(path: StrPath) -> dict[str, TeacherStatistics]:
    """The statistics that :func:`save_statistics` wrote, by name, in their order, on the CPU.

    Warns where the file is of a :func:`~rift_kernels.collect_teacher_statistics` that has not
    finished: its statistics are those of the batches so far.

    Raises:
        ValueError: the file is damaged, of another format or version, or its tensors are not
            statistics. The message has the path, what was found, and what is accepted.
        FileNotFoundError: there is none.
        ImportError: safetensors is not installed.
    """
    return {name: TeacherStatistics._of(state) for name, state in _read(path).items()}


def read(path: StrPath) -> tuple[dict[str, TeacherStatistics], dict[str, Any] | None]:
    """:func:`load_statistics`, of statistics that may be unfinished."""
    states, progress = statistics_files.read(path)
    return {name: TeacherStatistics._of(state) for name, state in states.items()}, progress


def _read(path: StrPath) -> dict[str, State]:
    states, progress = statistics_files.read(path)
    if progress is not None and not progress.get("complete"):
        warnings.warn(
            f"{path} has the statistics of the first {progress.get('batches')} batches: "
            "collect_teacher_statistics with this path has not finished",
            stacklevel=3,
        )
    return states


def _symmetric(x: Tensor) -> Tensor:
    """A matrix product may round an element and its mirror image differently."""
    return (x + x.mT) / 2


def _outer(x: Tensor) -> Tensor:
    """``x x^T``, symmetric to the last bit, as long as nothing is multiplied into one side."""
    return x[:, None] * x


def group_size(group: distributed.ProcessGroup | None) -> int:
    """How many processes are in a group, this one among them."""
    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError(
            "statistics of several processes need a process group: call "
            "torch.distributed.init_process_group first"
        )
    if distributed.get_rank(group) < 0:
        raise RuntimeError("group must have this process in it")
    return distributed.get_world_size(group)
