"""Compiles all Triton kernels for any GPU, without one, and reads what resources they need.

    python -m tests.support.triton_compile             all: benchmarks/results/triton-resources.json
    python -m tests.support.triton_compile sm90 gram   some: a target, a word of the cases' names
    python -m tests.support.triton_compile --sample --out FILE    every case on one target

Launches run on CPU tensors, with recorders in place of the kernels, and triton believes that the
target is there. Types, alignments and constants are those of a launch on the target. A case is a
line of ``CASES``, and covers all kernels that it launches.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import rift_kernels as rk
from rift_kernels.backends import triton as kernels
from rift_kernels.backends.triton import config, products
from rift_kernels.dispatch import plan

from .triton_resources import Resources, resources

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "triton-resources.json"
Results = dict[str, dict[str, list[Resources] | str]]
bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Target(NamedTuple):
    gpu: GPUTarget
    processors: int
    shared: int  # bytes that one program may have
    descriptor_rows: float = float("inf")


TARGETS = {
    # Its configurations also serve sm86 and sm89, which have no more than 99 KiB.
    "sm80": Target(GPUTarget("cuda", 80, 32), 108, 99 * 1024),
    "sm90": Target(GPUTarget("cuda", 90, 32), 132, 227 * 1024, 1024),
    "sm100": Target(GPUTarget("cuda", 100, 32), 148, 227 * 1024, 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 304, 64 * 1024),
}


class _Driver:
    """All that triton asks a GPU before compiling for it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target

    def get_current_stream(self, _: object) -> int:
        return 0


class _Recorder:
    """A kernel that compiles when it is launched, but does not run."""

    def __init__(self, kernel: JITFunction, compiled: list[Any]) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.compiled.append(self.kernel.run(*args, grid=grid, warmup=True, **options))

        return launch


class Counter:
    """A kernel that does not even compile, but records once what it would compile."""

    def __init__(self, kernel: JITFunction, compiled: list[Any]) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            options |= {"debug": False, "instrumentation_mode": ""}
            *_, bind = self.kernel.device_caches[driver.active.get_current_device()]
            _, specialization, rest = bind(*args, **options)
            key = self.kernel.__name__, str(specialization), str(rest)
            if key not in self.compiled:
                self.compiled.append(key)

        return launch


