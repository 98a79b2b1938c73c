"""The file of tuned configurations, on the disk after every change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tune_candidates import as_json

if TYPE_CHECKING:
    from rift_kernels.backends.triton.config import Config

# The groups of fields that need not be tried again. Names with an underscore are comments.
FINISHED = "_finished"


class TunedFile:
    """Configurations of one architecture that are faster than those in use.

    Raises ConfigError if there is a file that cannot be used, and OSError if none can be written.
    """

    def __init__(self, path: Path, arch: str) -> None:
        from rift_kernels.backends.triton.config import read

        self._path, self._arch = path, arch
        self._configs = read(path).get(arch, {}) if path.exists() else {}
        self._content: dict[str, Any] = {}
        if path.exists():
            self._content = json.loads(path.read_text(encoding="utf-8"))
        self._write()

    def start(self, shapes: str) -> Config:
        """The configuration to begin with: the file's, or else the one in use."""
        from rift_kernels.backends.triton.config import lookup

        return self._configs.get(shapes) or lookup(self._arch, shapes)

    def keep(self, shapes: str, config: Config) -> None:
        """Add an entry, or replace it."""
        from rift_kernels.backends.triton.config import FIELDS

        entry = as_json(config, FIELDS[shapes.partition(" ")[0]])
        self._content.setdefault(self._arch, {})[shapes] = entry
        self._write()

    def finished(self, shapes: str) -> dict[str, str]:
        """The groups of a class that were tried to the end, and what that gave."""
        classes: dict[str, dict[str, str]] = self._content.get(FINISHED, {}).get(self._arch, {})
        return classes.get(shapes, {})

    def finish(self, shapes: str, group: str, remark: str) -> None:
        """Note that a group was tried to the end."""
        classes = self._content.setdefault(FINISHED, {}).setdefault(self._arch, {})
        classes.setdefault(shapes, {})[group] = remark
        self._write()

    def _write(self) -> None:
        """Replace the whole file at once."""
        temporary = self._path.with_suffix(f"{self._path.suffix}.new")
        temporary.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._path)
