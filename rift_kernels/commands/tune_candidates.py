"""The configurations that ``python -m rift_kernels tune`` tries, and their order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from rift_kernels.backends.triton.config import Config

Fields = dict[str, Any]


class Workload(NamedTuple):
    """Features that represent a class of shapes."""

    rows: int
    width: int
    dtype: torch.dtype


class Group(NamedTuple):
    """Fields that are varied together, and the values that they take."""

    name: str
    variants: list[Fields]


def by_importance(classes: Sequence[str]) -> list[str]:
    """The classes that take most of a training's time first, of large bfloat16 features."""

    def rank(shapes: str) -> tuple[int, int, int]:
        form, size, kind = shapes.split()
        return ("large", "medium", "small").index(size), kind != "bf16", form != "covariance"

    return sorted(classes, key=rank)


def workload(shapes: str) -> Workload:
    """The features that a class is tuned on."""
    form, size, kind = shapes.split()
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    if form == "gram":
        return Workload({"small": 64, "medium": 128, "large": 512}[size], 768, dtype)
    return Workload(8192, {"small": 64, "medium": 128, "large": 768}[size], dtype)


def groups(shapes: str) -> list[Group]:
    """Groups of fields, the most important first."""
    form, size, _ = shapes.split()
    backward = "backward" if form == "covariance" else "gram_backward"
    columns, depths, warps = (64, 128), (32, 64), (4, 8)
    if form == "gram" and size != "large":
        small = product((64, 128, 256, 512), (16, 32, 64))
        # Any depth covers all rows in one step.
        rows, tiles = workload(shapes).rows, product((32, *columns), warps)
        return [
            Group("forward", [{"small_share": share, "small_k": k} for share, k in small]),
            Group(
                "backward", [{backward: (rows, n, rows), f"{backward}_warps": w} for n, w in tiles]
            ),
        ]
    moments = product((64, 128), (32, 64, 128), warps, (2, 3, 4, 5))
    widths = columns if form == "gram" else (*columns, 256)
    products = product(columns, widths, depths, warps, (1, 2, 3, 4))
    heads = product((16, 32, 64), (2, 4, 8))
    return [
        Group(
            "moments",
            [{"block": b, "block_k": k, "warps": w, "stages": s} for b, k, w, s in moments],
        ),
        Group(
            "backward",
            [
                {backward: (m, n, k), f"{backward}_warps": w, f"{backward}_stages": s}
                for m, n, k, w, s in products
            ],
        ),
        Group("heads", [{"sub": rows, "head_warps": w} for rows, w in heads]),
        Group("rows", [{"block_r": rows} for rows in (16, 32, 64)]),
    ]


def candidates(shapes: str, base: Config, group: Group, limit: int) -> list[Config]:
    """The variants of ``base`` that the kernels accept and shared memory can hold, the nearest
    first: one that compiles without spills has neighbours that do."""
    from rift_kernels.backends.triton.config import FIELDS, ConfigError, entry

    form = shapes.split()[0]
    accepted = []
    for fields in group.variants:
        changed = base._replace(**fields)
        if form == "covariance" and "block" in fields:
            # The depth of the backward must divide it.
            m, n, k = changed.backward
            changed = changed._replace(backward=(m, n, min(k, changed.block)))
        if "block" in fields:
            changed = changed._replace(sub=min(changed.sub, changed.block))
        if changed == base or shared_bytes(shapes, changed) > limit:
            continue
        try:
            accepted.append(entry("a candidate", shapes, as_json(changed, FIELDS[form])))
        except ConfigError:
            continue
    return sorted(accepted, key=lambda config: distance(base, config))


def distance(one: Config, other: Config) -> float:
    """Steps between two configurations: factors of two, and single stages."""
    steps = 0.0
    for name in one._fields:
        a, b = (getattr(config, name) for config in (one, other))
        for first, second in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
            is_linear = name.endswith("stages") or first == second
            steps += abs(first - second) if is_linear else abs(math.log2(first / second))
    return steps


def as_json(config: Config, fields: Sequence[str]) -> Fields:
    """The entry of a file."""
    values = {name: getattr(config, name) for name in fields}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def shared_bytes(shapes: str, config: Config) -> int:
    """An estimate for the kernel that needs most: its stages, and operands made from the last."""
    form, _, kind = shapes.split()
    is_split, itemsize = (False, 2) if kind == "bf16" else (True, 4)
    tile = config.block * config.block_k
    moments = 2 * tile * 2 * config.stages
    if is_split:
        moments = 2 * tile * 4 * (config.stages - 1) + 4 * tile * 2
    if form == "covariance":
        m, n, k = config.backward
        step = 2 * m * k * itemsize + k * n * 2
        return max(moments, step * (config.backward_stages - 1) + 2 * k * n * 2)
    m, n, k = config.gram_backward
    step = 2 * m * k * 4 + k * n * itemsize
    return max(moments, step * (config.gram_backward_stages - 1) + 2 * m * k * 2 + k * n * itemsize)
