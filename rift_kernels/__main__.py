"""``python -m rift_kernels``: report the usable backends, or run ``check`` or ``tune``."""

import sys

from .commands.info import backend_report

command, *arguments = sys.argv[1:] or [""]
if command == "check":
    from .commands import check

    sys.exit(check.main(arguments))
if command == "tune":
    from .commands import tune

    sys.exit(tune.main(arguments))
if command:
    sys.exit(f"usage: python -m rift_kernels [check ... | tune ...]; got {command!r}")
print(backend_report())
