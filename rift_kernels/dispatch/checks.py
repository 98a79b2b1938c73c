"""Checks of a caller's arguments, before anything runs.

Each error names the argument, what is accepted, and what was passed.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor, nn

Features = Tensor | Sequence[Tensor]
Mask = Tensor | Sequence[Tensor] | None

PRECISIONS = ("highest", "high", "medium")
SCALES = ("relative", "coral", "none")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Layers(NamedTuple):
    """Checked input, one entry per layer; a single tensor is one entry, with its leading axes.

    ``masks`` holds none, one for all layers, or one per layer; ``rotations`` none or one per layer.
    If ``statistics`` holds any, one per layer, these stand for the teachers, which are unused.
    """

    students: list[Tensor]
    teachers: list[Tensor]
    masks: list[Tensor]
    is_list: bool = False
    rotations: Sequence[Tensor] = ()
    statistics: Sequence[Statistics] = ()

    @property
    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Student and teacher of each layer."""
        return zip(self.students, self.teachers, strict=True)

    def mask(self, layer: int) -> list[Tensor]:
        """The mask of a layer, in a list; an empty list without one."""
        return self.masks[layer : layer + 1] or self.masks[:1]

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of student and teacher."""
        return self.students[0].dtype, self.teachers[0].dtype


class Statistics(Protocol):
    """Mean and covariance of a layer's features; :class:`rift_kernels.TeacherStatistics` is one."""

    count: Tensor
    mean: Tensor

    @property
    def width(self) -> int:
        """D, the number of features per row."""

    def covariance(self) -> Tensor:
        """The unbiased covariance, (D, D)."""


def option(name: str, value: object, accepted: Sequence[object]) -> None:
    """Check that ``value`` is one of ``accepted``."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}; got {value!r}")


def number(name: str, value: object) -> float:
    """Check that ``value`` is a finite number, zero or more, and return it as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    result = float(value)
    if not 0 <= result < float("inf"):
        raise ValueError(f"{name} must be finite and not negative; got {value!r}")
    return result


def flag(name: str, value: object) -> None:
    """Check that ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")


def is_features(teacher: object) -> TypeGuard[Features]:
    """Whether the teacher is given as features, and not as statistics of features."""
    several = isinstance(teacher, list | tuple) and len(teacher) > 0
    first = teacher[0] if several else teacher  # type: ignore[index]
    return not isinstance(first, nn.Module)


def is_statistics(teacher: object) -> TypeGuard[Statistics]:
    """Whether the teacher has the attributes of Statistics, which torch.compile can look up."""
    parts = ("count", "mean", "width", "covariance")
    return isinstance(teacher, nn.Module) and all(hasattr(teacher, part) for part in parts)


def positive(name: str, value: object) -> int:
    """Check that ``value`` is a whole number, one or more, and return it as an int."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")
    return int(value)


