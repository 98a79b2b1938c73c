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
from typing import Any

import torch

import rift_kernels

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = "unknown"
_PACKAGES = ("triton", "numpy", "ckatorch", "pytorch-cka")


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit, date; "unknown" or None where that cannot be found out."""
    commit = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "driver": _driver() if device.type == "cuda" else None,
        "clocks": _clocks(device),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit,
        "dirty": None if commit == UNKNOWN else changes != "",
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Package -> version, None where it is not installed."""
    found: dict[str, str | None] = {
        "rift_kernels": rift_kernels.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
    }
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def slug(name: str) -> str:
    """A name fit for a file: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    if match:
        return match.group(1).strip()
    return platform.processor() or platform.machine() or UNKNOWN


def _driver() -> str:
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0] if lines else UNKNOWN


def _clocks(device: torch.device) -> str:
    """What the speed of the moment hangs on; of a GPU, power, temperature, throttling as well."""
    if device.type == "cuda":
        fields = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
        throttled = "clocks_event_reasons.active"
        query = f"--query-gpu={fields},{throttled}"
        lines = _output("nvidia-smi", query, "--format=csv,noheader").splitlines()
        return f"{fields},{throttled}: {lines[0]}" if lines else UNKNOWN
    load = f"load average {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else UNKNOWN
    found = re.findall(r"^cpu MHz\s*:\s*(\S+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return f"{load}, cores at {', '.join(found)} MHz" if found else load


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return UNKNOWN
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else UNKNOWN
