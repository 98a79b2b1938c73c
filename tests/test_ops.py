"""Operators and autograd: gradcheck, opcheck, torch.compile, autocast, precision, lists."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import rift_kernels as rk
from rift_kernels import precision, reference
from tests import cases

FORMS = ("covariance", "gram")


def by_name(measures):
    return pytest.mark.parametrize("measure", measures, ids=lambda m: m.name)


def pair(rows: int = 12, width: int = 5, dtype: torch.dtype = torch.float32, batch=()):
    x, y, _ = cases.Case("", rows, width, width, batch=batch).features(dtype)
    return x.requires_grad_(), y.requires_grad_()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
@by_name(cases.MEASURES)
def test_gradcheck(measure, masked, form, force_form) -> None:
    force_form(form)
    x, y = pair(dtype=torch.float64)
    mask = torch.arange(12) % 6 != 2 if masked else None
    assert torch.autograd.gradcheck(lambda a, b: measure(a, b, mask=mask), (x, y), rtol=1e-4)


@by_name([cases.CKA, cases.COVARIANCE])
def test_gradcheck_batch(measure) -> None:
    assert torch.autograd.gradcheck(measure, pair(rows=7, dtype=torch.float64, batch=(2, 2)))


def test_gradcheck_rotation_and_moments() -> None:
    x, y, _ = cases.Case("", 9, 4, 6).features(torch.float64)
    x.requires_grad_()
    y.requires_grad_()
    q = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(9) != 3

    def distance(a: Tensor, b: Tensor, rotation: Tensor) -> Tensor:
        return rk.covariance_distance(a, b, mask=mask, rotation=rotation, mean_weight=0.3)

    assert torch.autograd.gradcheck(distance, (x, y, q))
    assert torch.autograd.gradcheck(lambda a, b: rk.cross_covariance(a, b, mask=mask), (x, y))
    assert torch.autograd.gradcheck(lambda a, b: rk.second_moments(a, b, mask=mask)[1:], (x, y))


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
def test_moments_against_reference(batch, device) -> None:
    x, y, mask = cases.Case("", 20, 6, 9, batch=batch, masked=True).features(torch.float64)
    expected = reference.second_moments(x, y, mask=mask)
    actual = rk.second_moments(*(t.to(device) for t in (x, y)), mask=mask.to(device))
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.cpu(), wanted)
    for correction in (0, 1):
        got = rk.cross_covariance(x.to(device), y.to(device), correction=correction)
        wanted = reference.cross_covariance(x, y, correction=correction)
        torch.testing.assert_close(got.cpu(), wanted)
    layers = rk.second_moments([x.reshape(-1, 6)] * 2, [y.reshape(-1, 9)] * 2)
    assert len(layers) == 2
    assert layers[1].cross.shape == (6, 9)
    assert len(rk.cross_covariance([x.reshape(-1, 6)], [y.reshape(-1, 9)])) == 1


def test_rotation_against_reference(device) -> None:
    x, y, mask = cases.Case("", 30, 5, 8, masked=True).features(torch.float64)
    y[~mask] = float("nan")
    q = cases.rotation(8)[:, :5].contiguous().to(device).requires_grad_()
    wanted_q = q.detach().cpu().requires_grad_()
    clean = y.nan_to_num()
    expected = reference.covariance_distance(x, clean, mask=mask, rotation=wanted_q)
    actual = rk.covariance_distance(x.to(device), y.to(device), mask=mask.to(device), rotation=q)
    expected.backward()
    actual.backward()
    torch.testing.assert_close(actual.cpu(), expected)
    torch.testing.assert_close(q.grad.cpu(), wanted_q.grad)


@pytest.mark.parametrize("form", FORMS)
@by_name(cases.MEASURES)
def test_lists_of_layers(measure, form, force_form, device) -> None:
    """One value a layer, as if each were called alone; widths and rows may differ."""
    force_form(form)
    shapes = ((12, 5), (20, 9), (12, 30))
    pairs = [pair(rows, width) for rows, width in shapes]
    xs = [x.detach().to(device).requires_grad_() for x, _ in pairs]
    ys = [y.detach().to(device).requires_grad_() for _, y in pairs]
    values = measure(xs, ys)
    assert values.shape == (3,)
    weights = torch.tensor([1.0, -2.0, 0.5], device=device)
    (values * weights).sum().backward()
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        alone_x, alone_y = (t.detach().clone().requires_grad_() for t in (x, y))
        value = measure(alone_x, alone_y)
        assert torch.equal(value, values[i])
        (value * weights[i]).backward()
        torch.testing.assert_close(x.grad, alone_x.grad)
        torch.testing.assert_close(y.grad, alone_y.grad)
    assert measure(xs[:1], ys[:1]).shape == (1,)


def test_lists_with_masks(device) -> None:
    xs, ys = zip(*(pair(10, 6) for _ in range(2)), strict=True)
    xs, ys = [x.detach().to(device) for x in xs], [y.detach().to(device) for y in ys]
    mask = (torch.arange(10) < 7).to(device)
    shared = rk.linear_cka(xs, ys, mask=mask)
    each = rk.linear_cka(xs, ys, mask=[mask, mask])
    assert torch.equal(shared, each)
    assert float(shared[0]) == pytest.approx(float(rk.linear_cka(xs[0][:7], ys[0][:7])), abs=1e-6)


@by_name(cases.MEASURES)
def test_gradient_only_where_required(measure, device) -> None:
    """A frozen teacher costs no gradient, and one side's gradient does not depend on the other."""
    x, y = (t.detach().to(device) for t in pair())
    _, both_x, both_y = cases.value_and_gradients(measure, x, y)
    only_x, only_y = x.clone().requires_grad_(), y.clone().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    incoming = (torch.rand((), generator=generator).double() + 0.5).to(x.dtype).to(device)
    measure(only_x, y).backward(incoming)
    measure(x, only_y).backward(incoming)
    assert torch.equal(only_x.grad, both_x)
    assert torch.equal(only_y.grad, both_y)
    assert not measure(x, y).requires_grad
    with torch.no_grad():
        assert not measure(only_x, y).requires_grad


