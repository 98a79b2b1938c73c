"""The archive of compiled kernels: packed on one machine, unpacked on the one with the GPU.

The archive holds what Triton reads of its cache, and the extension ``rift_kernels._C``. It helps
where Python, torch, triton and the sources are the same. Elsewhere, Triton compiles as ever.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
import tarfile
from pathlib import Path

# Paths below the root of a repository.
CACHE = "build/triton-cache"
ARCHIVE = "build/precompiled.tar.xz"
EXTENSION = f"rift_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
STAMP = "build/extension.sha256"
# Triton reads these files of an entry; the rest, most of the bytes, is for people to read.
_KEPT = (".json", ".cubin", ".so")


def digest(root: Path, patterns: tuple[str, ...], *values: object) -> str:
    """A digest of the files that match, with their names, and of other values."""
    sha = hashlib.sha256(repr(values).encode())
    for path in (path for pattern in patterns for path in sorted(root.glob(pattern))):
        if path.is_file():
            sha.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return sha.hexdigest()


def stamp(root: Path, architecture: str) -> str:
    """What the file ``STAMP`` holds if the extension here was built of the sources here."""
    return digest(root, ("setup.py", "csrc/**/*", EXTENSION), architecture)


def is_built(root: Path, architecture: str) -> bool:
    path = root / STAMP
    return path.exists() and path.read_text(encoding="utf-8") == stamp(root, architecture)


def pack(root: Path) -> int:
    """Write the archive; returns how many kernels it holds."""
    entries = [path for path in sorted((root / CACHE).glob("*/*")) if path.name.endswith(_KEPT)]
    extension = [root / name for name in (EXTENSION, STAMP) if (root / name).exists()]
    (root / ARCHIVE).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / ARCHIVE, "w:xz") as archive:
        for path in (*entries, *extension):
            archive.add(path, path.relative_to(root))
    return sum(path.suffix == ".cubin" for path in entries)


def unpack(root: Path) -> None:
    """Unpack what is not here yet, if there is an archive."""
    if not (root / ARCHIVE).exists():
        return
    with tarfile.open(root / ARCHIVE) as archive:
        new = [member for member in archive if not (root / member.name).exists()]
        archive.extractall(root, new, filter="data")
    for path in (root / member.name for member in new):
        if path.name.startswith("__grp__"):
            # An entry's list of its files names their folder on the other machine.
            names = json.loads(path.read_text(encoding="utf-8"))["child_paths"]
            paths = {n: str(path.with_name(n)) for n in names if path.with_name(n).exists()}
            path.write_text(json.dumps({"child_paths": paths}), encoding="utf-8")
