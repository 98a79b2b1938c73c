"""Margins, and a weight that adapts to a target similarity."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import rift_kernels as rk
from rift_kernels import losses
from tests.support import cases


def near(distance: float) -> tuple[Tensor, Tensor]:
    x, y = cases.near_pair(64, 8, distance, rotated=False)
    return x.clone().requires_grad_(), y


@pytest.mark.parametrize("measure", losses.MEASURES)
def test_margin_is_a_hinge_on_the_distance(measure) -> None:
    x, y = near(0.1)
    plain = rk.RIFTLoss(measure)(x, y)
    distance = float(plain.detach())
    (slope,) = torch.autograd.grad(plain, x)
    outside = rk.RIFTLoss(measure, weight=2.0, margin=0.25 * distance)(x, y)
    assert float(outside.detach()) == pytest.approx(1.5 * distance)
    torch.testing.assert_close(torch.autograd.grad(outside, x)[0], 2 * slope)
    inside = rk.RIFTLoss(measure, margin=1.25 * distance)(x, y)
    assert float(inside.detach()) == 0
    assert not torch.autograd.grad(inside, x)[0].any()


def test_margin_is_of_each_layer() -> None:
    """A layer inside the margin does not compensate for one outside."""
    (x, y), (far, other) = near(0.01), near(0.3)
    loss = rk.RIFTLoss("cka", margin=0.1, reduction="none")([x, far], [y, other])
    assert float(loss[0].detach()) == 0
    assert float(loss[1].detach()) == pytest.approx(0.2, abs=0.01)
    assert "margin=0.1" in repr(rk.RIFTLoss("cka", margin=0.1))


def test_margin_lets_nan_through() -> None:
    x, y = near(0.1)
    assert rk.RIFTLoss("cka", margin=0.5)(x * float("nan"), y).isnan()


def test_one_step_of_ascent() -> None:
    weight = rk.AdaptiveWeight(0.9, initial=2.0, rate=0.5)
    loss = rk.RIFTLoss("cka", weight=weight)
    x, y = near(0.3)
    value = loss(x, y)
    distance = 1 - float(rk.linear_cka(x, y).detach())
    # The loss and its gradient have the weight before the step.
    assert float(value.detach()) == pytest.approx(2.0 * distance)
    (slope,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(
        slope, -2.0 * torch.autograd.grad(rk.linear_cka(x, y), x)[0], rtol=1e-6, atol=1e-9
    )
    assert float(weight.value) == pytest.approx(2.0 + 0.5 * (0.9 - 1 + distance), rel=1e-6)


def test_the_step_is_that_of_the_mean_over_layers() -> None:
    weight = rk.AdaptiveWeight(0.9, rate=0.5)
    weight(torch.tensor([0.1, 0.2, 0.6]))
    assert float(weight.value) == pytest.approx(1 + 0.5 * (0.9 - 1 + 0.3))


def test_the_weight_is_clipped_and_survives_nan() -> None:
    x, y = near(0.3)
    high = rk.AdaptiveWeight(1.0, initial=4.9, rate=100.0, maximum=5.0)
    rk.RIFTLoss("cka", weight=high)(x, y)
    assert float(high.value) == 5.0
    low = rk.AdaptiveWeight(0.2, initial=0.1, rate=100.0)
    rk.RIFTLoss("cka", weight=low)(x, y)
    assert float(low.value) == 0.0
    assert rk.RIFTLoss("cka", weight=high)(x * float("nan"), y).isnan()
    assert float(high.value) == 5.0


def test_the_weight_changes_in_training_only() -> None:
    x, y = near(0.3)
    weight = rk.AdaptiveWeight(0.9)
    loss = rk.RIFTLoss("cka", weight=weight)
    with torch.no_grad():
        loss(x, y)
    loss.eval()(x, y)
    assert float(weight.value) == 1.0
    loss.train()(x, y)
    assert float(weight.value) > 1.0


def test_the_weight_follows_the_distances() -> None:
    """It moves to their device, and may have been made in inference mode."""
    with torch.inference_mode():
        weight = rk.AdaptiveWeight(0.9)
    distances = torch.full((2,), 0.3, requires_grad=True)
    (weight(distances) * distances).sum().backward()
    assert float(weight.value) == pytest.approx(1.02)
    assert weight(distances.to("meta")).device.type == "meta"
    assert weight.value.device.type == "meta"
    assert list(weight.state_dict()) == ["value"]


def test_state_and_casts() -> None:
    x, y = near(0.3)
    loss = rk.RIFTLoss("procrustes", weight=rk.AdaptiveWeight(0.99))
    loss(x, y)
    fresh = rk.RIFTLoss("procrustes", weight=rk.AdaptiveWeight(0.99))
    fresh.load_state_dict(loss.state_dict())
    assert torch.equal(fresh.weight.value, loss.weight.value)
    assert copy.deepcopy(loss).bfloat16().weight.value.dtype == torch.float32
    assert not list(loss.parameters())
    assert "adaptive" in repr(loss)
    assert "target_similarity=0.99" in repr(loss)


@pytest.mark.parametrize("target", [0.5, 0.9])
@pytest.mark.parametrize("measure", ["cka", "covariance"])
def test_ascent_finds_the_target(measure, target) -> None:
    """A task that pulls away from the teacher ends at the target similarity."""
    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    away = torch.randn(256, 8)
    teacher = inputs @ torch.randn(8, 8)
    student = nn.Parameter(teacher.clone())
    loss = rk.RIFTLoss(measure, weight=rk.AdaptiveWeight(target, rate=0.05))
    optimiser = torch.optim.Adam([student], lr=2e-2)
    similarities = []
    for step in range(900):
        optimiser.zero_grad()
        distance = loss.distances(student, teacher)
        task = (student - 3 * away).square().mean() / 10
        (task + loss.from_distances(distance)).backward()
        optimiser.step()
        if step >= 700:
            similarities.append(1 - float(distance.detach()))
    assert sum(similarities) / len(similarities) == pytest.approx(target, abs=0.02)


def test_compile() -> None:
    x, y = (t.detach().float() for t in near(0.3))
    x.requires_grad_()
    loss = rk.RIFTLoss("cka", weight=rk.AdaptiveWeight(0.9), margin=0.05)
    other = copy.deepcopy(loss)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        value, expected = compiled(x, y), other(x, y)
        torch.testing.assert_close(value, expected)
        value.backward()
    torch.testing.assert_close(loss.weight.value, other.weight.value)


WRONG = [
    (ValueError, "target_similarity must be above 0 and at most 1; got 0", (0.0,), {}),
    (ValueError, "target_similarity must be above 0 and at most 1; got 1.5", (1.5,), {}),
    (TypeError, "target_similarity must be a number; got str", ("high",), {}),
    (ValueError, "rate must be finite and not negative", (0.9,), {"rate": -1}),
    (
        ValueError,
        "initial must be at most maximum, 2; got 3.0",
        (0.9,),
        {"initial": 3, "maximum": 2},
    ),
]


@pytest.mark.parametrize(("error", "message", "arguments", "named"), WRONG)
def test_errors(error, message, arguments, named) -> None:
    with pytest.raises(error, match=message):
        rk.AdaptiveWeight(*arguments, **named)


@pytest.mark.parametrize(
    ("measure", "settings"), [("bures", {}), ("covariance", {"scale": "none"})]
)
def test_a_distance_with_a_unit_has_no_similarity(measure, settings) -> None:
    with pytest.raises(ValueError, match="weight must be a number for a distance that has a unit"):
        rk.RIFTLoss(measure, weight=rk.AdaptiveWeight(0.9), **settings)
    with pytest.raises(ValueError, match="margin must be finite and not negative; got -1"):
        rk.RIFTLoss(measure, margin=-1, **settings)
