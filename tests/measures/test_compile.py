"""torch.compile without a graph break, and opcheck on every operator."""

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import rift_kernels as rk
from tests.support import cases


@pytest.mark.parametrize("form", cases.FORMS)
@cases.by_name(cases.MEASURES)
def test_compile_fullgraph(measure, form, force_form) -> None:
    force_form(form)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda a, b, m: measure(a, b, mask=m), fullgraph=True, backend="aot_eager"
    )
    x, y, mask = cases.Case("", 24, 6, 6, masked=True).features(torch.float32)
    for optional in (None, mask):
        eager = cases.value_and_gradients(lambda a, b, m=optional: measure(a, b, mask=m), x, y)
        traced = cases.value_and_gradients(lambda a, b, m=optional: compiled(a, b, m), x, y)
        for got, wanted in zip(traced, eager, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.eager_only
def test_compile_fullgraph_of_other_functions() -> None:
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


@pytest.mark.eager_only
def test_compile_of_large_products() -> None:
    """These are computed by another library on a CPU."""
    torch._dynamo.reset()
    case = next(case for case in cases.CASES if case.name == "blocks")
    x, y, _ = case.features(torch.float32)
    compiled = torch.compile(rk.linear_cka, fullgraph=True, backend="aot_eager")
    eager = cases.value_and_gradients(rk.linear_cka, x, y)
    for got, wanted in zip(cases.value_and_gradients(compiled, x, y), eager, strict=True):
        assert torch.equal(got, wanted)


def test_compile_with_inductor_and_dynamic_rows() -> None:
    """The default compiler, inside a model, without recompilation for each batch size."""
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


# In Triton's interpreter, the kernels take CPU tensors.
BACKEND = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "eager"


def operator_calls() -> Iterator[tuple[str, tuple]]:
    x, y, mask = cases.Case("", 9, 4, 4, masked=True).features(torch.float32)
    several = ([], [mask], [mask, mask.flip(0)])
    for gram in (False, True):
        for masks in several if BACKEND == "eager" else several[::2]:
            students, teachers = [x, x[:, :3].contiguous()], [y, y[:, :3].contiguous()]
            layers = (students, teachers, masks, [gram, gram])
            call, form, sides = (True, True, "highest", BACKEND), [gram, gram], (True, True)
            fused = BACKEND == "triton"
            yield "cka_fwd", (*layers, *call, fused, True, False)
            yield "covariance_fwd", (*layers, *call, fused and not gram, "relative", 0.5)
            if BACKEND == "eager" or not masks:
                yield "procrustes_fwd", (*layers, *call, "newton_schulz", True)
                yield "bures_fwd", (*layers, *call, True, 0.5, "newton_schulz")
            dtypes, grad = (torch.float32, torch.bfloat16), torch.randn(2)
            _, saved = torch.ops.rift_kernels.cka_fwd(*layers, *call, False, True, True)
            yield "features_bwd", (grad, saved, masks, form, *call, *dtypes)
            if fused:
                dtypes = (torch.float32, torch.float32)
                _, saved = torch.ops.rift_kernels.cka_fwd(*layers, *call, True, True, True)
                rest = (masks, form, *sides, BACKEND, *dtypes)
                yield "cka_bwd", (grad, students, teachers, saved, *rest)
                if not gram:
                    settings = (True, "relative", 0.5)
                    _, saved = torch.ops.rift_kernels.covariance_fwd(*layers, *call, *settings)
                    yield "covariance_bwd", (grad, students, teachers, saved, *rest)
    yield "moments_fwd", (x, y, [mask], "xx xy yy", "highest", BACKEND)
    yield "moments_fwd", (x, y, [], "xy", "highest", BACKEND)
    for masks in ([], [mask]):
        yield "self_hsic_fwd", (x, masks, "highest", BACKEND)
    yield "matmul", (x, y.T.contiguous(), "highest")


@pytest.mark.parametrize(("name", "arguments"), list(operator_calls()))
def test_opcheck(name, arguments) -> None:
    with warnings.catch_warnings():
        # opcheck only warns if it tests autograd on an operator without a formula.
        warnings.simplefilter("error", UserWarning)
        torch.library.opcheck(getattr(torch.ops.rift_kernels, name).default, arguments)


def test_operators_return_no_two_views_of_one_tensor() -> None:
    x, y, _ = cases.Case("", 9, 4, 4).features(torch.float32)
    for gram in (False, True):
        _, saved = torch.ops.rift_kernels.cka_fwd(
            [x], [y], [], [gram], True, True, "highest", BACKEND, BACKEND == "triton", True, False
        )
        outputs = [tensor for tensor in saved if tensor.numel()]
        assert len({tensor.untyped_storage().data_ptr() for tensor in outputs}) == len(outputs)


def test_every_operator_is_checked() -> None:
    schemas = torch._C._jit_get_all_schemas()
    registered = {s.name.split("::")[1] for s in schemas if s.name.startswith("rift_kernels::")}
    # Triton's interpreter checks those of fused measures.
    fused = {"cka_bwd", "covariance_bwd"} if BACKEND == "eager" else set()
    assert registered == {name for name, _ in operator_calls()} | fused
