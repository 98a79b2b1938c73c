"""``python -m rift_kernels tune``: find the fastest blocks, warps and stages for this GPU.

Opt-in: the shipped ones work everywhere. The classes of shapes that take most time come first. In
each, one group of fields after another is varied, the nearest to the configuration in use first. A
candidate counts only if it gives the same value and gradient. What is faster is written at once,
and a later run goes on where this one stopped. RIFT_KERNELS_CONFIGS=FILE then uses the file.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from rift_kernels.dispatch import availability

from .tune_candidates import by_importance, candidates, groups
from .tune_compilation import Compilers
from .tune_file import TunedFile
from .tune_trials import CandidateError, GpuError, GpuTrials

if TYPE_CHECKING:
    from rift_kernels.backends.triton.config import Config

DEFAULT = Path("rift_kernels_configs.json")
# A smaller gain may be noise.
MARGIN = 0.02


class Trials(Protocol):
    """Tries the configurations of one class; see :class:`GpuTrials`."""

    @property
    def ahead(self) -> int:
        """How many candidates are compiled while others are timed."""

    def compile_ahead(self, config: Config) -> list[Future[str]]:
        """Begin to compile what the configuration needs."""

    def speedup(self, config: Config, best: Config) -> float:
        """How many times as fast as ``best`` its launches are; raises CandidateError."""

    def confirm(self, config: Config) -> None:
        """Try everything else that the configuration must serve; raises CandidateError."""


class State(NamedTuple):
    """How far the search has come in one group of fields."""

    group: str
    best: Config
    total: int
    tried: int = 0
    gain: float = 1.0  # of the launches that differ, since the group began
    skipped: tuple[str, ...] = ()  # the reasons
    detail: str = ""  # what the compiler or the GPU said about the last one skipped

    def __str__(self) -> str:
        counts = sorted(Counter(self.skipped).items())
        skipped = [f", {count} {reason}" for reason, count in counts]
        return f"{self.gain:.2f}x as fast{''.join(skipped)}"


def search(
    shapes: str,
    start: Config,
    trials: Trials,
    limit: int,
    deadline: float,
    finished: Collection[str] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[State]:
    """The state before and after each candidate, in the groups that are left, until the deadline.

    ``limit``: bytes of shared memory.
    """
    best = start
    for group in groups(shapes):
        if group.name in finished:
            continue
        waiting = deque(candidates(shapes, best, group, limit))
        compiling: deque[tuple[Config, list[Future[str]]]] = deque()
        state = State(group.name, best, len(waiting))
        yield state
        while waiting or compiling:
            while waiting and len(compiling) < trials.ahead:
                config = waiting.popleft()
                compiling.append((config, trials.compile_ahead(config)))
            config, outcomes = compiling.popleft()
            left = deadline - clock()
            unfinished = concurrent.futures.wait(outcomes, max(left, 0)).not_done
            if unfinished or clock() >= deadline:
                return
            try:
                for failure in [outcome.result() for outcome in outcomes]:
                    if failure:
                        raise CandidateError("do not compile", failure)
                gain = trials.speedup(config, best)
                if gain > 1 + MARGIN:
                    trials.confirm(config)
                    best = config
                    state = state._replace(best=best, gain=state.gain * gain)
            except CandidateError as skip:
                skipped = (*state.skipped, skip.reason)
                state = state._replace(skipped=skipped, detail=skip.detail)
            state = state._replace(tried=state.tried + 1)
            yield state


def tune(shapes: str, file: TunedFile, trials: Trials, limit: int, deadline: float) -> None:
    """Tune a class into a file, as far as the time allows."""
    from tqdm import tqdm

    written = file.start(shapes)
    bar = tqdm(unit=" candidates")
    try:
        for state in search(shapes, written, trials, limit, deadline, file.finished(shapes)):
            if state.tried == 0:
                bar.close()
                bar = tqdm(desc=f"{shapes}, {state.group}", total=state.total, unit=" candidates")
            bar.set_postfix_str(str(state), refresh=False)
            bar.update(state.tried - bar.n)
            if state.best != written:
                written = state.best
                file.keep(shapes, written)
            if state.tried == state.total:
                file.finish(shapes, state.group, str(state))
                if len(state.skipped) == state.total and state.detail:
                    bar.write(f"All candidates were skipped, the last one because: {state.detail}")
    finally:
        bar.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if the time is used well, 1 for an error, 2 if it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m rift_kernels tune", description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT, help="the file, default %(default)s")
    parser.add_argument("--form", choices=("covariance", "gram"), help="only this form's classes")
    parser.add_argument(
        "--minutes", type=float, default=10, help="when to stop, default %(default)s"
    )
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    reason = "it needs a GPU that torch can use, and there is none"
    if torch.cuda.is_available():
        reason = availability.reason_against("triton", torch.device("cuda")) or ""
    if reason:
        print(f"rift_kernels tune cannot run: {reason}", file=sys.stderr)
        return 2
    try:
        import tqdm  # noqa: F401
    except ImportError:
        print(
            "rift_kernels tune needs tqdm: pip install 'rift_kernels[bench]'",
            file=sys.stderr,
        )
        return 2
    from rift_kernels.backends.triton.config import CLASSES, ConfigError, architecture

    arch = architecture(torch.device("cuda"))
    try:
        file = TunedFile(options.out, arch)
    except (ConfigError, OSError) as error:
        print(f"rift_kernels tune: {error}", file=sys.stderr)
        return 1
    classes = [c for c in by_importance(CLASSES) if c.startswith(options.form or "")]
    try:
        code = _tune_all(classes, file, arch, deadline)
    except KeyboardInterrupt:
        print("Stopped. A later run goes on from here.", file=sys.stderr)
        code = 130
    print(f"To use what is found: export RIFT_KERNELS_CONFIGS={options.out.resolve()}")
    return code


def _tune_all(classes: Sequence[str], file: TunedFile, arch: str, deadline: float) -> int:
    from triton.runtime import driver

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    limit = getattr(properties, "shared_memory_per_block_optin", 0) or 64 * 1024
    code = 0
    with Compilers(driver.active.get_current_target()) as compilers:
        for shapes in classes:
            if _is_finished(shapes, file):
                continue
            if time.monotonic() >= deadline:
                break
            try:
                trials = GpuTrials(shapes, arch, file.start(shapes), compilers)
                tune(shapes, file, trials, limit, deadline)
            except CandidateError as skip:
                print(f"{shapes}: the kernels in use {skip.reason}: {skip.detail}", file=sys.stderr)
                code = 1
            except GpuError as failure:
                print(f"The GPU does not respond any more: {failure}", file=sys.stderr)
                return 1
    if not code and not all(_is_finished(shapes, file) for shapes in classes):
        print("The time is over. A later run goes on from here.")
    return code


def _is_finished(shapes: str, file: TunedFile) -> bool:
    return {group.name for group in groups(shapes)} <= file.finished(shapes).keys()
