"""``python -m benchmarks.suite``: every kind of benchmark, one after another, a result file each.

``make bench`` runs this: five minutes on a CPU. On a GPU, ``--profile full`` adds to the comparison
what needs longer than ``gpu``. ``--only frontier,step`` runs these alone. Each is a process of its
own, so that none leaves caches or memory to the next. Exits with 1 if one of them failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import environment, files

KINDS = ("run", "frontier", "scaling", "step", "lora")


def command(kind: str, profile: str | None, device: str | None, out: Path) -> list[str]:
    """The command of a kind; only the comparison has a longer profile than gpu."""
    if profile == "full" and kind != "run":
        profile = "gpu"
    words = [sys.executable, "-m", f"benchmarks.{kind}", "--out", str(out)]
    words += ["--profile", profile] if profile else []
    return words + (["--device", device] if device else [])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    parser.add_argument(
        "--profile", choices=("cpu", "gpu", "full", "smoke"), help="default: gpu on a GPU, else cpu"
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--out", type=Path, default=files.RESULTS, help="folder of result files")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, separated by commas")
    options = parser.parse_args(arguments)
    kinds = options.only.split(",")
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        parser.error(f"argument --only: must be of {', '.join(KINDS)}; got {', '.join(unknown)}")
    if options.profile in ("gpu", "full") and not torch.cuda.is_available():
        parser.error(f"argument --profile: {options.profile} needs a GPU that torch can use")
    failed, start = [], time.monotonic()
    for kind in kinds:
        print(f"--- {kind}", flush=True)
        words = command(kind, options.profile, options.device, options.out.resolve())
        if subprocess.run(words, cwd=environment.ROOT, check=False).returncode != 0:
            failed.append(kind)
    print(f"--- {time.monotonic() - start:.0f} s in all; python -m benchmarks.report writes tables")
    for kind in failed:
        print(f"FAILED {kind}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
