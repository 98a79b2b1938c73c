"""A command that runs what is missing, and writes results, tables, a picture and a page."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.stats import ttest_1samp  # type: ignore[import-untyped]

from benchmarks.demo import caption
from benchmarks.report import ReportError, updated
from benchmarks.tables import markdown

from .runs import Job, Run, Store, StoreError, code_version, commit, record, run_missing
from .training import FINETUNING, PRETRAINING, Recipe

Record = dict[str, Any]
STOPPED = "\nstopped; finished runs are kept, and the next start goes on"
QUICK = (PRETRAINING._replace(steps=20), 5)


class Section(NamedTuple):
    """A table; the first column has the names of rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Command(NamedTuple):
    """What sets one command apart from another. ``name`` is that of its files and markers."""

    name: str
    doc: str
    seeds: int
    modules: Sequence[ModuleType]  # those of the examples that the results depend on
    shared: Callable[[Recipe, int], Run]  # settings, from how to pretrain and the steps after it
    jobs: Callable[[int], list[Job]]  # of a number of seeds
    begin: Callable[[int, Recipe], Any]
    perform: Callable[[Any, Job, int], Run]  # in so many steps
    sections: Callable[[Sequence[Run]], list[Section]]
    draw: Callable[[Sequence[Run]], Figure]
    note: str
    alt: str

    def main(self, argv: Sequence[str] | None = None) -> int:
        options = self.parse(argv)
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=130)
        path = options.out / f"{self.name}.json"
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            if options.report:
                found = json.loads(path.read_text("utf-8"))
            else:
                found = self.run(options.out, options.seeds, options.quick, console)
                path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
            self.show(found, console)
            picture = path.with_suffix(".png")
            self.picture(found, picture)
            console.print(f"{found['seconds']:.0f} s in all. Wrote {path} and {picture}")
            if options.page:
                text = options.page.read_text("utf-8")
                link = os.path.relpath(picture, options.page.parent)
                options.page.write_text(updated(text, self.name, self.page(found, link)), "utf-8")
                console.print(f"Wrote {options.page}")
        except (OSError, ReportError, StoreError, json.JSONDecodeError) as error:
            console.print(f"{self.name}: {error}", style="red")
            return 1
        return 0

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(
            description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add = parser.add_argument
        add("--seeds", type=int, help=f"how many; default: {self.seeds}, with --quick 1")
        add("--out", type=Path, default=Path(self.name), metavar="DIR", help="default: %(default)s")
        add("--quick", action="store_true", help="a few steps, which measure nothing")
        add("--report", action="store_true", help=f"run nothing: show {self.name}.json again")
        add("--page", type=Path, metavar="FILE", help="also write the tables into this page")
        options = parser.parse_args(argv)
        if options.seeds is None:
            options.seeds = 1 if options.quick else self.seeds
        if options.seeds < 1:
            parser.error(f"argument --seeds: must be at least 1, got {options.seeds}")
        return options

    def run(self, out: Path, seeds: int, quick: bool, console: Console) -> Record:
        """Run what is missing in ``out``, and put all together."""
        pretraining, steps = QUICK if quick else (PRETRAINING, FINETUNING.steps)
        settings = self.shared(pretraining, steps)
        store = Store(out / f"{self.name}.jsonl", code_version(self.modules))

        def begin(seed: int) -> Any:
            return self.begin(seed, pretraining)

        def perform(begun: Any, job: Job) -> Run:
            return self.perform(begun, job, steps)

        at = commit()  # a later one is not what ran
        runs = run_missing(store, settings, self.jobs(seeds), begin, perform, console)
        return record(store, settings, runs, at)

    def show(self, found: Record, console: Console) -> None:
        for section in self.sections(found["runs"]):
            table = Table(section.header[0], box=SIMPLE_HEAD, pad_edge=False)
            for heading, *cells in list(zip(section.header, *section.rows, strict=True))[1:]:
                table.add_column(heading, justify="right", min_width=max(map(len, cells)))
            for row in section.rows:
                table.add_row(*row)
            console.print(table)

    def page(self, found: Record, link: str) -> str:
        """What stands between the markers of the page: picture, tables, and where they are from."""
        parts = [f"![{self.alt}]({link})"]
        for section in self.sections(found["runs"]):
            parts.append(markdown(section.header, section.rows))
        return "\n\n".join([*parts, f"{self.note} {caption(found)}"])

    def picture(self, found: Record, path: Path) -> None:
        """Draw; the picture's metadata tell of which results it is."""
        self.draw(found["runs"]).savefig(path, dpi=150, metadata={"Source": digest(found)})


def digest(found: Record) -> str:
    return hashlib.sha256(json.dumps(found["runs"]).encode()).hexdigest()


def difference(runs: Sequence[Run], others: Sequence[Run], field: str) -> str:
    """The mean of the seeds' differences; with ``~`` where it may be chance (paired t, 5%)."""
    before = {run["seed"]: run[field] for run in others}
    gaps = [run[field] - before[run["seed"]] for run in runs]
    mean = math.fsum(gaps) / len(gaps)
    # Equal gaps have no spread to test by, and one is no evidence.
    varied = len(set(gaps)) > 1
    certain = ttest_1samp(gaps, 0).pvalue < 0.05 if varied else len(gaps) > 1 and mean != 0
    return f"{'' if certain else '~'}{mean:+.1f}"
