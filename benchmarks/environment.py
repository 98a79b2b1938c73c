"""Where and with what a result was measured."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import rift_kernels

from .schema import Environment

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = "unknown"
_PACKAGES = ("triton", "numpy", "ckatorch", "pytorch-cka")
_CLOCKS = (
    "clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
)


def describe(device: torch.device) -> Environment:
    """Hardware, versions, commit, date; "unknown" or None where that cannot be found out."""
    on_gpu, commit = device.type == "cuda", _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    cpu, gpu = cpu_name(), torch.cuda.get_device_name(device) if on_gpu else None
    return Environment(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        device=gpu or cpu,
        cpu=cpu,
        cores=os.cpu_count() or 0,
        threads=torch.get_num_threads(),
        gpu=gpu,
        driver=_of_gpu("driver_version") if on_gpu else None,
        clocks=_clocks(device),
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
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = None
    return installed


def slug(name: str) -> str:
    """A name fit for a file: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _clocks(device: torch.device) -> str:
    """The state that speed depends on: load, clocks, power, temperature, throttling."""
    if device.type == "cuda":
        state = _of_gpu(_CLOCKS)
        return state if state == UNKNOWN else f"{_CLOCKS}: {state}"
    load = f"load average {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else UNKNOWN
    clocks = re.findall(r"^cpu MHz\s*:\s*(\S+)$", _cpuinfo(), re.MULTILINE)
    return f"{load}, cores at {', '.join(clocks)} MHz" if clocks else load


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _of_gpu(fields: str) -> str:
    """The fields of the first GPU, as nvidia-smi prints them."""
    text = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return next(iter(text.splitlines()), UNKNOWN)


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return UNKNOWN
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else UNKNOWN
