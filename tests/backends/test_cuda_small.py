"""CUDA kernels for few rows (csrc/cka_small), executed on a CPU by tests/support/emulator.

On a GPU, the whole suite tests them.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import rift_kernels as rk
from rift_kernels.backends import cuda
from tests.support import cases, memory
from tests.support.emulated import (
    GPUS,
    assert_matches_oracle,
    assert_only_required_gradients,
)

MEASURES = (cases.CKA, cases.CKA_BIASED)
PAIRS = [
    pytest.param(measure, case, id=f"{measure.name}-{case.name}")
    for measure in MEASURES
    for case in (
        *cases.CASES,
        cases.Case("many rows", 100, 40, 24),
        cases.Case("exact", 16, 32, 16),
    )
    if measure.takes(case) and case.rows <= cuda.MAX_ROWS
]
every_gpu = pytest.mark.parametrize("gpu", GPUS)


@every_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("measure", "case"), PAIRS)
def test_value_and_gradients(measure, case, dtype, gpu, emulate) -> None:
    emulate(gpu)
    assert_matches_oracle(
        measure, *case.features(dtype), scale=256.0 if dtype == torch.float16 else 1.0
    )


@every_gpu
def test_gradient_near_the_teacher(gpu, emulate) -> None:
    """There it is a difference of nearly equal terms, whether the student is rotated or not."""
    kinds = ((1e-1, False), (1e-5, False), (1e-5, True))
    # Before the kernels take over: finding the students takes float64.
    pairs = [cases.near_pair(48, 96, gap, rotated) for gap, rotated in kinds]
    emulate(gpu)
    for x, y in pairs:
        assert_matches_oracle(cases.CKA, x.bfloat16(), y.bfloat16())


def test_a_long_row_costs_no_precision(emulate) -> None:
    emulate()
    x, y, _ = cases.Case("", 24, 32, 32).features(torch.float32)
    x[3] *= 1000
    expected = cases.CKA.reference(x.double(), y.double())
    assert abs(float(rk.linear_cka(x, y)) - float(expected)) <= 1e-5


@every_gpu
def test_layers_of_different_shapes(gpu, emulate) -> None:
    """There are more layers than one launch takes."""
    emulate(gpu)
    shapes = [(20, 24, 8), (7, 3, 40), (16, 16, 16), (33, 10, 12), *[(5, 4, 4)] * 22]
    pairs = [
        cases.Case("", *shape).features(torch.float32, i)[:2] for i, shape in enumerate(shapes)
    ]
    students, teachers = (
        [t.clone().requires_grad_() for t in side] for side in zip(*pairs, strict=True)
    )
    values = rk.linear_cka(students, teachers)
    incoming = torch.rand(len(shapes))
    values.backward(incoming)
    for value, factor, x, y in zip(values, incoming, students, teachers, strict=True):
        exact = [t.detach().double().requires_grad_() for t in (x, y)]
        expected = cases.CKA.reference(*exact)
        expected.backward(factor.double())
        assert abs(float(value.detach()) - float(expected.detach())) <= 1e-5
        for features, exact_features in zip((x, y), exact, strict=True):
            assert cases.relative_error(features.grad, exact_features.grad) <= 1e-4


def test_one_mask_for_all_layers_or_one_each(emulate) -> None:
    emulate()
    x, y, mask = cases.Case("", 20, 8, 8, masked=True).features(torch.float32)
    other = mask.roll(1)
    x = torch.where((mask | other)[:, None], x, float("nan"))
    single = [float(rk.linear_cka(x, y, mask=m)) for m in (mask, other)]
    assert rk.linear_cka([x, x], [y, y], mask=[mask, other]).tolist() == single
    assert rk.linear_cka([x, x], [y, y], mask=mask).tolist() == [single[0]] * 2


@every_gpu
def test_the_order_of_threads_changes_nothing(gpu, emulate) -> None:
    """Results repeat to the last bit; a missing barrier would show."""
    x, y, _ = cases.Case("", 40, 70, 50).features(torch.float32)
    results = []
    for seed in range(9):
        emulate(gpu, seed)
        results.append(cases.value_and_gradients(cases.CKA, x, y))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("required", [(False, False), (True, False), (False, True)], ids=str)
def test_only_required_gradients_are_computed(required, emulate) -> None:
    emulate()
    x, y, _ = cases.Case("", 20, 12, 12).features(torch.bfloat16)
    assert_only_required_gradients(x, y, required)


def test_distance_and_retained_graph(emulate) -> None:
    emulate()
    x, y, _ = cases.Case("", 20, 12, 12).features(torch.bfloat16)
    _, grad_x, _ = cases.value_and_gradients(rk.linear_cka, x, y)
    _, opposite, _ = cases.value_and_gradients(rk.linear_cka, x, y, distance=True)
    assert torch.equal(opposite, -grad_x)
    x.requires_grad_()
    loss = rk.RIFTLoss()(x, y)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    # The gradient was saved with the value, so the second backward needs no features.
    assert torch.equal(x.grad, once + once)


def test_dtypes_may_differ(emulate) -> None:
    emulate()
    x, y, _ = cases.Case("", 20, 12, 12).features(torch.float32)
    assert_matches_oracle(cases.CKA, x.bfloat16(), y, dtype=torch.bfloat16)
    assert_matches_oracle(cases.CKA, x, y.half(), dtype=torch.float16)


def test_the_default_dtype_changes_nothing(emulate, monkeypatch) -> None:
    """A workspace of 16-bit elements would be half as large as what the kernel writes."""
    x, y, _ = cases.Case("", 20, 40, 40).features(torch.float32)
    emulate("global memory")
    tensors, empty = [], torch.empty

    def recorded(*size, **options):
        tensors.append(empty(*size, **options))
        return tensors[-1]

    monkeypatch.setattr(torch, "empty", recorded)
    torch.set_default_dtype(torch.bfloat16)
    try:
        rk.linear_cka(x, y)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [t.dtype for t in tensors] == [torch.float32] * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_make_only_their_own_entry_nan(bad, emulate) -> None:
    emulate()
    x, y, _ = cases.Case("", 20, 12, 12, batch=(3,)).features(torch.float32)
    x[1, 4, 5] = bad
    values, grad_x, _ = cases.value_and_gradients(rk.linear_cka, x, y)
    assert values.isnan().tolist() == [False, True, False]
    assert grad_x[1].isnan().all()
    assert grad_x[[0, 2]].isfinite().all()


def test_no_variance_and_too_few_rows(emulate) -> None:
    emulate()
    x, y, _ = cases.Case("", 20, 12, 12).features(torch.float32)
    for constant in (0.0, 0.1):
        value, *grads = cases.value_and_gradients(rk.linear_cka, torch.full_like(x, constant), y)
        assert value == 0
        assert not any(grad.any() for grad in grads)
    students, mask = x.expand(2, 20, 12), torch.ones(2, 20, dtype=torch.bool)
    mask[1, 3:] = False
    layers = ([students], [y.expand(2, 20, 12)], [mask], [True])
    values, _ = torch.ops.rift_kernels.cka_fwd(
        *layers, False, False, "highest", "cuda", True, True, False
    )
    assert values.isnan().tolist() == [False, True]


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_one_row_that_differs(size, emulate) -> None:
    """Debiased, one such row on a side is no variance, wherever it lies and however long it is."""
    emulate()
    x, y, _ = cases.Case("", 20, 12, 12).features(torch.float32)
    for row in (0, 17):
        single = x[1].expand(20, 12).clone()
        single[row] = x[2]
        for features in ((size * single, y), (y, size * single)):
            value, *grads = cases.value_and_gradients(rk.linear_cka, *features)
            assert value == 0
            assert not any(grad.any() for grad in grads)


def test_masked_first_rows(emulate) -> None:
    """The pivot is the first valid row, which is not row 0."""
    emulate()
    x, y, _ = cases.Case("", 20, 12, 12, offset=30.0).features(torch.float32)
    mask = torch.arange(20) > 2
    masked = torch.where(mask[:, None], x, float("nan"))
    for features in ((masked, y), (y, masked)):
        assert_matches_oracle(cases.CKA, *features, mask=mask)
    for constant in ((torch.full_like(x, 0.1), y), (y, torch.full_like(x, 0.1))):
        value, *grads = cases.value_and_gradients(rk.linear_cka, *constant, mask=mask)
        assert value == 0
        assert not any(grad.any() for grad in grads)


def test_a_teacher_expanded_over_a_batch(emulate) -> None:
    emulate()
    x, y, _ = cases.Case("", 12, 20, 33, batch=(3,)).features(torch.float32)
    expanded = y[:1].expand(3, 12, 33)
    actual = cases.value_and_gradients(rk.linear_cka, x, expanded)
    copied = cases.value_and_gradients(rk.linear_cka, x, expanded.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(actual, copied, strict=True))


@every_gpu
@pytest.mark.parametrize("kind", cases.OVERLAPS)
def test_rows_that_overlap(kind, gpu, emulate) -> None:
    emulate(gpu)
    x, y, _ = cases.Case("", 12, 24, 24, batch=(3,)).features(torch.bfloat16)
    assert_matches_oracle(cases.CKA, cases.overlapping(kind, 12, 24, torch.bfloat16), y[0])
    windows = cases.overlapping("windows", 24, 24, torch.bfloat16)
    assert_matches_oracle(cases.CKA, x, windows.as_strided((3, 12, 24), (40, 8, 1)))


@every_gpu
@cases.by_name(MEASURES)
@cases.every_empty_batch
def test_an_empty_batch(measure, batch, masked, gpu, emulate) -> None:
    emulate(gpu)
    cases.assert_empty(measure, batch, masked, torch.float32)


def test_compiles_without_graph_breaks(emulate) -> None:
    emulate()
    x, y, _ = cases.Case("", 20, 12, 12).features(torch.float32)
    expected = cases.value_and_gradients(rk.linear_cka, x, y)
    compiled = torch.compile(rk.linear_cka, fullgraph=True, backend="aot_eager")
    actual = cases.value_and_gradients(compiled, x, y)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@every_gpu
def test_no_memory_outlives_a_call(gpu, emulate) -> None:
    emulate(gpu)
    memory.assert_none_outlives(lambda: cases.CKA(*cases.pair(12, 100)))


@pytest.mark.parametrize("processors", [5, 9, 14])
def test_few_processors(processors, emulate, monkeypatch) -> None:
    """Blocks of a launch run at once: a layer has fewer of them, a batch takes more launches."""
    monkeypatch.setenv("RIFT_EMULATED_PROCESSORS", str(processors))
    emulate("global memory")
    case = cases.Case("", 12, 70, 33, batch=(5,), masked=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert_matches_oracle(
            cases.CKA, *case.features(dtype), scale=256.0 if dtype == torch.float16 else 1.0
        )


@pytest.mark.parametrize("processors", [4, 14, 132])
@pytest.mark.parametrize("gpu", GPUS)
def test_python_predicts_the_plan(
    gpu, processors, emulate, emulated_extension, monkeypatch
) -> None:
    """``fits`` and ``shared_bytes`` agree with csrc/cka_small/layout.h."""
    monkeypatch.setenv("RIFT_EMULATED_PROCESSORS", str(processors))
    emulate(gpu)
    properties = SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (int(GPUS[gpu][0]), 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    for rows in (2, 16, 17, 64, 65, 128):
        for width in (1, 16, 17, 300, 768, 1024, 3000, 20000):
            plan = emulated_extension.cka_small_plan(0, rows, width)
            assert (plan.blocks > 0) == cuda.fits(torch.device("cuda"), rows, width)
            if plan.blocks:
                assert plan.entries > 0
                assert plan.shared_bytes == cuda.shared_bytes(
                    rows, width, plan.blocks, plan.cluster
                )
                assert plan.block_columns * plan.blocks >= width
                assert plan.cluster == (gpu == "clusters")
    assert (emulated_extension.MAX_ROWS, emulated_extension.MAX_LAYERS) == (
        cuda.MAX_ROWS,
        cuda.MAX_LAYERS,
    )


def test_wrong_arguments(emulate, emulated_extension) -> None:
    emulate()
    plan = emulated_extension.cka_small_plan(0, 8, 8)
    layer = (16, 16, 0, 0, 0, 8, 1, 8, 1, 8, 8, 8)
    rest = (None, 2, 8, 1, True, False, 16, 0, 0, 0)
    for text, arguments in {
        "x must be an address; got 0": ([(0, *layer[1:])], *rest),
        "rows must be 1 to 8; got 9": ([(*layer[:9], 9, 8, 8)], *rest),
        "width_y must be 1 to 16; got 17": ([(*layer[:9], 8, 8, 17)], *rest),
        "type must be 0 .*; got 3": ([layer], None, 3, *rest[2:]),
        "layers must be one for each entry.*; got 2 for 1": ([layer] * 2, *rest),
        "values must be an address; got 0": ([layer], *rest[:6], 0, 0, 0, 0),
        "entries must not be negative; got -1": ([layer], (0,) * 5, 2, 8, -1, *rest[4:]),
    }.items():
        with pytest.raises(ValueError, match=text):
            emulated_extension.cka_small(plan, *arguments)
    with pytest.raises(ValueError, match="plan must be one that fits"):
        emulated_extension.cka_small(
            emulated_extension.cka_small_plan(0, 128, 100000), [layer], *rest
        )
    with pytest.raises(ValueError, match="rows must be 1 to 128; got 129"):
        emulated_extension.cka_small_plan(0, 129, 8)
    with pytest.raises(ValueError, match="width must be 1 to 1048576; got 16777216"):
        emulated_extension.cka_small_plan(0, 128, 1 << 24)
    emulate("global memory")
    with pytest.raises(ValueError, match="workspace must be an address; got 0"):
        emulated_extension.cka_small(emulated_extension.cka_small_plan(0, 8, 8), [layer], *rest)
    with pytest.raises(ValueError, match="count and entries must not be negative; got -1 and 2"):
        emulated_extension.scale([(16, 16, -1, 2, 16)], 2, 2, 0, 0)
    with pytest.raises(ValueError, match=r"unit must be 2 \(float32\), .*; got 0 and 2"):
        emulated_extension.scale([(16, 16, 1, 2, 16)], 0, 2, 0, 0)
    with pytest.raises(ValueError, match="incoming must be an address; got 0"):
        emulated_extension.scale([(16, 16, 1, 2, 0)], 2, 2, 0, 0)


@pytest.mark.parametrize(
    ("unit", "out"),
    [
        (torch.bfloat16, torch.bfloat16),
        *((torch.float32, out) for out in (torch.bfloat16, torch.float16, torch.float32)),
    ],
    ids=str,
)
def test_scale(unit, out, emulated_extension) -> None:
    """Tensors that are aligned, misaligned or empty, and entries that share a vector."""
    arguments, expected, tensors = [], [], []
    for offset, count, entries in ((0, 64, 3), (1, 64, 2), (0, 5, 4), (0, 1, 1), (0, 0, 3)):
        source = torch.randn(offset + count * entries).to(unit)[offset:]
        target = torch.full((offset + count * entries,), float("nan"), dtype=out)[offset:]
        incoming = torch.randn(entries)
        tensors.append((source, target, incoming))
        arguments.append(
            (source.data_ptr(), target.data_ptr(), count, entries, incoming.data_ptr())
        )
        product = source.float().view(entries, count) * incoming[:, None]
        expected.append(product.flatten().to(out))
    emulated_extension.scale(arguments, cuda._TYPES[unit], cuda._TYPES[out], 0, 0)
    for (_, target, _), product in zip(tensors, expected, strict=True):
        assert torch.equal(target, product)


def test_a_masked_row_has_no_gradient_beside_nan_and_inf(emulate) -> None:
    emulate()
    x, y, _ = cases.Case("", 20, 12, 12).features(torch.float32)
    mask = torch.arange(20) != 5
    x[3, 4] = float("nan")
    _, grad_x, grad_y = cases.value_and_gradients(rk.linear_cka, x, y, mask=mask)
    for grad in (grad_x, grad_y):
        assert not grad[5].any()
        assert grad[3].isnan().all()
    x = torch.nan_to_num(x).requires_grad_()
    rk.linear_cka(x, y, mask=mask).backward(torch.tensor(float("inf")))
    assert not x.grad[5].any()
    assert not x.grad[3].isfinite().any()


def test_compiled_for_is_constant_under_torch_compile(emulate) -> None:
    emulate()

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + cuda.compiled_for((9, 0)) + 2 * cuda.compiled_for((7, 5))

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
