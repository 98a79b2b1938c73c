"""Configurations tried on a GPU: the launches that one changes are timed by themselves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rift_kernels.functional import linear_cka

from .tune_candidates import workload
from .tune_compilation import Compilers, Launch, missing, recorded

if TYPE_CHECKING:
    from rift_kernels.backends.triton.config import Config

ROUNDS = 20
Results = list[Tensor]


class CandidateError(Exception):
    """A candidate that cannot be used; ``detail`` is what the compiler or the GPU says."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, " ".join(str(detail).split())[:300]


class GpuError(Exception):
    """The GPU does not respond, so that nothing can be measured any more."""


class GpuTrials:
    """Debiased linear CKA and the student's gradient, of the features of one class."""

    def __init__(self, shapes: str, arch: str, start: Config, compilers: Compilers) -> None:
        self._shapes, self._arch, self._compilers = shapes, arch, compilers
        rows, width, dtype = workload(shapes)
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(rows, width, device="cuda", generator=generator)
        y = x + torch.randn(rows, width, device="cuda", generator=generator)
        self._x, self._y = x.to(dtype).requires_grad_(), y.to(dtype)
        self._mask = torch.arange(rows, device="cuda") % 8 != 0
        self._tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-3
        self._cache = torch.empty(2**28, dtype=torch.int8, device="cuda")
        self._launches: dict[Config, list[Launch]] = {}
        self._expected: dict[bool, Results] = {}
        # What the shipped configurations spill does not count against others.
        self._spills: dict[bool, int] = {}
        for masked in (False, True):
            self._compile(start, masked)
            self._run(start, masked)

    @property
    def ahead(self) -> int:
        """How many candidates are compiled while others are timed."""
        return 2 * self._compilers.workers

    def compile_ahead(self, config: Config) -> list[Future[str]]:
        """Begin to compile what the configuration needs."""
        return self._compile_ahead(config, masked=False)

    def speedup(self, config: Config, best: Config) -> float:
        """How many times as fast as ``best`` its launches are, of those that differ.

        Raises CandidateError.
        """
        launches = self._run(config, masked=False)
        pairs = list(zip(self._launches[best], launches, strict=True))
        changed = [pair for pair in pairs if pair[0].differs(pair[1])]
        if not changed:
            raise CandidateError("change nothing")
        before, after = self._seconds([list(side) for side in zip(*changed, strict=True)])
        return before / after

    def confirm(self, config: Config) -> None:
        """Run with masked layers as well, which are loaded in another way."""
        self._compile(config, masked=True)
        self._run(config, masked=True)
        self._launches = {config: self._run(config, masked=False)}

    def _compile_ahead(self, config: Config, masked: bool) -> list[Future[str]]:
        with missing() as jobs:
            self._results(config, masked)
        return [self._compilers.submit(job) for job in dict.fromkeys(jobs)]

    def _compile(self, config: Config, masked: bool) -> None:
        for failure in [outcome.result() for outcome in self._compile_ahead(config, masked)]:
            if failure:
                raise CandidateError("do not compile", failure)

    def _results(self, config: Config, masked: bool) -> Results:
        from rift_kernels.backends.triton.config import use

        use(self._arch, self._shapes, config)
        if masked:
            mask = [self._mask] * 2
            values = linear_cka([self._x] * 2, [self._y] * 2, mask=mask, backend="triton").sum()
        else:
            values = linear_cka(self._x, self._y, backend="triton")
        return [values.detach(), *torch.autograd.grad(values, self._x)]

    def _run(self, config: Config, masked: bool) -> list[Launch]:
        """The launches of the loss, if they give the first configuration's results."""
        try:
            with recorded() as launches:
                results = self._results(config, masked)
            torch.cuda.synchronize()
        # Triton raises many types: too much shared memory, too many threads, compiler errors.
        except Exception as error:
            _check_gpu(error)
            is_memory = "out of resource" in str(error) or isinstance(error, torch.OutOfMemoryError)
            raise CandidateError("need too much memory" if is_memory else "fail", error) from error
        spills = sum(launch.compiled.n_spills for launch in launches)
        if masked not in self._expected:
            self._expected[masked], self._spills[masked] = results, spills
            if not masked:
                self._launches[config] = launches
        if spills > self._spills[masked]:
            raise CandidateError("spill")
        for result, expected in zip(results, self._expected[masked], strict=True):
            difference = (result.float() - expected.float()).norm()
            if not bool(difference <= self._tolerance * expected.float().norm()):
                raise CandidateError("give wrong results")
        return launches

    def _seconds(self, sides: Sequence[Sequence[Launch]]) -> list[float]:
        """The median time of each list of launches; interleaved, with cold caches."""
        graphs = []
        for launches in sides:
            graph = torch.cuda.CUDAGraph()
            # So that only the GPU's time counts.
            with torch.cuda.graph(graph):
                for launch in launches:
                    launch.repeat()
            graphs.append(graph)
        times: list[list[float]] = [[] for _ in sides]
        for _ in range(ROUNDS):
            for graph, graph_times in zip(graphs, times, strict=True):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._cache.zero_()
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                graph_times.append(begin.elapsed_time(end))
        return [statistics.median(graph_times) for graph_times in times]


def _check_gpu(error: Exception) -> None:
    """Raise if the context is unusable, as after an access to a wrong address."""
    try:
        torch.zeros(1, device="cuda").cpu()
    except RuntimeError as broken:
        raise GpuError(" ".join(str(broken).split())[:300]) from error
