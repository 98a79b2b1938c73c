"""What was compiled elsewhere for this machine's GPU: packed into one file there, unpacked here.

The file has of triton's cache the machine code and what triton asks of it, and the extension
``rift_kernels._C``. It is of use where Python, torch, triton and the sources are the same; where
they are not, nothing in it is found, and everything is compiled as ever.
"""

from __future__ import annotations

import hashlib
import io
import json
import sysconfig
import tarfile
from pathlib import Path

from . import environment

ROOT = environment.ROOT
CACHE = ROOT / "build" / "triton-cache"
ARCHIVE = ROOT / "build" / "precompiled.tar.xz"
EXTENSION = "rift_kernels/_C" + str(sysconfig.get_config_var("EXT_SUFFIX"))
# What triton reads of an entry; the rest, most of the bytes, is for people.
_KEPT = (".json", ".cubin", ".so")
_GROUP = "__grp__"


def digest(architecture: str) -> str:
    """Of what the extension is made of."""
    found = hashlib.sha256(f"{architecture} {EXTENSION}".encode())
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    for path in [ROOT / "setup.py", *sources]:
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def _stamp() -> Path:
    return ROOT / "build" / "extension.sha256"


def stamp(architecture: str) -> None:
    """The extension that lies here is of these sources."""
    _stamp().parent.mkdir(parents=True, exist_ok=True)
    _stamp().write_text(digest(architecture), encoding="utf-8")


def is_built(architecture: str) -> bool:
    """Whether the extension that lies here was built of these sources."""
    return (
        (ROOT / EXTENSION).exists()
        and _stamp().exists()
        and _stamp().read_text(encoding="utf-8") == digest(architecture)
    )


def pack(cache: Path, archive: Path) -> int:
    """How many kernels it holds."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    kernels = 0
    with tarfile.open(archive, "w:xz") as file:
        for path in sorted(cache.glob("*/*")):
            if path.name.endswith(_KEPT):
                file.add(path, f"cache/{path.relative_to(cache)}")
                kernels += path.suffix == ".cubin"
        for path in (ROOT / EXTENSION, _stamp()):
            if path.exists():
                file.add(path, str(path.relative_to(ROOT)))
    return kernels


def unpack(archive: Path, cache: Path) -> int:
    """How many kernels are new here; what is here already stays."""
    if not archive.exists():
        return 0
    kernels, has_extension = 0, (ROOT / EXTENSION).exists()
    with tarfile.open(archive) as file:
        for member in file:
            reader = file.extractfile(member)
            if reader is None:
                continue
            content = reader.read()
            if member.name.startswith("cache/"):
                path = cache / member.name.removeprefix("cache/")
                if path.name.startswith(_GROUP):
                    content = _moved(content, path.parent)
                if path.exists():
                    continue
                kernels += path.suffix == ".cubin"
            elif has_extension:  # maybe of other sources, whatever the file says of its own
                continue
            else:
                path = ROOT / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return kernels


def _moved(group: bytes, folder: Path) -> bytes:
    """An entry's list of its files has their folder: where they lie now."""
    names = json.load(io.BytesIO(group))["child_paths"]
    kept = {name: str(folder / name) for name in names if name.endswith(_KEPT)}
    return json.dumps({"child_paths": kept}).encode()
