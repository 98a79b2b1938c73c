"""Verdicts on kernels, remembered on disk: one small file each, which only this user can write.

A verdict holds for one GPU model, driver, set of versions and set of sources. Their hash names its
folder, and the file repeats them. A file is written under a temporary name and then renamed, so it
is never seen half written. If nothing can be written, or a file cannot be trusted, there is simply
no verdict.
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
# The sources between a call and its kernels, and those of the test that kernels must pass.
_SOURCES = ("backends", "dispatch", "measures", "trust/known_answers.*", "commands/trial.py")

Identity = dict[str, str]  # the machine, the software and the kernels that a verdict is about


class Kernels(NamedTuple):
    """The kernels that run together for a kind of problem, in one dtype of features."""

    backend: str
    family: str
    dtype: str

    def __str__(self) -> str:
        return "/".join(self)


class Verdict(NamedTuple):
    """Whether kernels passed their test, or else what went wrong."""

    good: bool
    seen: str = ""


def root() -> Path | None:
    """The folder for verdicts, which need not exist; None for a user without a home."""
    folder = os.environ.get(ENVIRONMENT_VARIABLE)
    if folder:
        return Path(folder)
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
    """Everything that a verdict on a backend's kernels depends on."""
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
    """The version of the kernel module, and the CUDA version of its library."""
    text = ""
    with contextlib.suppress(OSError):
        file = Path("/proc/driver/nvidia/version")
        match = re.search(r"\d+\.\d+(\.\d+)?", file.read_text(encoding="utf-8", errors="replace"))
        text = match.group() if match else ""
    cuda_version = getattr(torch._C, "_cuda_getDriverVersion", None)
    if cuda_version is not None:
        text += f" CUDA {cuda_version()}"
    return text.strip() or "unknown"


@cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def sources() -> list[Path]:
    """The files that a verdict depends on."""
    matches = [path for pattern in _SOURCES for path in PACKAGE.glob(pattern)]
    files = [path for path in matches if path.is_file()]
    files += [path for folder in matches if folder.is_dir() for path in folder.rglob("*")]
    return sorted(path for path in files if path.suffix in (".py", ".json"))


@cache
def _fingerprint(backend: str, configurations: str) -> str:
    """A hash of the kernels' sources and tables, of what calls them, and of their test."""
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


def _folder(machine: Identity) -> Path | None:
    base = root()
    name = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:20]
    return base and base / "verdicts" / name


def _file(folder: Path, kernels: Kernels) -> Path:
    return folder / f"{'-'.join(kernels)}.json"


def read(machine: Identity, kernels: Kernels) -> Verdict | None:
    """The verdict on these kernels, if there is one that is well formed and can be trusted."""
    folder = _folder(machine)
    if folder is None:
        return None
    try:
        with _file(folder, kernels).open(encoding="utf-8") as file:
            if not _is_trustworthy(os.fstat(file.fileno())):
                return None
            content = json.load(file)
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    good, seen = content.get("good"), content.get("seen")
    expected = (SCHEMA, machine, str(kernels))
    if tuple(content.get(name) for name in ("schema", "identity", "kernels")) != expected:
        return None
    return Verdict(good, seen) if isinstance(good, bool) and isinstance(seen, str) else None


def _is_trustworthy(status: os.stat_result) -> bool:
    """Whether only this user or root can have written the file."""
    if not hasattr(os, "getuid"):
        return True
    is_owned = status.st_uid in (os.getuid(), 0)
    return is_owned and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def write(machine: Identity, kernels: Kernels, verdict: Verdict) -> bool:
    """Store a verdict; whether that was possible."""
    folder = _folder(machine)
    if folder is None:
        return False
    content: dict[str, Any] = {"schema": SCHEMA, "identity": machine, "kernels": str(kernels)}
    content |= {"good": verdict.good, "seen": verdict.seen}
    temporary = None
    try:
        _create(folder)
        # mkstemp makes files that only this user can read or write.
        descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        Path(temporary).replace(_file(folder, kernels))
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
        return False
    return True


def _create(folder: Path) -> None:
    """Create a folder of verdicts; only this user can enter it and the two above it."""
    folder.parent.parent.parent.mkdir(parents=True, exist_ok=True)
    for private in (folder.parent.parent, folder.parent, folder):
        private.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def locked(machine: Identity, seconds: float) -> Iterator[None]:
    """Keep other processes from testing the same kernels meanwhile, where files can be locked.

    After so many seconds it goes on without the lock. The system releases the lock of a process
    that ends, in whatever way.
    """
    with contextlib.ExitStack() as stack:
        folder = _folder(machine)
        if folder is not None:
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                _create(folder)
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
