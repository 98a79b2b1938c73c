"""What the commands that write a result share: profile, device, folder, and how far they are."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from . import files

Item = TypeVar("Item")


def parser(name: str, description: str | None, profiles: Iterable[str]) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    made.add_argument("--profile", choices=profiles, help="default: gpu on a GPU, else cpu")
    made.add_argument("--device", help="default: cuda where there is one, else cpu")
    made.add_argument("--out", type=Path, default=files.RESULTS, help="folder of the result file")
    return made


def positive(text: str) -> float:
    """The type of an option, such as a budget in seconds."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {number:g}")
    return number


def settle(
    made: argparse.ArgumentParser, options: argparse.Namespace
) -> tuple[str, torch.device, Path]:
    """The profile, the device and the folder; exits now, and not after minutes of measuring."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()
        wanted = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (OSError, RuntimeError, AssertionError) as error:
        made.error(str(error).split("\n")[0])
    profile = options.profile or ("gpu" if device.type == "cuda" else "cpu")
    return profile, device, options.out


def progress(items: Sequence[Item], label: Callable[[Item], str]) -> Iterator[Item]:
    """A progress bar, or a line each where tqdm is not installed."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        for i, item in enumerate(items, 1):
            print(f"[{i}/{len(items)}] {label(item)}", file=sys.stderr, flush=True)
            yield item
        return
    bar = tqdm(items, unit="workload")
    for item in bar:
        bar.set_description(label(item))
        yield item
