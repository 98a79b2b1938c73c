"""CUDA kernels for many rows (csrc/cka_large), executed on a CPU by tests/support/emulator.

Every test runs twice: with Hopper's own kernels, and with those for any GPU.
"""

from __future__ import annotations

import pytest
import torch

import rift_kernels as rk
from rift_kernels.backends import cuda
from tests.support import cases, emulated, memory
from tests.support.emulated import assert_matches_oracle, assert_only_required_gradients

SHAPES = [(40, 8, 8), (100, 24, 40), (130, 56, 24), (150, 136, 136), (300, 72, 200)]


@pytest.fixture(scope="module")
def near_pairs() -> dict[tuple[float, bool], tuple[torch.Tensor, torch.Tensor]]:
    """Students near their teachers, by 1 - CKA and whether the student is rotated.

    Made before the kernels take over: finding the students takes float64.
    """
    kinds = ((1e-1, False), (1e-5, False), (1e-5, True), (1e-4, True))
    return {kind: cases.near_pair(200, 64, *kind) for kind in kinds}


@pytest.fixture(autouse=True, params=emulated.GPUS)
def gpu(request, near_pairs, emulate) -> str:  # noqa: ARG001
    """Make every call take the kernels for many rows of a GPU."""
    emulate(request.param, form="covariance")
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@cases.by_name([cases.CKA, cases.CKA_BIASED])
def test_value_and_gradients(measure, shape) -> None:
    x, y, _ = cases.Case("", *shape).features(torch.bfloat16)
    assert_matches_oracle(measure, x, y)


@pytest.mark.parametrize("offset", [1.0, 30.0])
@cases.by_name([cases.CKA, cases.CKA_BIASED])
def test_offsets(measure, offset) -> None:
    x, y, _ = cases.Case("", 200, 24, 24, offset=offset).features(torch.bfloat16)
    assert_matches_oracle(measure, x, y)


def test_gradient_near_the_teacher(near_pairs) -> None:
    """Two products for a near student, five for a rotated one; its scale does not matter."""
    for x, y in near_pairs.values():
        assert_matches_oracle(cases.CKA, x.bfloat16(), y.bfloat16())
        assert_matches_oracle(cases.CKA, (1.5 * x).bfloat16(), y.bfloat16())


def uses_low_halves(x: torch.Tensor, y: torch.Tensor, precision: str = "highest") -> bool:
    """Whether the student's backward multiplies the low halves as well."""
    _, saved = torch.ops.rift_kernels.cka_fwd(
        [x], [y], [], [False], True, True, precision, "cuda", True, True, False
    )
    # The scalars come last.
    return bool(saved[0][-128:].view(torch.float32)[3])


def test_low_halves_are_multiplied_where_they_matter(near_pairs) -> None:
    for (gap, rotated), pair in near_pairs.items():
        x, y = (t.bfloat16() for t in pair)
        # Far from the teacher, either is right.
        assert uses_low_halves(x, y) == rotated or gap > 1e-2
        assert not uses_low_halves(x, y, "medium")


@pytest.mark.parametrize("length", [1, 1e5], ids=["", "long rows in the other side"])
# The moments of 1,500 equal rows round differently from the product of their means.
@pytest.mark.parametrize(("rows", "offset"), [(60, 0.0), (200, 30.0), (1500, 30.0)])
def test_one_row_that_differs(rows, length, offset) -> None:
    """Debiased, one such row is no variance: all that is left is rounding."""
    x, y, _ = cases.Case("", rows, 16, 16, offset=offset).features(torch.bfloat16)
    single = x[1].expand(rows, 16).clone()
    # Row 0, from which no pivot may come, or another one.
    single[0 if rows == 200 else 17] = x[2] * length
    y[5:8] *= length
    for features in ((single, y), (y, single)):
        value, *grads = cases.value_and_gradients(rk.linear_cka, *features)
        assert value == 0
        assert not any(grad.any() for grad in grads)


