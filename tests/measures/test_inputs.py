"""Lists of layers, batches, masks, rotations and moments, compared with the oracle."""

import pytest
import torch

import rift_kernels as rk
from rift_kernels import reference
from rift_kernels.dispatch import checks
from tests.support import cases


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


@pytest.mark.parametrize("form", cases.FORMS)
@cases.by_name(cases.MEASURES)
def test_lists_of_layers(measure, form, force_form, device) -> None:
    """One value per layer, as from a call for each; widths and rows may differ."""
    force_form(form)
    shapes = ((12, 5), (20, 9), (12, 30))
    pairs = [cases.pair(rows, width) for rows, width in shapes]
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
    xs, ys = zip(*(cases.pair(10, 6) for _ in range(2)), strict=True)
    xs, ys = [x.detach().to(device) for x in xs], [y.detach().to(device) for y in ys]
    mask = (torch.arange(10) < 7).to(device)
    shared = rk.linear_cka(xs, ys, mask=mask)
    separate = rk.linear_cka(xs, ys, mask=[mask, mask])
    assert torch.equal(shared, separate)
    assert float(shared[0]) == pytest.approx(float(rk.linear_cka(xs[0][:7], ys[0][:7])), abs=1e-6)


def test_lists_with_masks_and_rotations(device) -> None:
    """Each layer has its own; values in masked rows do not affect the rotation's gradient."""
    x, y, _ = cases.Case("", 12, 5, 8).features(torch.float64)
    x, y = x.to(device), y.to(device)
    masks = [(torch.arange(12) < 8).to(device), (torch.arange(12) >= 4).to(device)]
    rotations = [cases.rotation(8, i)[:, :5].contiguous().to(device) for i in range(2)]
    expected = reference.covariance_distance([x, x], [y, y], mask=masks, rotation=rotations)
    poisoned = [y.masked_fill(~mask[:, None], float("nan")) for mask in masks]
    for rotation in rotations:
        rotation.requires_grad_()
    actual = rk.covariance_distance([x, x], poisoned, mask=masks, rotation=rotations)
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    assert all(torch.isfinite(rotation.grad).all() for rotation in rotations)
    layers = rk.second_moments([x, x], [y, y], mask=[masks[0], masks[0] & masks[1]])
    assert [float(layer.count) for layer in layers] == [8, 4]


def test_rotated_mean(device) -> None:
    x, y, _ = cases.Case("", 30, 5, 8).features(torch.float64)
    q = cases.rotation(8)[:, :5].contiguous()
    expected = reference.covariance_distance(x, y @ q, mean_weight=0.3)
    settings = {"rotation": q, "mean_weight": 0.3}
    torch.testing.assert_close(reference.covariance_distance(x, y, **settings), expected)
    settings["rotation"] = q.to(device)
    actual = rk.covariance_distance(x.to(device), y.to(device), **settings)
    torch.testing.assert_close(actual.cpu(), expected)


def test_cross_covariance_is_unbiased_by_default(device) -> None:
    x = cases.pair()[0].detach().to(device)
    torch.testing.assert_close(rk.cross_covariance(x, x), torch.cov(x.T))


def test_cross_covariance_of_too_few_rows_in_an_unreadable_mask(monkeypatch, device) -> None:
    monkeypatch.setattr(checks, "is_readable", lambda _: False)
    x = cases.pair()[0].detach().to(device)
    mask = (torch.arange(12) < 3).to(device)
    assert rk.cross_covariance(x, x, mask=mask, correction=5).isnan().all()