def rows(name: str, x: object, mask: object, width: int, device: torch.device) -> None:
    """Check that ``x`` is (..., N, width) on ``device``, ``mask`` None or a boolean per row."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    _floating(name, x)
    if x.dim() < 2 or x.shape[-1] != width:
        raise ValueError(f"{name} must be (..., N, {width}); got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device}; got {x.device}")
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a boolean tensor or None; got {type(mask).__name__}")
    _mask("mask", mask, x, features_name=name)


def layers(student: Features, teacher: Features, mask: Mask, *, equal_widths: bool) -> Layers:
    """Students, teachers and masks as lists, after checking that they fit one another.

    Raises:
        TypeError: something is not a tensor, or its dtype is not floating (boolean for a mask).
        ValueError: shapes, devices or lengths do not fit.
    """
    is_list = not isinstance(student, Tensor)
    students = _as_list("student", student, is_list)
    teachers = _as_list("teacher", teacher, is_list)
    if len(students) != len(teachers):
        raise ValueError(
            "student and teacher must have the same number of layers; "
            f"got {len(students)} and {len(teachers)}"
        )
    masks = _masks(mask, is_list, len(students))
    for i, (x, y) in enumerate(zip(students, teachers, strict=True)):
        index = f"[{i}]" if is_list else ""
        _pair(f"student{index}", f"teacher{index}", x, y, is_list)
        if equal_widths and x.shape[-1] != y.shape[-1]:
            raise ValueError(
                f"student{index} and teacher{index} must have the same width for this measure; "
                f"got {x.shape[-1]} and {y.shape[-1]} (covariance_distance takes a rotation, "
                "RIFTLoss learns one)"
            )
        if isinstance(mask, Tensor):
            _mask("mask", mask, x)
        elif masks:
            _mask(f"mask{index}", masks[i], x)
    for name, side in (("student", students), ("teacher", teachers)):
        for tensor in side:
            if tensor.dtype != side[0].dtype or tensor.device != side[0].device:
                raise ValueError(
                    f"all layers of {name} must have one dtype and one device; got "
                    f"{side[0].dtype} on {side[0].device} and {tensor.dtype} on {tensor.device}"
                )
    return Layers(students, teachers, masks, is_list)


def enough_rows(layers: Layers, min_rows: int) -> None:
    """Check that each layer has enough rows for a measure: valid ones, where masks are readable."""
    for i, x in enumerate(layers.students):
        index = f"[{i}]" if layers.is_list else ""
        if x.shape[-2] < min_rows:
            raise ValueError(
                f"student{index} and teacher{index} must have at least {min_rows} rows for this "
                f"measure; got {x.shape[-2]} (if only the last batch is smaller: drop_last=True; "
                "else a larger batch, the tokens as rows, or a group)"
            )
    for i, mask in enumerate(layers.masks):
        # The value is NaN instead if the mask cannot be read.
        if not mask.numel() or not is_readable(mask):
            continue
        fewest = int(mask.sum(-1).min())
        if fewest < min_rows:
            name = f"mask[{i}]" if len(layers.masks) > 1 else "mask"
            raise ValueError(
                f"{name} must leave at least {min_rows} valid rows for this measure; got {fewest}"
            )


def rotations(
    rotation: Features | None, layers: Layers, widths: Sequence[int] | None = None
) -> list[Tensor]:
    """One checked (D2, D1) matrix per layer, or an empty list for the identity.

    D2 is the teacher's width; ``widths`` gives it where statistics are rotated.
    """
    if rotation is None:
        return []
    matrices = _as_list("rotation", rotation, layers.is_list)
    if len(matrices) != len(layers.students):
        raise ValueError(
            f"rotation must have one matrix per layer; got {len(matrices)} for "
            f"{len(layers.students)} layers"
        )
    widths = widths or [y.shape[-1] for y in layers.teachers]
    for i, (q, (x, y), width) in enumerate(zip(matrices, layers.pairs, widths, strict=True)):
        name = f"rotation[{i}]" if layers.is_list else "rotation"
        _floating(name, q)
        expected = (width, x.shape[-1])
        if tuple(q.shape) != expected:
            raise ValueError(
                f"{name} must be (teacher width, student width) = {expected}; got {tuple(q.shape)}"
            )
        if q.device != y.device:
            raise ValueError(
                f"{name} and teacher must be on the same device; got {q.device} and {y.device}"
            )
    return matrices


def is_readable(tensor: Tensor) -> bool:
    """Whether reading it stalls nothing, unlike on a GPU or while torch.compile traces."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _as_list(name: str, value: Features, is_list: bool) -> list[Tensor]:
    if not is_list:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a tensor, because student is one; got {type(value).__name__}"
            )
        return [value]
    if not isinstance(value, list | tuple):
        accepted = "a tensor or a list of tensors" if name == "student" else "a list, as student is"
        raise TypeError(f"{name} must be {accepted}; got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} must have at least one layer; got an empty list")
    for i, tensor in enumerate(value):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor; got {type(tensor).__name__}")
    return list(value)


def _floating(name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "full_tensor"):  # a DTensor, whose class is slow to import
        raise TypeError(
            f"{name} must be a plain tensor; got a DTensor: pass its full_tensor() if it is "
            "sharded by columns or tokens, its to_local() if it is replicated or sharded by rows"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense tensor; got {kind}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {tensor.dtype}")


def _pair(x_name: str, y_name: str, x: Tensor, y: Tensor, is_list: bool) -> None:
    for name, tensor in ((x_name, x), (y_name, y)):
        _floating(name, tensor)
        shape = tensor.shape
        if is_list and len(shape) != 2:
            raise ValueError(f"{name} must be (N, D) in a list; got {tuple(shape)}")
        if len(shape) < 2:
            raise ValueError(f"{name} must be (..., N, D); got {tuple(shape)}")
        if shape[-1] == 0:
            raise ValueError(f"{name} must have at least one feature per row; got {tuple(shape)}")
    if x.device != y.device:
        raise ValueError(
            f"{x_name} and {y_name} must be on the same device; got {x.device} and {y.device}"
        )
    if x.shape[:-1] == y.shape[:-1]:
        return
    if x.shape[-2] != y.shape[-2]:
        raise ValueError(
            f"{x_name} and {y_name} must have the same number of rows; "
            f"got {x.shape[-2]} and {y.shape[-2]}"
        )
    raise ValueError(
        f"{x_name} and {y_name} must have the same leading axes; "
        f"got {tuple(x.shape)} and {tuple(y.shape)}"
    )


def _masks(mask: Mask, is_list: bool, count: int) -> list[Tensor]:
    if mask is None:
        return []
    if isinstance(mask, Tensor):
        return [mask]
    if not is_list:
        raise TypeError(f"mask must be a boolean tensor or None; got {type(mask).__name__}")
    masks = _as_list("mask", mask, is_list)
    if len(masks) != count:
        raise ValueError(f"mask must have one entry per layer, {count}; got {len(masks)}")
    return masks


def _mask(name: str, mask: Tensor, x: Tensor, features_name: str = "student") -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be boolean, True = valid; got {mask.dtype}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"{name} must be {tuple(x.shape[:-1])}, one entry per row; got {tuple(mask.shape)}"
        )
    if mask.device != x.device:
        raise ValueError(
            f"{name} and {features_name} must be on the same device; "
            f"got {mask.device} and {x.device}"
        )
