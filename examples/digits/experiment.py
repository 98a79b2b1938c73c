"""An experiment as a command: perform missing runs, and write results, tables and a picture."""

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

from benchmarks.report import updated
from benchmarks.tables import markdown

from .runs import Job, Run, Store, StoreError, code_version, commit, record, run_missing
from .tables import caption
from .training import FINETUNING, PRETRAINING, Recipe

Record = dict[str, Any]
STOPPED = "\nstopped; finished runs are kept, and the next start continues"
QUICK = (PRETRAINING._replace(steps=20), 5)


class Section(NamedTuple):
    """A table whose first column has the names of rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Experiment(NamedTuple):
    """Everything that differs between experiments. ``name`` is that of its files and markers."""

    name: str
    doc: str
    seeds: int
    modules: Sequence[ModuleType]  # the modules of the examples that affect results
    shared_settings: Callable[[Recipe, int], Run]  # from pretraining and the steps after it
    jobs: Callable[[int], list[Job]]  # for a number of seeds
    prepare: Callable[[int, Recipe], Any]
    perform: Callable[[Any, Job, int], Run]  # in a number of steps
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
                results = json.loads(path.read_text("utf-8"))
            else:
                results = self.run(options.out, options.seeds, options.quick, console)
                path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
            self.show(results, console)
            picture = path.with_suffix(".png")
            self.write_picture(results, picture)
            console.print(f"{results['seconds']:.0f} s in all. Wrote {path} and {picture}")
            if options.page:
                text = options.page.read_text("utf-8")
                link = os.path.relpath(picture, options.page.parent)
                text = updated(text, self.name, self.page(results, link))
                options.page.write_text(text, "utf-8")
                console.print(f"Wrote {options.page}")
        except (OSError, StoreError, ValueError) as error:
            console.print(f"{self.name}: {error}", style="red")
            return 1
        return 0

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(
            description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add = parser.add_argument
        seeds_help = f"number of seeds; default: {self.seeds}, with --quick 1"
        add("--seeds", type=int, help=seeds_help)
        add("--out", type=Path, default=Path(self.name), metavar="DIR", help="default: %(default)s")
        add("--quick", action="store_true", help="only a few steps, whose results mean nothing")
        add("--report", action="store_true", help=f"run nothing; show {self.name}.json again")
        add("--page", type=Path, metavar="FILE", help="also write the tables into this page")
        options = parser.parse_args(argv)
        if options.seeds is None:
            options.seeds = 1 if options.quick else self.seeds
        if options.seeds < 1:
            parser.error(f"argument --seeds: must be at least 1, got {options.seeds}")
        return options

    def run(self, out: Path, seeds: int, quick: bool, console: Console) -> Record:
        """Perform the runs that are missing in ``out``, and return the record of all."""
        pretraining, steps = QUICK if quick else (PRETRAINING, FINETUNING.steps)
        settings = self.shared_settings(pretraining, steps)
        store = Store(out / f"{self.name}.jsonl", code_version(self.modules))

        def prepare(seed: int) -> Any:
            return self.prepare(seed, pretraining)

        def perform(context: Any, job: Job) -> Run:
            return self.perform(context, job, steps)

        revision = commit()  # read first, because a later commit is not the code that ran
        runs = run_missing(store, settings, self.jobs(seeds), prepare, perform, console)
        return record(store, settings, runs, revision)

    def show(self, results: Record, console: Console) -> None:
        for section in self.sections(results["runs"]):
            table = Table(section.header[0], box=SIMPLE_HEAD, pad_edge=False)
            for heading, *cells in list(zip(section.header, *section.rows, strict=True))[1:]:
                table.add_column(heading, justify="right", min_width=max(map(len, cells)))
            for row in section.rows:
                table.add_row(*row)
            console.print(table)

    def page(self, results: Record, link: str) -> str:
        """The text between the page's markers: picture, tables, and their origin."""
        parts = [f"![{self.alt}]({link})"]
        for section in self.sections(results["runs"]):
            parts.append(markdown(section.header, section.rows))
        return "\n\n".join([*parts, f"{self.note} {caption(results)}"])

    def write_picture(self, results: Record, path: Path) -> None:
        """Draw the picture; its metadata identify the results that it shows."""
        self.draw(results["runs"]).savefig(path, dpi=150, metadata={"Source": digest(results)})


def digest(results: Record) -> str:
    return hashlib.sha256(json.dumps(results["runs"]).encode()).hexdigest()


def difference(runs: Sequence[Run], baseline: Sequence[Run], field: str) -> str:
    """The mean difference between runs of one seed; ``~`` if it may be chance (paired t, 5%)."""
    by_seed = {run["seed"]: run[field] for run in baseline}
    gaps = [run[field] - by_seed[run["seed"]] for run in runs]
    mean = math.fsum(gaps) / len(gaps)
    # Equal gaps leave no spread for the test, and a single gap is no evidence.
    is_varied = len(set(gaps)) > 1
    certain = ttest_1samp(gaps, 0).pvalue < 0.05 if is_varied else len(gaps) > 1 and mean != 0
    return f"{'' if certain else '~'}{mean:+.1f}"