def test_mixed_dtypes(device) -> None:
    x, y = (t.detach().to(device) for t in pair(40, 16, torch.float64))
    for dtype_x, dtype_y in ((torch.bfloat16, torch.float32), (torch.float16, torch.float64)):
        a, b = x.to(dtype_x).requires_grad_(), y.to(dtype_y).requires_grad_()
        value = rk.linear_cka(a, b)
        value.backward()
        assert value.dtype == (torch.float64 if dtype_y == torch.float64 else torch.float32)
        assert a.grad.dtype == dtype_x
        assert b.grad.dtype == dtype_y
        expected = reference.linear_cka(a.detach().double(), b.detach().double())
        assert float(value.detach()) == pytest.approx(float(expected), abs=2e-6)


def test_float64_student_with_a_float32_teacher_and_rotation() -> None:
    x, y, _ = cases.Case("", 40, 12, 12).features(torch.float64)
    y, q = y.float(), cases.rotation(12).float()
    value = rk.covariance_distance(x, y, rotation=q)
    expected = reference.covariance_distance(x, y.double(), rotation=q.double())
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_tensors_of_inference_mode(device) -> None:
    """A teacher's features, and a mask, made under torch.inference_mode()."""
    x, y, mask = (t.to(device) for t in cases.CASES[12].features(torch.float32))
    q = cases.rotation(11).float().to(device).requires_grad_()
    expected = cases.value_and_gradients(rk.linear_cka, x, y, mask=mask)
    with torch.inference_mode():
        frozen, frozen_mask = y.clone(), mask.clone()
        assert torch.equal(rk.linear_cka(x, frozen, mask=frozen_mask), expected[0])
    x.requires_grad_()
    rk.linear_cka(x, frozen, mask=frozen_mask).backward()
    assert x.grad is not None
    rk.covariance_distance(x, frozen, rotation=q).backward()
    assert q.grad is not None
    rk.cross_covariance(x, frozen, mask=frozen_mask).sum().backward()


def test_empty_batch() -> None:
    x = torch.randn(0, 8, 3, requires_grad=True)
    values = rk.linear_cka(x, torch.randn(0, 8, 4))
    assert values.shape == (0,)
    values.sum().backward()
    assert x.grad.shape == x.shape


@by_name(cases.MEASURES)
def test_double_backward_raises(measure) -> None:
    x, y = pair()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(measure(x, y), x, create_graph=True)


