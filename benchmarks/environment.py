"""Where and with what a result was measured."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import rift_kernels

from .schema import Environment

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = "unknown"
# The state that a GPU's speed depends on.
_CLOCKS = (
    "clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
)


def describe(device: torch.device) -> Environment:
    """Hardware, versions, commit, date; "unknown" or None where that cannot be found out."""
    commit = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text("utf-8"))
    cpu = names[0] if names else platform.machine()
    return Environment(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        device=gpu or cpu,
        cpu=cpu,
        cores=os.cpu_count() or 0,
        threads=torch.get_num_threads(),
        gpu=gpu,
        driver=_of_gpu("driver_version") if gpu else None,
        clocks=f"{_CLOCKS}: {_of_gpu(_CLOCKS)}" if gpu else f"load {os.getloadavg()[0]:.2f}",
        system=f"{platform.system()} {platform.machine()}",
        commit=commit,
        dirty=None if commit == UNKNOWN else changes != "",
        versions=versions(),
    )


def versions() -> dict[str, str | None]:
    """Package -> version, None where it is not installed."""
    installed: dict[str, str | None] = {
        "rift_kernels": rift_kernels.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
    }
    for package in ("triton", "numpy", "ckatorch", "pytorch-cka"):
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = None
    return installed


def slug(name: str) -> str:
    """A name fit for a file: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _of_gpu(fields: str) -> str:
    """The fields of the first GPU."""
    return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").split("\n")[0]


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return done.stdout.strip()
