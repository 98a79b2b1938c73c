"""What the commands that write a result share: options, progress, writing the result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch

from . import files
from .schema import Result

Item = TypeVar("Item")
Profile = TypeVar("Profile")


class Job(NamedTuple, Generic[Profile]):
    """A profile by its name, where to measure it, and in about how many seconds."""

    name: str
    profile: Profile
    device: torch.device
    budget: float = 0.0


def options(
    command: str,
    description: str | None,
    profiles: Mapping[str, Profile],
    arguments: Sequence[str] | None,
) -> tuple[Job[Profile], Path]:
    """The job that a command line asks for, and the folder of its result."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prog = f"python -m benchmarks.{command}"
    parser = argparse.ArgumentParser(prog, description=description)
    parser.add_argument("--profile", choices=profiles, help="default: gpu on a GPU, else cpu")
    parser.add_argument("--device", type=usable_device, default=device)
    parser.add_argument("--out", type=Path, default=files.RESULTS, help="folder of the result file")
    parser.add_argument("--budget", type=positive, help="seconds; default: the profile's")
    parsed = parser.parse_args(arguments)
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder that can be written: {error}")
    name = parsed.profile or ("gpu" if parsed.device.type == "cuda" else "cpu")
    budget = parsed.budget or getattr(profiles[name], "budget", 0.0)
    return Job(name, profiles[name], parsed.device, budget), parsed.out


def usable_device(text: str) -> torch.device:
    """The type of an option: a device that torch knows and can use here."""
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(
            f"must be cpu or a usable GPU; got {text!r}: {reason}"
        ) from None
    return device


def positive(text: str) -> float:
    """The type of an option, such as a budget in seconds."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {number:g}")
    return number


def progress(items: Sequence[Item]) -> Iterator[Item]:
    """Items, each announced on a line."""
    for i, item in enumerate(items, 1):
        print(f"[{i}/{len(items)}] {item}", file=sys.stderr, flush=True)
        yield item


def finish(result: Result, out: Path, summary: str, failures: Iterable[str]) -> int:
    """Write a result's file, print what it says, and return the exit status."""
    path = files.write(result, out)
    lines = [f"FAILED {failure}" for failure in failures]
    print(f"\n{summary}\n\nwrote {path}", *lines, sep="\n")
    return 1 if lines else 0