@contextmanager
def recording(
    name: str, recorder: Callable[[JITFunction, list[Any]], Any] = _Recorder
) -> Iterator[list[Any]]:
    """Inside, launches compile for a target of ``TARGETS``; yields the compiled kernels."""
    target, compiled = TARGETS[name], []
    blocks = products._blocks
    replaced = {
        "architecture": lambda _: name,
        "processors": lambda _: target.processors,
        "_descriptor_rows": lambda _: target.descriptor_rows,
        "_blocks": lambda dtype, _: blocks(dtype, target.gpu.backend),
        "_multiplies_float64": lambda _: name in ("sm80", "sm90"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", _Driver(target.gpu))
        patch.setattr(plan, "choose_backend", lambda *_: "triton")
        missing = set(replaced)
        for info in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
            module = importlib.import_module(info.name)
            for attribute, value in list(vars(module).items()):
                if isinstance(value, JITFunction) and attribute.endswith("_kernel"):
                    patch.setattr(module, attribute, recorder(value, compiled))
                elif attribute in replaced:
                    patch.setattr(module, attribute, replaced[attribute])
                    missing.discard(attribute)
        assert not missing, f"no launch asks for {missing} any more"
        config.forget()
        yield compiled
    config.forget()


def _layers(
    dtype: torch.dtype, rows: int, width: int, layers: int, batch: tuple[int, ...], grad: bool
) -> torch.Tensor | list[torch.Tensor]:
    x = torch.zeros(*batch, rows, width, dtype=dtype, requires_grad=grad)
    return x if layers == 1 else [x] * layers


def _measure(
    measure: Callable[..., torch.Tensor], dtype: torch.dtype, rows: int, width: int, *,
    teacher: int | None = None, layers: int = 1, masked: bool = False,
    batch: tuple[int, ...] = (), grads: tuple[bool, bool] = (True, False), **settings: Any,
) -> None:  # fmt: skip
    """Value and gradients of a measure, in the form that costs less."""
    x = _layers(dtype, rows, width, layers, batch, grads[0])
    y = _layers(dtype, rows, teacher or width, layers, batch, grads[1])
    mask = torch.ones(*batch, rows, dtype=torch.bool) if masked else None
    values = measure(x, y, mask=mask, **settings)
    if any(grads):
        values.sum().backward()


cka = partial(_measure, rk.linear_cka)
distance = partial(_measure, rk.covariance_distance)


def moments(dtype: torch.dtype, rows: int, width: int, gram: bool, wanted: str) -> None:
    x = torch.zeros(2, rows, width, dtype=dtype)
    kernels.moments(x, x, gram, wanted)


def product(dtype: torch.dtype, size: int) -> None:
    a = torch.zeros(size, size, dtype=dtype)
    kernels.product_transposed(a, a)
    kernels.product_symmetric(a, a)


BOTH = (True, True)
MANY: dict[str, Any] = {"layers": 12, "masked": True}
CASES: dict[str, Callable[[], None]] = {
    "covariance bf16": partial(cka, bf16, 4096, 768, debiased=False),
    "covariance bf16, debiased": partial(cka, bf16, 4096, 768, grads=BOTH),
    "covariance bf16, debiased, 12 masked layers": partial(
        cka, bf16, 4096, 768, grads=BOTH, **MANY
    ),
    "covariance fp16, debiased, two widths, batch": partial(
        cka, fp16, 2048, 512, teacher=768, batch=(3,)
    ),
    "covariance fp32": partial(cka, fp32, 4096, 768, debiased=False),
    "covariance fp32, debiased, 12 masked layers": partial(cka, fp32, 4096, 768, **MANY),
    "covariance small bf16, debiased, 12 masked layers": partial(cka, bf16, 512, 64, **MANY),
    "covariance of one column bf16, debiased": partial(cka, bf16, 64, 1, grads=BOTH),
    "gram bf16": partial(cka, bf16, 512, 768, debiased=False),
    "gram bf16, debiased, 12 masked layers": partial(cka, bf16, 512, 768, **MANY),
    "gram fp32, debiased": partial(cka, fp32, 512, 768),
    "gram fp32, 12 masked layers": partial(cka, fp32, 512, 768, debiased=False, **MANY),
    "gram of 128 rows bf16": partial(cka, bf16, 128, 768, debiased=False),
    "gram of 128 rows fp32, debiased, 12 masked layers": partial(cka, fp32, 128, 768, **MANY),
    "gram of 64 rows bf16, debiased": partial(cka, bf16, 64, 768),
    "gram of 64 rows fp32, debiased, 12 masked layers": partial(cka, fp32, 64, 768, **MANY),
    "gram of 64 rows fp32, one program, no gradient": partial(
        cka, fp32, 64, 128, debiased=False, grads=(False, False)
    ),
    "gram of 16 rows bf16": partial(cka, bf16, 16, 768),
    "covariance of odd sizes bf16, debiased": partial(cka, bf16, 4099, 771, grads=BOTH),
    "covariance of odd sizes bf16, 12 masked layers": partial(
        cka, bf16, 4099, 771, teacher=333, debiased=False, grads=BOTH, **MANY
    ),
    "covariance of odd sizes fp32, debiased": partial(cka, fp32, 4099, 771),
    "covariance small of odd sizes fp16, debiased": partial(cka, fp16, 513, 61),
    "gram of odd sizes bf16, debiased": partial(cka, bf16, 511, 771),
    "gram of odd sizes fp32, 12 masked layers": partial(
        cka, fp32, 511, 771, debiased=False, **MANY
    ),
    "gram of 127 rows bf16, odd": partial(cka, bf16, 127, 771, debiased=False),
    "gram of 61 rows fp32, odd, 12 masked layers": partial(cka, fp32, 61, 771, **MANY),
    "distance of odd sizes bf16": partial(distance, bf16, 4099, 771, scale="relative", grads=BOTH),
    "distance of odd sizes fp32": partial(distance, fp32, 4099, 771, scale="coral"),
    "moments of odd sizes fp32": partial(moments, fp32, 1023, 771, False, "xx xy yy"),
    "product of odd sizes fp64": partial(product, fp64, 771),
    "product of odd sizes fp32": partial(product, fp32, 771),
    "distance bf16": partial(distance, bf16, 4096, 768, scale="relative"),
    "distance small fp32, 12 masked layers": partial(
        distance, fp32, 512, 64, scale="coral", **MANY
    ),
    "distance of one column fp32": partial(distance, fp32, 64, 1, scale="none", grads=BOTH),
    "moments fp32": partial(moments, fp32, 1024, 768, False, "xx xy yy"),
    "moments fp32, gram": partial(moments, fp32, 96, 768, True, "xy"),
    "product fp64": partial(product, fp64, 768),
    "product fp32": partial(product, fp32, 768),
}


def compiled(job: tuple[str, str]) -> list[Resources] | str:
    """What the kernels of a case need on a target, without duplicates, or why triton fails."""
    name, case = job
    try:
        with recording(name) as launched:
            CASES[case]()
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        return f"{type(error).__name__}: {error}"
    return list(dict.fromkeys(map(resources, launched)))


def _send(job: tuple[str, str], pipe: Connection) -> None:
    pipe.send(compiled(job))


def _isolated(job: tuple[str, str]) -> list[Resources] | str:
    """In a separate process, because a failed assertion in triton ends the process."""
    context = multiprocessing.get_context("forkserver")
    # Imported once rather than in every process.
    context.set_forkserver_preload(["tests.support.triton_compile"])
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(job, send))
    child.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        child.join()
        return f"the compiler ended with exit code {child.exitcode}"


def sources() -> str:
    """A hash of what decides how cases compile: kernels, launches, configurations, cases."""
    folder = Path(kernels.__file__).parent
    files = [
        *folder.glob("*.py"),
        *folder.glob("*.json"),
        *Path(__file__).parent.glob("triton_*.py"),
    ]
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        total.update(file.read_bytes())
    return total.hexdigest()


def sample() -> list[tuple[str, str]]:
    """Every case on one target, and equally many on every target."""
    targets = list(TARGETS)
    return [(targets[i % len(targets)], case) for i, case in enumerate(CASES)]


def measured(jobs: Sequence[tuple[str, str]]) -> Results:
    """What these cases compile to on these targets."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        rows_of_jobs = list(pool.map(_isolated, jobs))
    results: Results = {}
    for (target, case), rows in zip(jobs, rows_of_jobs, strict=True):
        results.setdefault(target, {})[case] = rows
    return results


def dumped(results: Results) -> str:
    """JSON with one kernel a line, to be compared line by line."""
    lines = [f' "triton": "{triton.__version__}"', f' "sources": "{sources()}"']
    for target, cases in results.items():
        texts = []
        for case, rows in cases.items():
            if isinstance(rows, str):
                texts.append(f'  "{case}": {json.dumps(rows)}')
            else:
                kernels = ",\n".join(f"   {json.dumps(row._asdict())}" for row in rows)
                texts.append(f'  "{case}": [\n{kernels}\n  ]')
        lines.append(f' "{target}": {{\n' + ",\n".join(texts) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


class Table(NamedTuple):
    """A result file."""

    triton: str  # its version
    sources: str
    results: Results


def loaded(path: Path) -> Table:
    """A file that :func:`dumped` has written."""
    content = json.loads(path.read_text(encoding="utf-8"))
    triton_version, source_hash = content.pop("triton"), content.pop("sources")
    for cases in content.values():
        for case, rows in cases.items():
            if not isinstance(rows, str):
                cases[case] = [Resources(**row) for row in rows]
    return Table(triton_version, source_hash, content)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.triton_compile", description=__doc__
    )
    parser.add_argument(
        "words", nargs="*", help="targets, and words that cases have in their names"
    )
    parser.add_argument("--sample", action="store_true", help="every case on one target")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if options.sample and options.out == RESULT:
        parser.error("--sample needs --out: the table has all cases on all targets")
    targets = [word for word in options.words if word in TARGETS] or list(TARGETS)
    rest = [word for word in options.words if word not in TARGETS]
    cases = [case for case in CASES if all(word in case for word in rest)]
    jobs = sample() if options.sample else [(t, c) for t in targets for c in cases]
    results = measured(jobs)
    if not options.words:
        options.out.write_text(dumped(results), encoding="utf-8")
        print(f"wrote {options.out}")
        return
    for target, results_of_cases in results.items():
        for case, rows in results_of_cases.items():
            for row in [rows] if isinstance(rows, str) else rows:
                print(f"{target:7} {case:50} {row}")


if __name__ == "__main__":
    main()
