"""What was compiled elsewhere for this machine's GPU: packed into one file there, unpacked here.

The file has the machine code of triton's cache, with the files that triton reads beside it, and the
extension ``rift_kernels._C``. It helps where Python, torch, triton and the sources are the same.
Elsewhere, triton finds nothing in it and compiles as ever.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
import tarfile
from pathlib import Path

from benchmarks import environment

ROOT = environment.ROOT
CACHE = ROOT / "build" / "triton-cache"
ARCHIVE = ROOT / "build" / "precompiled.tar.xz"
EXTENSION = "rift_kernels/_C" + str(sysconfig.get_config_var("EXT_SUFFIX"))
STAMP = "build/extension.sha256"
# Triton reads these files of an entry; the rest, most of the bytes, is for people.
_KEPT = (".json", ".cubin", ".so")


def digest(architecture: str) -> str:
    """A digest of what the extension is made of."""
    sha = hashlib.sha256(f"{architecture} {EXTENSION}".encode())
    for path in [ROOT / "setup.py", *sorted(filter(Path.is_file, (ROOT / "csrc").rglob("*")))]:
        sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()


def stamp(architecture: str) -> None:
    """Note that the extension that lies here is of these sources."""
    (ROOT / STAMP).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / STAMP).write_text(digest(architecture), encoding="utf-8")


def is_built(architecture: str) -> bool:
    """Whether the extension that lies here was built of these sources."""
    paths = (ROOT / EXTENSION, ROOT / STAMP)
    return all(path.exists() for path in paths) and paths[1].read_text() == digest(architecture)


def pack(cache: Path, archive: Path) -> int:
    """Write the archive; returns how many kernels it holds."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    entries = [path for path in sorted(cache.glob("*/*")) if path.name.endswith(_KEPT)]
    with tarfile.open(archive, "w:xz") as file:
        for path in entries:
            file.add(path, f"cache/{path.relative_to(cache)}")
        for name in filter(lambda name: (ROOT / name).exists(), (EXTENSION, STAMP)):
            file.add(ROOT / name, name)
    return sum(path.suffix == ".cubin" for path in entries)


def unpack(archive: Path, cache: Path) -> int:
    """Unpack what is not here yet; returns how many kernels were new."""
    if not archive.exists():
        return 0
    # An extension that is here may be of other sources, whatever the file says of its own.
    kernels, has_extension = 0, (ROOT / EXTENSION).exists()
    with tarfile.open(archive) as file:
        for member in filter(tarfile.TarInfo.isfile, file):
            of_cache = member.name.startswith("cache/")
            path = cache / member.name.removeprefix("cache/") if of_cache else ROOT / member.name
            if path.exists() if of_cache else has_extension:
                continue
            reader = file.extractfile(member)
            content = reader.read() if reader else b""
            if path.name.startswith("__grp__"):
                # An entry's list of its files names their folder, which is another one here.
                names = json.loads(content)["child_paths"]
                paths = {n: str(path.parent / n) for n in names if n.endswith(_KEPT)}
                content = json.dumps({"child_paths": paths}).encode()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            kernels += path.suffix == ".cubin"
    return kernels
