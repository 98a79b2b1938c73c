"""What the Triton kernels compile to on every architecture, without a GPU.

A table has all of it, and a hash of the sources it was made from. A quarter is compiled again, or
all of it if triton is not the table's version. That takes a process of its own, because triton
decides at import whether it compiles or interprets.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

import triton

from benchmarks import kernel_tables
from tests.support import triton_compile
from tests.support.triton_compile import CASES, TARGETS, Results
from tests.support.triton_resources import Resources

ROOT = Path(__file__).parents[2]
PINNED = re.search(r"^triton==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
TENSOR_MEMORY = 512  # columns
MATRIX = {"sm80": "mma.sync", "sm90": "wgmma", "sm100": "tcgen05", "gfx942": "mfma"}
MATRIX_KERNELS = {
    "raw_moments_kernel",
    "covariance_backward_kernel",
    "gram_backward_kernel",
    "gram_cka_small_kernel",
    "products_kernel",
}
# Tensor memory and AMD's matrix instructions have no float64, so torch multiplies there.
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
    """What was compiled, and the rest of the table."""
    table = triton_compile.loaded(triton_compile.RESULT).results
    return {target: {**table[target], **compiled[target]} for target in TARGETS}


@pytest.fixture
def kernels(all_kernels: Results, target: str, case: str) -> list[Resources]:
    resources = all_kernels[target][case]
    if (target, case) in NOT_COMPILED:
        assert resources == [], "these products are torch's"
        pytest.skip(f"needs a triton that compiles float64 products for {target}")
    if target == "gfx942" and triton.__version__ != PINNED and isinstance(resources, str):
        pytest.skip(f"needs triton {PINNED}; others fail to compile some for AMD's GPUs")
    assert not isinstance(resources, str), f"triton fails: {resources}"
    return resources


@every_case
def test_fits(target: str, case: str, kernels: list[Resources]) -> None:
    assert kernels, f"{case} launches nothing"
    for kernel in kernels:
        assert kernel.shared <= TARGETS[target].shared, kernel
        assert kernel.tensor <= TENSOR_MEMORY, kernel
        # Below the limit of registers, ptxas may spill a few outside of loops, so that one more
        # program fits onto a processor. Versions of triton that are not pinned may spill anyway.
        is_choice = kernel.registers < 255 and target != "gfx942"
        allowed = 96 if is_choice or triton.__version__ != PINNED else 0
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
    """Loops around products load tiles ahead of time, and 16 bytes at once."""
    for kernel in kernels:
        # One step covers all of few rows, so there is nothing to load ahead.
        one_step = " rows " in case and kernel.kernel == "gram_backward_kernel"
        # The copy engine does not load the few chunks with long rows.
        has_chunks = kernel.kernel == "raw_moments_kernel" and kernel.bulk and "debiased" in case
        if kernel.kernel in MATRIX_KERNELS and not one_step:
            assert kernel.loads <= (2 if has_chunks else 0), kernel
            assert kernel.copies or kernel.bulk, kernel


@pytest.mark.skipif(
    triton.__version__ != PINNED, reason=f"needs triton {PINNED}, which made the table"
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
    rare = {"blocks_kernel", "products_kernel"}
    assert all(names >= set.union(*kernels.values()) - rare for names in kernels.values())


def test_markdown() -> None:
    text = kernel_tables.triton_resources(triton_compile.RESULT)
    assert f"triton {PINNED}" in text
    for name in (*TARGETS, "raw_moments", "gram_cka_small"):
        assert name in text
