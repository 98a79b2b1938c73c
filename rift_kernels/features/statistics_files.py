"""Files of teacher statistics: how they are written, and what is accepted of one that is read.

A safetensors file, in which layer ``name`` has the float64 tensors ``name.count ()``,
``name.mean (D,)`` and ``name.scatter (D, D)``, and the unnamed layer, ``""``, the same without a
prefix. Of the metadata, ``format`` and ``version`` say what the file is, ``decay`` (JSON) has a
number a layer, ``progress`` (JSON) what :mod:`.collect` has to know to go on, and ``sha256`` covers
all else.
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
# Relative to the largest entry. What is written here is symmetric to the last bit.
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
    """All of it or nothing: a temporary file beside ``path`` takes its place when it is whole."""
    safetensors = _safetensors()
    path = Path(path)
    check_writable(path)
    # Copies: safetensors takes no tensor twice, but layers may be one and the same.
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
    """There is a directory for ``path``, and the package that writes it."""
    _safetensors()
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "path must be in a directory that exists", str(path))


def read(path: StrPath) -> tuple[dict[str, State], Progress | None]:
    """The layers in the order in which they were written.

    Raises:
        ValueError: this is no such file, or a damaged one.
        FileNotFoundError: there is none.
    """
    safetensors = _safetensors()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            _ours(path, metadata)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no mapping
    except safetensors.SafetensorError as error:
        _refuse(path, f"safetensors says {str(error)!r}")
    if metadata.pop("sha256", None) != _digest(metadata, tensors):
        _refuse(path, "its content does not agree with its SHA-256: it is damaged")
    decays, progress = (_json(path, metadata, key) for key in ("decay", "progress"))
    if not isinstance(decays, dict) or not decays:
        _refuse(path, f"its metadata have decay={decays!r}, not a number a layer")
    if progress is not None and not isinstance(progress, dict):
        _refuse(path, f"its metadata have progress={progress!r}")
    return _states(path, decays, tensors), progress


def _ours(path: Path, metadata: Mapping[str, str]) -> None:
    """The file says that it is of this format, and of a version that is known here."""
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
    """One a layer, checked."""
    keys = {_key(name, part) for name in decays for part in PARTS}
    if keys != tensors.keys():
        wrong = sorted(keys ^ tensors.keys())[:3]
        _refuse(path, f"of its tensors, these are missing or too many: {', '.join(wrong)}")
    states = {}
    for name, decay in decays.items():
        parts = {part: tensors[_key(name, part)] for part in PARTS}
        if not isinstance(decay, float) or not 0 < decay <= 1:
            _refuse(path, f"layer {name!r} has decay={decay!r}, not a number in (0, 1]")
        found = _fault(**parts)
        if found:
            _refuse(path, f"layer {name!r} has {found}")
        states[name] = State(**parts, decay=decay)
    return states


def _fault(count: Tensor, mean: Tensor, scatter: Tensor) -> str | None:
    """What of these cannot be statistics, if anything; NaN can, that of features with NaN."""
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
    """Of everything in the file that is not the digest itself."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _refuse(path: Path, found: str) -> NoReturn:
    raise ValueError(
        f"{path} is not a file of teacher statistics: {found}; accepted is a safetensors file of "
        f"format {FORMAT!r}, version {VERSION!r}, as save_statistics writes it"
    )


def _safetensors() -> Any:
    """The package is needed for files alone, so importing this one must not import it."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "files of teacher statistics need safetensors: pip install 'rift_kernels[statistics]'"
        ) from error
    return safetensors
