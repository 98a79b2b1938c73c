"""``python -m benchmarks.suite``: every kind of benchmark, one after another, a result file each.

``make bench`` runs this: five minutes on a CPU. On a GPU, ``--profile full`` adds to the comparison
what needs longer than ``gpu``. ``--only frontier step`` runs these alone, and other options are
passed on. Each is a process of its own, so that none leaves caches or memory to the next. Exits
with 1 if one of them failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

KINDS = ("run", "frontier", "scaling", "step", "lora")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--profile", help="default: gpu on a GPU, else cpu")
    options, others = parser.parse_known_args(arguments)
    failed = []
    for kind in options.only:
        print(f"--- {kind}", flush=True)
        # Only the comparison has a longer profile than gpu.
        profile = "gpu" if options.profile == "full" and kind != "run" else options.profile
        words = [*others, "--profile", profile] if profile else others
        command = [sys.executable, "-m", f"benchmarks.{kind}", *words]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(kind)
    print(*(f"FAILED {kind}" for kind in failed), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
