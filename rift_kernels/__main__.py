"""``python -m rift_kernels``: what can run here, and why not; ``check`` tries it."""

import sys

from . import check
from .dispatch import backend_report

if sys.argv[1:2] == ["check"]:
    sys.exit(check.main(sys.argv[2:]))
if sys.argv[1:]:
    sys.exit(f"usage: python -m rift_kernels [check ...]; got {' '.join(sys.argv[1:])!r}")
print(backend_report())