def test_double_backward_of_moments_raises() -> None:
    x, y = pair()
    for value in (rk.cross_covariance(x, y).sum(), rk.second_moments(x, y).student.sum()):
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(value, x, create_graph=True)


def test_features_may_change_in_place_after_the_call() -> None:
    """As features caught by a hook do, when the next layer adds into them."""
    x, y = pair()
    features = x * 1
    value = rk.linear_cka(features, y)
    features += 1
    value.backward()
    assert x.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
@by_name([cases.CKA, cases.PROCRUSTES, cases.COVARIANCE, cases.BURES])
def test_under_activation_checkpointing(measure, reentrant, device) -> None:
    x, y = (t.detach().to(device) for t in pair())
    expected = cases.value_and_gradients(lambda a, b: measure(a * 2, b), x, y)
    actual = cases.value_and_gradients(
        lambda a, b: checkpoint(lambda c, d: measure(c * 2, d), a, b, use_reentrant=reentrant), x, y
    )
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)


@by_name(cases.MEASURES)
def test_forward_mode_raises(measure) -> None:
    """Better than a derivative of zero."""
    x, y = (t.detach() for t in pair())
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda a: measure(a, y), (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("form", FORMS)
def test_a_frozen_teacher_is_not_kept(form, force_form) -> None:
    """Where its features are no part of the student's gradient."""
    force_form(form)
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    x, y = pair(20, 30)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rk.linear_cka(x, y.detach())
    assert sizes.count(600) == (1 if form == "gram" else 2)


@pytest.mark.parametrize("form", FORMS)
@by_name(cases.MEASURES)
def test_compile_fullgraph(measure, form, force_form) -> None:
    force_form(form)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda a, b, m: measure(a, b, mask=m), fullgraph=True, backend="aot_eager"
    )
    x, y, mask = cases.Case("", 24, 6, 6, masked=True).features(torch.float32)
    for given in (None, mask):
        eager = cases.value_and_gradients(lambda a, b, m=given: measure(a, b, mask=m), x, y)
        traced = cases.value_and_gradients(lambda a, b, m=given: compiled(a, b, m), x, y)
        for got, wanted in zip(traced, eager, strict=True):
            assert torch.equal(got, wanted)


def test_compile_fullgraph_of_the_rest() -> None:
    torch._dynamo.reset()
    x, y, mask = cases.Case("", 24, 6, 6, masked=True).features(torch.float32)
    q = cases.rotation(6).float()

    def everything(a: Tensor, b: Tensor) -> Tensor:
        moments = rk.second_moments(a, b, mask=mask)
        layers = rk.linear_cka([a, a[:, :3], a], [b, b[:, 1:], b], mask=mask)
        rotated = rk.covariance_distance(a, b, rotation=q)
        cross = rk.cross_covariance(a, b, mask=mask)
        sums = moments.student.sum() + moments.student_mean.sum() + cross.sum()
        return sums + layers.sum() + rotated

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    eager = cases.value_and_gradients(everything, x, y)
    for got, wanted in zip(cases.value_and_gradients(compiled, x, y), eager, strict=True):
        torch.testing.assert_close(got, wanted)


def test_compile_of_large_products() -> None:
    """Which take another road on a CPU."""
    torch._dynamo.reset()
    case = next(case for case in cases.CASES if case.name == "blocks")
    x, y, _ = case.features(torch.float32)
    compiled = torch.compile(rk.linear_cka, fullgraph=True, backend="aot_eager")
    eager = cases.value_and_gradients(rk.linear_cka, x, y)
    for got, wanted in zip(cases.value_and_gradients(compiled, x, y), eager, strict=True):
        assert torch.equal(got, wanted)


def test_compile_with_inductor_and_dynamic_rows() -> None:
    """The default compiler, inside a model, without recompiling for each batch size."""
    torch._dynamo.reset()
    model = torch.nn.Linear(8, 8)
    loss = rk.RIFTLoss("cka", weight=0.5)

    def step(batch: Tensor) -> Tensor:
        features = model(batch)
        return features.square().mean() + loss(features, batch)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (32, 48, 40):
        batch = torch.randn(rows, 8)
        model.zero_grad()
        compiled(batch).backward()
        got = model.weight.grad.clone()
        model.zero_grad()
        step(batch).backward()
        torch.testing.assert_close(got, model.weight.grad, rtol=1e-4, atol=1e-6)


