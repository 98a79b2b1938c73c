"""Gradients as autograd uses them: gradcheck, one side, twice, checkpointed, saved memory."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import rift_kernels as rk
from tests.support import cases, memory


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
@cases.by_name(cases.MEASURES)
def test_gradcheck(measure, masked, form, force_form) -> None:
    force_form(form)
    x, y = cases.pair(dtype=torch.float64)
    mask = torch.arange(12) % 6 != 2 if masked else None
    assert torch.autograd.gradcheck(lambda a, b: measure(a, b, mask=mask), (x, y), rtol=1e-4)


@cases.by_name([cases.CKA, cases.COVARIANCE])
def test_gradcheck_batch(measure) -> None:
    assert torch.autograd.gradcheck(measure, cases.pair(rows=7, dtype=torch.float64, batch=(2, 2)))


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


@cases.by_name(cases.MEASURES)
def test_gradient_only_where_required(measure, device) -> None:
    """A frozen teacher gets no gradient; the student's is the same without the teacher's."""
    x, y = (t.detach().to(device) for t in cases.pair())
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


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@cases.by_name(cases.MEASURES)
@cases.every_empty_batch
def test_empty_batch(measure, batch, masked, dtype, form, force_form, device) -> None:
    force_form(form)
    cases.assert_empty(measure, batch, masked, dtype, device)


@cases.by_name(cases.MEASURES)
def test_no_memory_outlives_a_call(measure, device) -> None:
    memory.assert_none_outlives(lambda: measure(*(t.to(device) for t in cases.pair(12, 70))))
    memory.assert_none_outlives(lambda: measure(*(t.to(device) for t in cases.pair(40, 7))))


@cases.by_name(cases.MEASURES)
def test_double_backward_raises(measure) -> None:
    x, y = cases.pair()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(measure(x, y), x, create_graph=True)


def test_double_backward_of_moments_raises() -> None:
    x, y = cases.pair()
    for value in (rk.cross_covariance(x, y).sum(), rk.second_moments(x, y).student.sum()):
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(value, x, create_graph=True)


@cases.by_name(cases.MEASURES)
def test_forward_mode_raises(measure) -> None:
    """An error is better than a derivative of zero."""
    x, y = (t.detach() for t in cases.pair())
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda a: measure(a, y), (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        measure(forward_ad.make_dual(x, torch.ones_like(x)), y)


def test_features_may_change_in_place_after_the_call() -> None:
    """As happens to features from a hook if the next layer adds to them."""
    x, y = cases.pair()
    features = x * 1
    value = rk.linear_cka(features, y, backend="eager")
    features += 1
    value.backward()
    assert x.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
@cases.by_name([cases.CKA, cases.PROCRUSTES, cases.COVARIANCE, cases.BURES])
def test_under_activation_checkpointing(measure, reentrant, device) -> None:
    x, y = (t.detach().to(device) for t in cases.pair())
    expected = cases.value_and_gradients(lambda a, b: measure(a * 2, b), x, y)
    actual = cases.value_and_gradients(
        lambda a, b: checkpoint(lambda c, d: measure(c * 2, d), a, b, use_reentrant=reentrant), x, y
    )
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)


def test_tensors_of_inference_mode(device) -> None:
    """Teacher features and a mask that were made under torch.inference_mode()."""
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


@pytest.mark.parametrize("form", cases.FORMS)
def test_a_frozen_teacher_is_not_kept(form, force_form) -> None:
    """Unless the student's gradient needs the teacher's features."""
    force_form(form)
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    x, y = cases.pair(20, 30)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rk.linear_cka(x, y.detach())
    assert sizes.count(600) == (1 if form == "gram" else 2)


def test_moments_give_gradients_only_where_required() -> None:
    x, y = cases.pair()
    moments = rk.second_moments(x, y.detach())
    assert not moments.count.requires_grad
    moments.cross.sum().backward()
    alone = x.grad.clone()
    x.grad = None
    rk.second_moments(x, y).cross.sum().backward()
    assert torch.equal(alone, x.grad)
    rk.second_moments(x.detach(), y).student_mean.sum().backward()
    assert y.grad is not None
