"""Verdicts on kernels, remembered on disk: one small file each, of this user alone.

A verdict holds for a GPU model, a driver, these versions and these very kernels: that is its
folder's name, and stands in the file, too. Files come into being whole (a temporary one, renamed)
and are never changed. Where nothing can be written or what is there cannot be trusted, there is no
verdict, and that is all.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rift_kernels._version import __version__

ENVIRONMENT_VARIABLE = "RIFT_KERNELS_CACHE_DIR"
SCHEMA = "rift_kernels verdict 1"
PACKAGE = Path(__file__).parent.parent
# What is between a call and the kernels, and what they are tried on.
_SOURCES = ("backends", "dispatch", "measures", "trust/known_answers.*", "commands/trial.py")

Identity = dict[str, str]


class Kernels(NamedTuple):
    """Those that run together for a kind of problem, in one dtype of features."""

    backend: str
    family: str
    dtype: str

    def __str__(self) -> str:
        return "/".join(self)


class Verdict(NamedTuple):
    """Whether kernels were seen to work, or else what was seen."""

    good: bool
    seen: str = ""


def root() -> Path | None:
    """The folder for verdicts, which need not exist; None where a user has no place for such."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return Path(named)
    try:
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return base / "rift_kernels"


def identity(backend: str, device: torch.device) -> Identity:
    """All that a verdict on a backend's kernels hangs on."""
    return {
        **_gpu(device),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "rift_kernels": __version__,
        "kernels": _fingerprint(backend, os.environ.get("RIFT_KERNELS_CONFIGS", "")),
    }


@cache
def _gpu(device: torch.device) -> Identity:
    if device.type != "cuda":
        return {"gpu": "none", "architecture": "cpu", "driver": "none"}
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return {
            "gpu": properties.name,
            "architecture": properties.gcnArchName,
            "driver": torch.version.hip,
        }
    return {
        "gpu": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "driver": _driver(),
    }


def _driver() -> str:
    """The kernel module's version, and the CUDA version of the library that belongs to it."""
    found = ""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        match = re.search(r"\d+\.\d+(\.\d+)?", text)
        found = match.group() if match else ""
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    if version is not None:
        found += f" CUDA {version()}"
    return found.strip() or "unknown"


@cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def sources() -> list[Path]:
    """The files that a verdict holds for."""
    found = [path for pattern in _SOURCES for path in PACKAGE.glob(pattern)]
    files = [path for path in found if path.is_file()]
    files += [path for folder in found if folder.is_dir() for path in folder.rglob("*")]
    return sorted(path for path in files if path.suffix in (".py", ".json"))


@cache
def _fingerprint(backend: str, configurations: str) -> str:
    """Of everything that kernels are made of, and of what they are tried on."""
    files = sources()
    if configurations:
        files.append(Path(configurations))
    extension = importlib.util.find_spec("rift_kernels._C") if backend == "cuda" else None
    if extension is not None and extension.origin:
        files.append(Path(extension.origin))
    digest = hashlib.sha256()
    for file in sorted(files):
        with contextlib.suppress(OSError):
            content = file.read_bytes()
            digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _folder(of: Identity) -> Path | None:
    base = root()
    name = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:20]
    return base and base / "verdicts" / name


def _file(folder: Path, kernels: Kernels) -> Path:
    return folder / f"{'-'.join(kernels)}.json"


def read(of: Identity, kernels: Kernels) -> Verdict | None:
    """The verdict on these kernels, if there is one that is well formed and this user's."""
    folder = _folder(of)
    if folder is None:
        return None
    try:
        with _file(folder, kernels).open(encoding="utf-8") as file:
            if not _is_own(os.fstat(file.fileno())):
                return None
            content = json.load(file)
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    good, seen = content.get("good"), content.get("seen")
    expected = (SCHEMA, of, str(kernels))
    if tuple(content.get(name) for name in ("schema", "identity", "kernels")) != expected:
        return None
    return Verdict(good, seen) if isinstance(good, bool) and isinstance(seen, str) else None


def _is_own(status: os.stat_result) -> bool:
    """Nobody else, but for the machine's owner, may have written it."""
    if not hasattr(os, "getuid"):
        return True
    mine = status.st_uid in (os.getuid(), 0)
    return mine and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def write(of: Identity, kernels: Kernels, verdict: Verdict) -> bool:
    """Whether the verdict could be stored."""
    folder = _folder(of)
    if folder is None:
        return False
    content: dict[str, Any] = {"schema": SCHEMA, "identity": of, "kernels": str(kernels)}
    content |= {"good": verdict.good, "seen": verdict.seen}
    temporary = None
    try:
        _make(folder)
        # Nobody else may read it, nor write: mkstemp's files are so.
        number, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
        with os.fdopen(number, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        Path(temporary).replace(_file(folder, kernels))
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
        return False
    return True


def _make(folder: Path) -> None:
    folder.parent.parent.parent.mkdir(parents=True, exist_ok=True)
    for one in (folder.parent.parent, folder.parent, folder):
        one.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def alone(of: Identity, seconds: float) -> Iterator[None]:
    """Wait for other processes that are at the same kernels, up to some time, or as it is possible.

    The system takes the lock back from a process that ends, however it does.
    """
    with contextlib.ExitStack() as stack:
        folder = _folder(of)
        if folder is not None:
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                _make(folder)
                file = stack.enter_context((folder / "lock").open("a"))
                end = time.monotonic() + seconds
                while True:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        if time.monotonic() < end:
                            time.sleep(0.1)
                            continue
                    break
        yield
