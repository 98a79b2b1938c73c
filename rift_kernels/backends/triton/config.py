"""Block sizes, warps and stages: looked up in a table by architecture and by class of shapes.

``configs.json`` holds an entry for every class of every architecture. A file named by
RIFT_KERNELS_CONFIGS, which ``python -m rift_kernels tune`` writes, overrides entries of it.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .layers import Layers

ENVIRONMENT_VARIABLE = "RIFT_KERNELS_CONFIGS"
SHIPPED = Path(__file__).with_name("configs.json")
FORMS = ("covariance", "gram")
# Up to 64, up to 128, or more: columns of the widest layer, or rows of the longest in Gram form.
SIZES = ("small", "medium", "large")
# As they are, or split in two because they have more digits: `Layers.is_split`.
FEATURES = ("bf16", "split")

Block = tuple[int, int, int]


class Config(NamedTuple):
    """What launches ask for. Fields of the other form are 0."""

    block: int  # rows and columns of a tile of moments
    block_k: int
    warps: int
    stages: int
    block_r: int  # rows that column sums load at a time
    sub: int  # rows of a tile per program of a head
    head_warps: int
    backward: Block = (0, 0, 0)
    backward_warps: int = 0
    backward_stages: int = 0
    gram_backward: Block = (0, 0, 0)
    gram_backward_warps: int = 0
    gram_backward_stages: int = 0
    small_share: int = 0  # columns per program of gram_cka_small
    small_k: int = 0


COMMON = Config._fields[:7]
FIELDS = {"covariance": COMMON + Config._fields[7:10], "gram": COMMON + Config._fields[10:]}
CLASSES = tuple(f"{form} {size} {kind}" for form in FORMS for size in SIZES for kind in FEATURES)

Table = dict[str, dict[str, Config]]


class ConfigError(ValueError):
    """A table that cannot be used; the message names the file and the entry."""


_configurations: dict[tuple[object, ...], Config] = {}


def configuration(layers: Layers, form: str) -> Config:
    """The entry for these layers. Every call of a loss comes here, so the path is short."""
    side = layers.max_rows if form == "gram" else layers.widest
    size = 0 if side <= 64 else 1 if side <= 128 else 2
    is_aligned = layers.vector > 1
    key = layers.device, layers.is_split, form, size, is_aligned
    config = _configurations.get(key)
    if config is None:
        kind = "split" if layers.is_split else "bf16"
        config = lookup(architecture(layers.device), f"{form} {SIZES[size]} {kind}")
        if not is_aligned:
            config = _narrowed(config, layers.is_split)
        _configurations[key] = config
    return config


def _narrowed(config: Config, is_split: bool) -> Config:
    """Smaller blocks, for features loaded element by element, whose addresses fill registers.

    Single elements of 4 bytes are not loaded ahead, because Triton would transpose the copies, at
    the price of 32-way bank conflicts.
    """
    rows, columns, depth = config.backward
    gram_rows, gram_columns, gram_depth = config.gram_backward
    return config._replace(
        block_k=max(config.block_k // 4, 16),
        block_r=16,
        backward=(rows, min(columns, 64), max(depth // 2, 16)),
        backward_stages=min(config.backward_stages, 2) if is_split else config.backward_stages,
        gram_backward=(gram_rows, gram_columns // 2, gram_depth),
        gram_backward_stages=1 if is_split else config.gram_backward_stages,
        small_k=min(config.small_k, 16),
    )


def architecture(device: torch.device) -> str:
    """What tables call a device: "sm90", "gfx942", and "cpu" for the interpreter."""
    if device.type == "cpu":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.partition(":")[0]
    return f"sm{properties.major}{properties.minor}"


def lookup(name: str, shapes: str) -> Config:
    """An architecture's entry, or that of the closest older one."""
    table = _table()
    for candidate in _candidates(name, table):
        if shapes in table[candidate]:
            return table[candidate][shapes]
    raise AssertionError(f"{SHIPPED} has an entry for everything")


def _candidates(name: str, table: Table) -> list[str]:
    if name == "cpu":
        return ["cpu"]
    if name.startswith("gfx"):
        return [arch for arch in (name, "gfx942") if arch in table]
    numbers = sorted((int(arch[2:]) for arch in table if arch.startswith("sm")), reverse=True)
    older = [number for number in numbers if number <= int(name[2:])]
    return [f"sm{number}" for number in older or numbers[-1:]]


@cache
def _table() -> Table:
    table = read(SHIPPED)
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    if override:
        for arch, entries in read(Path(override)).items():
            table[arch] = {**table.get(arch, {}), **entries}
    return table


def use(name: str, shapes: str, config: Config) -> None:
    """Override an entry in this process, as the tuner does to try one out."""
    _table().setdefault(name, {})[shapes] = config
    _configurations.clear()


def forget() -> None:
    """Read the tables again at the next call."""
    _table.cache_clear()
    _configurations.clear()


def read(path: Path) -> Table:
    """A table from a file, checked.

    A string in place of an entry or an architecture names another one with the same content. Names
    that begin with an underscore are comments.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the configurations in {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold an object of architectures")
    table: Table = {}
    for arch, entries in content.items():
        if arch.startswith("_"):
            continue
        entries = _resolved(path, arch, entries, content)
        table[arch] = {
            shapes: entry(f"{path}: {arch}: {shapes}", shapes, _resolved(path, arch, v, entries))
            for shapes, v in entries.items()
            if not shapes.startswith("_")
        }
    return table


def _resolved(path: Path, arch: str, value: Any, others: dict[str, Any]) -> dict[str, Any]:
    """An object, or the one among ``others`` that a string names."""
    if isinstance(value, str):
        value = others.get(value, value)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {arch}: {value!r} is neither an object nor the name of one")
    return value


def entry(place: str, shapes: str, values: dict[str, Any]) -> Config:
    """A table's entry as a Config; errors name its ``place`` if the kernels cannot run with it."""
    if shapes not in CLASSES:
        raise ConfigError(f"{place}: no such class, the classes are {', '.join(CLASSES)}")
    fields = FIELDS[shapes.partition(" ")[0]]
    if values.keys() != set(fields):
        wrong = ", ".join(sorted(values.keys() ^ set(fields)))
        raise ConfigError(f"{place}: unknown or missing: {wrong}")
    for name, value in values.items():
        _check_value(f"{place}: {name}", name, value)
    hashable: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    config = Config(**hashable)
    parts = {"sub": config.sub}
    if shapes.startswith("covariance"):
        parts |= {"backward's depth": config.backward[2]}
    for name, part in parts.items():
        # Kernels read and write planes, which are padded to whole blocks and no further.
        if config.block % part:
            raise ConfigError(f"{place}: {name}, {part}, must divide block, {config.block}")
    return config


def _check_value(place: str, name: str, value: Any) -> None:
    if name.endswith("backward"):
        if not isinstance(value, list) or len(value) != 3:
            raise ConfigError(f"{place} must be three numbers, not {value!r}")
        for part in value:
            _check_value(place, "block", part)
        return
    smallest = 1 if name.endswith(("warps", "stages")) else 16
    if type(value) is not int or value < smallest:
        raise ConfigError(f"{place} must be an integer from {smallest} on, not {value!r}")
    if not name.endswith("stages") and value & (value - 1):
        raise ConfigError(f"{place} must be a power of two, not {value}")
    if name.endswith("warps") and value > 16:
        raise ConfigError(f"{place} must be at most 16, not {value}")
