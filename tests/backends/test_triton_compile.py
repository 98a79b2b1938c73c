"""What the Triton kernels compile to on every architecture: found without a GPU.

All of it is in a table, which knows the sources that it is of. A quarter is compiled anew, or, with
another triton than the table's, all; in a process of its own, because triton decides at import
whether it compiles or interprets.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

import triton

from benchmarks import resources as report
from tests.support import triton_compile
from tests.support.triton_compile import CASES, TARGETS, Results
from tests.support.triton_resources import Resources

ROOT = Path(__file__).parents[2]
PINNED = re.search(r"^triton==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
TENSOR_MEMORY = 512  # columns
MATRIX = {"sm80": "mma.sync", "sm90": "wgmma", "sm100": "tcgen05", "gfx942": "mfma"}
MATRIX_KERNELS = {
    "moments_kernel",
    "backward_kernel",
    "gram_backward_kernel",
    "small_gram_kernel",
    "product_kernel",
}
# Neither float64 in tensor memory nor by AMD's matrix instructions; torch multiplies there.
NOT_COMPILED = {
    (target, case)
    for target in ("sm100", "gfx942")
    for case in ("product fp64", "product of odd sizes fp64")
}

every_case = pytest.mark.parametrize(
    ("target", "case"),
    [pytest.param(t, c, id=f"{t}: {c}") for t in TARGETS for c in CASES],
)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Results:
    path = tmp_path_factory.mktemp("triton") / "resources.json"
    sample = ["--sample"] if triton.__version__ == PINNED else []
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.triton_compile", *sample, "--out", str(path)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return triton_compile.loaded(path).results


@pytest.fixture(scope="session")
def all_kernels(compiled: Results) -> Results:
    """What was compiled, and what else the table has."""
    table = triton_compile.loaded(triton_compile.RESULT).results
    return {target: {**table[target], **compiled[target]} for target in TARGETS}


@pytest.fixture
def kernels(all_kernels: Results, target: str, case: str) -> list[Resources]:
    found = all_kernels[target][case]
    if (target, case) in NOT_COMPILED:
        assert found == [], "these products are torch's"
        pytest.skip(f"needs a triton that compiles float64 products for {target}")
    if target == "gfx942" and triton.__version__ != PINNED and isinstance(found, str):
        pytest.skip(f"needs triton {PINNED}; others fail to compile some for AMD's GPUs")
    assert not isinstance(found, str), f"triton fails: {found}"
    return found


@every_case
def test_fits(target: str, case: str, kernels: list[Resources]) -> None:
    assert kernels, f"{case} launches nothing"
    for kernel in kernels:
        assert kernel.shared <= TARGETS[target].shared, kernel
        assert kernel.tensor <= TENSOR_MEMORY, kernel
        # Below the limit of registers ptxas spills some of its own accord, outside of loops, where
        # that lets one more program run beside the others. Others than the pinned triton may spill.
        chosen = kernel.registers < 255 and target != "gfx942"
        allowed = 96 if chosen or triton.__version__ != PINNED else 0
        assert kernel.spilled <= allowed, kernel


@every_case
def test_matrix_instructions(target: str, case: str, kernels: list[Resources]) -> None:
    expected = MATRIX[target]
    if "fp64" in case:
        # Neither wgmma nor tcgen05 has float64.
        expected = "mma.sync"
    for kernel in kernels:
        assert kernel.matrix == (expected if kernel.kernel in MATRIX_KERNELS else ""), kernel


@pytest.mark.parametrize(
    ("target", "case"),
    [
        pytest.param(target, case, id=f"{target}: {case}")
        for target in TARGETS
        for case in CASES
        # AMD's loads are prefetched into registers, and rows of odd widths are not aligned.
        if target != "gfx942" and "one column" not in case and "odd" not in case
    ],
)
def test_asynchronous_copies(case: str, kernels: list[Resources]) -> None:
    """Where loops around products load tiles, they do so ahead of time and 16 bytes at a time."""
    for kernel in kernels:
        # One step covers all of few rows: there is nothing to load ahead of.
        one_step = " rows " in case and kernel.kernel == "gram_backward_kernel"
        # Chunks with long rows, of which there are few, are not loaded ahead by the copy engine.
        apart = 2 if kernel.kernel == "moments_kernel" and kernel.bulk and "debiased" in case else 0
        if kernel.kernel in MATRIX_KERNELS and not one_step:
            assert kernel.loads <= apart, kernel
            assert kernel.copies or kernel.bulk, kernel


@pytest.mark.skipif(
    triton.__version__ != PINNED, reason=f"needs triton {PINNED}, which the table is of"
)
def test_table_is_current(compiled: Results) -> None:
    """If this fails, run ``python -m tests.support.triton_compile`` and look at the difference."""
    table = triton_compile.loaded(triton_compile.RESULT)
    assert table.triton == PINNED
    assert table.sources == triton_compile.sources()
    assert compiled.keys() == set(TARGETS)
    for target, cases in compiled.items():
        assert cases == {case: table.results[target][case] for case in cases}


def test_the_sample_has_every_case_and_on_every_target_most_kernels() -> None:
    table = triton_compile.loaded(triton_compile.RESULT).results
    kernels: dict[str, set[str]] = {target: set() for target in TARGETS}
    for target, case in triton_compile.sample():
        rows = table[target][case]
        kernels[target] |= set() if isinstance(rows, str) else {row.kernel for row in rows}
    assert {case for _, case in triton_compile.sample()} == CASES.keys()
    rare = {"blocks_kernel", "product_kernel"}
    assert all(found >= set.union(*kernels.values()) - rare for found in kernels.values())


def test_markdown() -> None:
    text = report.section(triton_compile.RESULT)
    assert f"triton {PINNED}" in text
    for name in (*TARGETS, "moments", "small_gram"):
        assert name in text