def with_long_rows(
    case: cases.Case, rows: tuple[int, ...], factor: float = 3000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features in which these rows are long, each of a different length on either side."""
    x, y, _ = case.features(torch.float64)
    for i, row in enumerate(rows):
        x[row] *= factor / (1 + i)
        y[row] *= factor / (1 + 0.7 * i)
    return x.bfloat16(), y.bfloat16()


@pytest.mark.parametrize(
    ("shape", "offset", "rows", "factor"),
    [
        # The last row of a chunk, then two rows of the same chunk.
        ((200, 24, 24), 0.0, (127,), 3000.0),
        ((200, 24, 24), 3.0, (7, 70, 71), 3000.0),
        # Rows of modest length: terms count that would be lost beside longer ones.
        ((200, 24, 24), 0.0, (7, 70, 71), 12.0),
        ((200, 72, 136), 0.0, (0, 1, 2, 63, 64, 128, 198, 199), 3000.0),
        ((10, 4, 4), 0.0, (7, 2), 3000.0),
    ],
    ids=str,
)
def test_long_rows(shape, offset, rows, factor) -> None:
    """Debiasing would subtract nearly all that such rows add to moments."""
    x, y = with_long_rows(cases.Case("", *shape, offset=offset), rows, factor)
    assert_matches_oracle(cases.CKA, x, y)
    # All other rows alone, because their gradients may be small beside those of long rows.
    grads = cases.value_and_gradients(rk.linear_cka, x, y)[1:]
    exact = (t.double() - t.double().mean(0) for t in (x, y))
    expected = cases.value_and_gradients(cases.CKA.reference, *exact)[1:]
    rest = torch.ones(len(x), dtype=torch.bool)
    rest[list(rows)] = False
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert cases.relative_error(grad[rest], expected_grad[rest]) <= 4e-3


def test_long_rows_near_the_teacher() -> None:
    x, _ = with_long_rows(cases.Case("", 200, 24, 24), (7, 70))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    assert_matches_oracle(cases.CKA, x, (x.float() * (1 + 1e-2 * noise)).bfloat16())


def test_more_columns_than_a_block_holds() -> None:
    """Beyond 4096 of them, their sums take one pass and their weighting another."""
    x, y = with_long_rows(cases.Case("", 70, 4104, 8), (5,))
    y.requires_grad_()
    value = rk.linear_cka(x, y)
    value.backward()
    exact_y = y.detach().double().requires_grad_()
    expected = cases.CKA.reference(x.double(), exact_y)
    expected.backward()
    error = float((value - expected).detach().abs())
    assert error <= cases.VALUE_TOLERANCE[torch.bfloat16]
    assert cases.relative_error(y.grad, exact_y.grad) <= cases.GRADIENT_TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("rows", [4, 5, 8, 9, 12])
def test_few_rows(rows) -> None:
    """All rows may be long, so that none is left for the moments."""
    assert_matches_oracle(cases.CKA, *cases.Case("", rows, 1, 2).features(torch.bfloat16)[:2])


def test_nan_in_a_long_row_makes_everything_nan() -> None:
    x, y = with_long_rows(cases.Case("", 60, 16, 16), (5,))
    x[5, 3] = float("nan")
    value, grad_x, _ = cases.value_and_gradients(rk.linear_cka, x, y)
    assert value.isnan()
    assert grad_x.isnan().all()


def test_several_tiles_near_the_teacher() -> None:
    """Below the diagonal of C, the tile of A that is subtracted is a transposed one."""
    y = torch.randn(220, 200, generator=torch.Generator().manual_seed(0))
    x = y + 0.1 * torch.randn(220, 200, generator=torch.Generator().manual_seed(1))
    assert_matches_oracle(cases.CKA_BIASED, x.bfloat16(), y.bfloat16())


def test_medium_precision_multiplies_no_low_halves(near_pairs) -> None:
    x, y = (t.bfloat16() for t in near_pairs[1e-4, True])
    _, expected, _ = cases.value_and_gradients(cases.CKA.reference, x.double(), y.double())
    _, default, _ = cases.value_and_gradients(rk.linear_cka, x, y)
    _, medium, _ = cases.value_and_gradients(rk.linear_cka, x, y, precision="medium")
    assert cases.relative_error(default, expected) <= 4e-3
    assert 1e-2 <= cases.relative_error(medium, expected) <= 1


def test_features_that_the_copy_engine_cannot_read_are_copied() -> None:
    """Odd widths, rows that are not contiguous, rows that are not aligned."""
    x, y, _ = cases.Case("", 60, 13, 7).features(torch.bfloat16)
    assert_matches_oracle(cases.CKA, x, y)
    assert_matches_oracle(cases.CKA, x.T.contiguous().T, y)
    assert_matches_oracle(
        cases.CKA, *cases.Case("", 60, 12, 12, strided=True).features(torch.bfloat16)[:2]
    )


@pytest.mark.parametrize("kind", cases.OVERLAPS)
def test_rows_that_overlap_are_copied(kind) -> None:
    """Their stride is less than their width, or 0."""
    x, y, _ = cases.Case("", 60, 24, 24).features(torch.bfloat16)
    assert_matches_oracle(cases.CKA, cases.overlapping(kind, 60, 24, torch.bfloat16), y)
    assert_matches_oracle(cases.CKA, x, cases.overlapping(kind, 60, 24, torch.bfloat16))


def test_expanded_rows_and_entries() -> None:
    x, y, _ = cases.Case("", 40, 16, 16, batch=(3,)).features(torch.bfloat16)
    value, *grads = cases.value_and_gradients(rk.linear_cka, x[0, :1].expand(40, 16), y[0])
    assert value == 0
    assert not any(grad.any() for grad in grads)
    assert_matches_oracle(cases.CKA, x[:1].expand(3, 40, 16), y)
    windows = cases.overlapping("windows", 60, 16, torch.bfloat16).as_strided(
        (3, 40, 16), (80, 8, 1)
    )
    assert_matches_oracle(cases.CKA, windows, y)


def test_batches_and_lists() -> None:
    x, y, _ = cases.Case("", 40, 16, 16, batch=(3,)).features(torch.bfloat16)
    assert_matches_oracle(cases.CKA, x, y)
    values, grad_x, _ = cases.value_and_gradients(rk.linear_cka, x, y)
    students = [one.clone().requires_grad_() for one in x]
    list_values = rk.linear_cka(students, list(y))
    assert torch.equal(list_values, values)
    incoming = torch.rand(3, generator=torch.Generator().manual_seed(1)).double() + 0.5
    list_values.backward(incoming.float())
    for student, grad in zip(students, grad_x, strict=True):
        assert torch.equal(student.grad, grad)


@pytest.mark.parametrize("required", [(False, False), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("debiased", [True, False])
def test_only_required_gradients_are_computed(debiased, required) -> None:
    x, y, _ = cases.Case("", 60, 16, 24).features(torch.bfloat16)
    assert_only_required_gradients(x, y, required, debiased=debiased)


def test_distance() -> None:
    x, y, _ = cases.Case("", 60, 16, 16).features(torch.bfloat16)
    value, grad_x, _ = cases.value_and_gradients(rk.linear_cka, x, y)
    distance, opposite, _ = cases.value_and_gradients(rk.linear_cka, x, y, distance=True)
    assert abs(float(distance) - (1 - float(value))) <= 2**-24
    assert torch.equal(opposite, -grad_x)


def test_the_order_of_threads_changes_nothing(gpu, emulate) -> None:
    x, y, _ = cases.Case("", 150, 136, 40).features(torch.bfloat16)
    results = []
    for seed in range(3):
        emulate(gpu, seed=seed, form="covariance")
        results.append(cases.value_and_gradients(rk.linear_cka, x, y))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("warp", [0, 4, 8])
def test_a_late_warp_changes_nothing(warp, gpu, emulate) -> None:
    """On Hopper, one that fetches or one that multiplies.

    The columns are so few that the other warps need not wait for it.
    """
    x, y, _ = cases.Case("", 60, 16, 24).features(torch.bfloat16)
    expected = cases.value_and_gradients(rk.linear_cka, x, y)
    emulate(gpu, seed=3 * warp + 2, form="covariance")
    actual = cases.value_and_gradients(rk.linear_cka, x, y)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("processors", "rows", "width"),
    # On Hopper: one cluster; four for one square; five for three squares, one for their tails.
    [(1, 150, 136), (8, 300, 40), (10, 1530, 136)],
    ids=str,
)
def test_any_number_of_processors(processors, rows, width, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "_processors", lambda _: processors)
    assert_matches_oracle(cases.CKA, *cases.Case("", rows, width, 24).features(torch.bfloat16)[:2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_make_everything_nan(bad) -> None:
    x, y, _ = cases.Case("", 60, 16, 16).features(torch.bfloat16)
    x[4, 5] = bad
    value, grad_x, _ = cases.value_and_gradients(rk.linear_cka, x, y)
    assert value.isnan()
    assert grad_x.isnan().all()


def test_no_variance() -> None:
    x, y, _ = cases.Case("", 60, 16, 16).features(torch.bfloat16)
    for constant in (0.0, 0.1):
        for measure in (cases.CKA, cases.CKA_BIASED):
            value, *grads = cases.value_and_gradients(measure, torch.full_like(x, constant), y)
            assert value == 0
            assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("factor", [1e-17, 1e17])
def test_extreme_scales(factor) -> None:
    x, y, _ = cases.Case("", 60, 16, 16).features(torch.bfloat16)
    scaled = (x.double() * factor).bfloat16()
    expected = float(cases.CKA.reference(scaled.double(), y.double()))
    assert float(rk.linear_cka(scaled, y)) == pytest.approx(expected, abs=1e-5)
    # Not because both are 0.
    assert abs(float(rk.linear_cka(x, y))) > 0.1


def test_features_changed_in_place_raise() -> None:
    x, y, _ = cases.Case("", 60, 16, 16).features(torch.bfloat16)
    features = x.requires_grad_() * 1
    value = rk.linear_cka(features, y)
    features += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@cases.by_name([cases.CKA, cases.CKA_BIASED])
@pytest.mark.parametrize("batch", cases.EMPTY_BATCHES, ids=str)
def test_an_empty_batch(measure, batch) -> None:
    cases.assert_empty(measure, batch, False, torch.bfloat16)


def test_no_memory_outlives_a_call() -> None:
    memory.assert_none_outlives(lambda: cases.CKA(*cases.pair(60, 16, torch.bfloat16)))


def test_compiles_without_graph_breaks() -> None:
    x, y, _ = cases.Case("", 60, 16, 16).features(torch.bfloat16)
    expected = cases.value_and_gradients(rk.linear_cka, x, y)
    compiled = torch.compile(rk.linear_cka, fullgraph=True, backend="aot_eager")
    actual = cases.value_and_gradients(compiled, x, y)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