def operator_calls() -> Iterator[tuple[str, tuple]]:
    x, y, mask = cases.Case("", 9, 4, 4, masked=True).features(torch.float32)
    for gram in (False, True):
        for masks in ([], [mask], [mask, mask.flip(0)]):
            layers = ([x, x[:, :3].contiguous()], [y, y[:, :3].contiguous()], masks, [gram, gram])
            how = (True, True, "high", "eager")
            yield "cka_fwd", (*layers, *how, True)
            yield "procrustes_fwd", (*layers, *how, "newton_schulz")
            yield "covariance_fwd", (*layers, *how, "relative", 0.5)
            yield "bures_fwd", (*layers, *how, True, 0.5, "newton_schulz")
            _, saved = torch.ops.rift_kernels.cka_fwd(*layers, *how, True)
            rest = (masks, [gram, gram], *how, torch.float32, torch.bfloat16)
            yield "features_bwd", (torch.randn(2), saved, *rest)
    yield "moments_fwd", (x, y, [mask], "xx xy yy", "high", "eager")
    yield "moments_fwd", (x, y, [], "xy", "high", "eager")
    yield "matmul", (x, y.T.contiguous(), "high")


@pytest.mark.parametrize(("name", "arguments"), list(operator_calls()))
def test_opcheck(name, arguments) -> None:
    with warnings.catch_warnings():
        # opcheck only warns where an operator has no autograd formula and is asked for one.
        warnings.simplefilter("error")
        torch.library.opcheck(getattr(torch.ops.rift_kernels, name).default, arguments)


def test_every_operator_is_checked() -> None:
    schemas = torch._C._jit_get_all_schemas()
    registered = {s.name.split("::")[1] for s in schemas if s.name.startswith("rift_kernels::")}
    assert registered == {name for name, _ in operator_calls()}


@by_name(cases.MEASURES)
def test_autocast_changes_nothing(measure, device) -> None:
    x, y = (t.detach().to(device) for t in pair(64, 24))
    expected = cases.value_and_gradients(measure, x, y)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = cases.value_and_gradients(measure, x, y)
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)


def test_autocast_does_not_reach_the_rotation(device) -> None:
    x, y = (t.detach().to(device) for t in pair(64, 24))
    q = cases.rotation(24).float().to(device)
    expected = rk.covariance_distance(x, y, rotation=q)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(rk.covariance_distance(x, y, rotation=q), expected)


@pytest.mark.parametrize("library", ["cuda", "mkldnn"])
def test_full_precision_leaves_the_settings_as_they_were(library) -> None:
    """What is inherited stays inherited, also with two threads inside at once."""
    device = torch.device("cuda" if library == "cuda" else "cpu")
    reduced = "tf32" if library == "cuda" else "bf16"
    backend = getattr(torch.backends, library)
    parent = torch.backends if library == "cuda" else backend

    def inside() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(precision.full_precision(device, "high"))
        assert backend.matmul.fp32_precision == "ieee"
        return stack

    before = parent.fp32_precision
    try:
        parent.fp32_precision = reduced
        assert backend.matmul.fp32_precision == reduced
        first, second = inside(), inside()
        first.close()
        assert backend.matmul.fp32_precision == "ieee"
        second.close()
        assert backend.matmul.fp32_precision == reduced
        parent.fp32_precision = "ieee"
        assert backend.matmul.fp32_precision == "ieee"
        backend.matmul.fp32_precision = reduced
        inside().close()
        assert backend.matmul.fp32_precision == reduced
    finally:
        backend.matmul.fp32_precision = "none"
        parent.fp32_precision = before


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_matmul_precision_settings(setting, device) -> None:
    """TF32 or bf16 products, which many training scripts allow, do not reach precision="high"."""
    x, y = (t.detach().to(device) for t in pair(300, 64))
    expected = cases.value_and_gradients(cases.CKA, x, y)
    try:
        torch.set_float32_matmul_precision(setting)
        actual = cases.value_and_gradients(cases.CKA, x, y)
        allowed = rk.linear_cka(x, y, precision="medium")
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision("highest")
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)
    assert float(allowed) == pytest.approx(float(expected[0]), abs=1e-2)
