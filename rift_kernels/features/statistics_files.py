"""Write files of teacher statistics, and validate those that are read.

Each is a safetensors file. Layer ``name`` has the float64 tensors ``name.count ()``,
``name.mean (D,)`` and ``name.scatter (D, D)``; the unnamed layer, ``""``, has them without a
prefix. In the metadata, ``format`` and ``version`` identify the file, and ``decay`` (JSON) has one
number for each layer. ``progress`` (JSON) lets :mod:`.collect` resume, and ``sha256`` covers
everything else.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

FORMAT, VERSION = "rift_kernels.statistics", "1"
# Tolerance relative to the largest entry; a scatter written here is symmetric to the last bit.
ASYMMETRY = 1e-9

StrPath = str | os.PathLike[str]
Progress = dict[str, Any]


@dataclass(frozen=True)
class State:
    """The statistics of one layer."""

    count: Tensor
    mean: Tensor
    scatter: Tensor
    decay: float = 1.0


PARTS = tuple(field.name for field in fields(State) if field.name != "decay")


def write(path: StrPath, states: Mapping[str, State], progress: Progress | None = None) -> None:
    """Write atomically: a temporary file beside ``path`` replaces it once complete."""
    safetensors = _safetensors()
    path = Path(path)
    check_writable(path)
    # Copies, because safetensors refuses a tensor twice, and two names may share a layer.
    tensors = {
        _key(name, part): getattr(state, part).detach().to("cpu", copy=True).contiguous()
        for name, state in states.items()
        for part in PARTS
    }
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "decay": json.dumps({name: state.decay for name, state in states.items()}),
        "progress": json.dumps(progress),
    }
    metadata["sha256"] = _digest(metadata, tensors)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        safetensors.torch.save_file(tensors, temporary, metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _key(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def check_writable(path: Path) -> None:
    """Check that the directory of ``path`` exists and that safetensors is installed."""
    _safetensors()
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "path must be in a directory that exists", str(path))


def read(path: StrPath) -> tuple[dict[str, State], Progress | None]:
    """The layers in the order of writing, and the progress of an unfinished collection.

    Raises:
        ValueError: the file is damaged or has another format.
        FileNotFoundError: there is no such file.
    """
    safetensors = _safetensors()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            _check_format(path, metadata)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no mapping
    except safetensors.SafetensorError as error:
        _refuse(path, f"safetensors says {str(error)!r}")
    if metadata.pop("sha256", None) != _digest(metadata, tensors):
        _refuse(path, "its content does not match its SHA-256, so it is damaged")
    decays, progress = (_json(path, metadata, key) for key in ("decay", "progress"))
    if not isinstance(decays, dict) or not decays:
        _refuse(path, f"its metadata have decay={decays!r}, not a number for each layer")
    if progress is not None and not isinstance(progress, dict):
        _refuse(path, f"its metadata have progress={progress!r}")
    return _states(path, decays, tensors), progress


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    """Check that the file declares this format and version."""
    for key, accepted in (("format", FORMAT), ("version", VERSION)):
        if metadata.get(key) != accepted:
            _refuse(path, f"its metadata have {key}={metadata.get(key)!r}")


def _json(path: Path, metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata[key])
    except (KeyError, ValueError):
        _refuse(path, f"its metadata have {key}={metadata.get(key)!r}, which is not JSON")


def _states(
    path: Path, decays: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, State]:
    """The validated state of each layer."""
    keys = {_key(name, part) for name in decays for part in PARTS}
    if keys != tensors.keys():
        differences = sorted(keys ^ tensors.keys())[:3]
        _refuse(path, f"these tensors are missing or unexpected: {', '.join(differences)}")
    states = {}
    for name, decay in decays.items():
        parts = {part: tensors[_key(name, part)] for part in PARTS}
        if not isinstance(decay, float) or not 0 < decay <= 1:
            _refuse(path, f"layer {name!r} has decay={decay!r}, not a number in (0, 1]")
        fault = _find_fault(**parts)
        if fault:
            _refuse(path, f"layer {name!r} has {fault}")
        states[name] = State(**parts, decay=decay)
    return states


def _find_fault(count: Tensor, mean: Tensor, scatter: Tensor) -> str | None:
    """Why these cannot be statistics, or None. NaN is valid, because features may contain it."""
    for name, tensor in (("count", count), ("mean", mean), ("scatter", scatter)):
        if tensor.dtype != torch.float64:
            return f"a {name} of {tensor.dtype}, not torch.float64"
    width = mean.numel()
    shapes = [tuple(tensor.shape) for tensor in (count, mean, scatter)]
    if width == 0 or shapes != [(), (width,), (width, width)]:
        return f"count, mean and scatter of shapes {shapes}, not (), (D,) and (D, D)"
    if not 0 <= float(count) < float("inf"):
        return f"count={float(count)}, not finite and at least 0"
    if (scatter.diagonal() < 0).any():
        return "a scatter with a negative diagonal"
    if ((scatter - scatter.mT).abs() > ASYMMETRY * scatter.abs().max()).any():
        return "a scatter that is not symmetric"
    return None


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything in the file except the digest."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _refuse(path: Path, fault: str) -> NoReturn:
    raise ValueError(
        f"path must be a safetensors file of format {FORMAT!r}, version {VERSION!r}, as "
        f"save_statistics writes it; got {path}: {fault}"
    )


def _safetensors() -> Any:
    """Import safetensors only here, so that it is required for files alone."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "files of teacher statistics need safetensors: pip install 'rift_kernels[statistics]'"
        ) from error
    return safetensors
