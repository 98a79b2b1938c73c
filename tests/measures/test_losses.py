"""The loss module, used as in a training script."""

import copy
import io
import pickle

import pytest
import torch

import rift_kernels as rk
from rift_kernels import losses
from tests.support import cases


def features(rows: int = 32, width: int = 12, batch=()):
    x, y, _ = cases.Case("", rows, width, width, batch=batch).features(torch.float32)
    return x.requires_grad_(), y


@pytest.mark.parametrize("measure", losses.MEASURES)
def test_is_weight_times_reduced_value(measure, device) -> None:
    x, y = (t.to(device) for t in features(batch=(3,)))
    functions = {
        "cka": lambda: rk.linear_cka(x, y, distance=True),
        "procrustes": lambda: 1 - rk.procrustes_similarity(x, y),
        "covariance": lambda: rk.covariance_distance(x, y),
        "bures": lambda: rk.bures_distance(x, y),
    }
    values = functions[measure]()
    for reduction, expected in (("none", values), ("sum", values.sum()), ("mean", values.mean())):
        loss = rk.RIFTLoss(measure, weight=0.3, reduction=reduction)
        torch.testing.assert_close(loss(x, y), 0.3 * expected)


def test_settings_reach_the_functions() -> None:
    x, y = features()
    mask = torch.arange(32) < 20
    biased = rk.RIFTLoss("cka", debiased=False)(x, y, mask=mask)
    torch.testing.assert_close(biased, 1 - rk.linear_cka(x, y, mask=mask, debiased=False))
    settings = {"scale": "none", "mean_weight": 0.5}
    loss = rk.RIFTLoss("covariance", **settings)(x, y, mask)
    torch.testing.assert_close(loss, rk.covariance_distance(x, y, mask=mask, **settings))
    loss = rk.RIFTLoss("bures", mean_weight=1.0)(x, y)
    torch.testing.assert_close(loss, rk.bures_distance(x, y, mean_weight=1.0))
    assert "cka" in repr(rk.RIFTLoss("cka"))
    with pytest.raises(RuntimeError, match="cannot run"):
        rk.RIFTLoss("cka", backend="cuda")(x, y)


@pytest.mark.parametrize("measure", losses.MEASURES)
def test_mask_and_backend_reach_every_function(measure) -> None:
    x, y = features()
    mask = torch.arange(32) < 20
    loss = rk.RIFTLoss(measure)
    torch.testing.assert_close(loss(x, y, mask), loss(x[:20], y[:20]), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="cannot run"):
        rk.RIFTLoss(measure, backend="cuda")(x, y)


def test_defaults() -> None:
    x, y = features(batch=(3,))
    assert torch.equal(
        rk.RIFTLoss()(x, y), rk.linear_cka(x, y, debiased=True, distance=True).mean()
    )


@pytest.mark.parametrize("measure", losses.MEASURES)
def test_descent_brings_the_student_back(measure, device) -> None:
    torch.manual_seed(0)
    teacher = torch.nn.Linear(6, 6).to(device)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.weight += 0.5 * torch.randn(6, 6, device=device)
    loss = rk.RIFTLoss(measure)
    optimiser = torch.optim.Adam(student.parameters(), lr=2e-2)
    inputs = torch.randn(128, 6, device=device)
    first = None
    for _ in range(150):
        optimiser.zero_grad()
        value = loss(student(inputs), teacher(inputs).detach())
        value.backward()
        optimiser.step()
        first = float(value.detach()) if first is None else first
    assert float(value.detach()) < 0.05 * first


@pytest.mark.parametrize("widths", [(6, 6), (4, 6), (6, 4)], ids=str)
def test_learned_rotation(widths, device) -> None:
    """It starts at the identity, finds a given rotation, and stays orthogonal for 1000 steps."""
    student_width, teacher_width = widths
    narrow = min(widths)
    loss = rk.RIFTLoss(
        "covariance",
        rotation="learned",
        student_width=student_width,
        teacher_width=teacher_width,
    ).to(device)
    identity = torch.eye(teacher_width, student_width, device=device)
    torch.testing.assert_close(loss.rotation.weight, identity)
    assert len(list(loss.parameters())) > 0
    y = torch.randn(200, teacher_width, device=device) * torch.arange(1, teacher_width + 1).to(
        device
    )
    q = cases.rotation(max(widths))[:teacher_width, :student_width].float().to(device)
    x = y @ q
    optimiser = torch.optim.Adam(loss.parameters(), lr=3e-2)
    first = float(loss(x, y).detach())
    for _ in range(1000):
        optimiser.zero_grad()
        value = loss(x, y)
        value.backward()
        optimiser.step()
    assert float(value.detach()) < 0.3 * first
    weight = loss.rotation.weight
    gram = weight.T @ weight if teacher_width >= student_width else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(narrow, device=device), atol=1e-5, rtol=0)


def learned(width: int, device: torch.device) -> rk.RIFTLoss:
    """A loss whose rotation is no longer the identity."""
    widths = {"student_width": width, "teacher_width": width}
    loss = rk.RIFTLoss("covariance", rotation="learned", **widths).to(device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return loss


@pytest.mark.parametrize("dtype", cases.HALF, ids=str)
def test_learned_rotation_in_a_half_precision_model(dtype, device) -> None:
    """As in ``model.bfloat16()``: rounded to 8 bits, a matrix would not be orthogonal."""
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(24, 24), "loss": learned(24, device)})
    before = model["loss"].rotation.weight.detach().clone()
    model.to(device).to(dtype)
    assert model["layer"].weight.dtype == dtype
    assert torch.equal(model["loss"].rotation.weight, before)
    optimiser = torch.optim.SGD(model["loss"].parameters(), lr=0.1)
    x, y = (t.to(device, dtype) for t in features(64, 24))
    values = []
    for _ in range(5):
        optimiser.zero_grad()
        value = model["loss"](x, y)
        value.backward()
        optimiser.step()
        values.append(float(value.detach()))
    assert values == sorted(values, reverse=True)
    assert model["loss"].double().rotation.weight.dtype == torch.float64


def test_autocast_does_not_reach_a_learned_rotation(device) -> None:
    loss = learned(24, device)
    x, y = (t.detach().to(device) for t in features(64, 24))
    cases.assert_same_under_autocast(loss, x, y, device)


def test_learned_rotation_takes_no_list(device) -> None:
    x, y = (t.to(device) for t in features(width=4))
    with pytest.raises(
        TypeError, match=r"student must be a tensor for rotation='learned'.*got list"
    ):
        learned(4, device)([x], [y])


def test_state_dict_round_trip() -> None:
    def make() -> rk.RIFTLoss:
        return rk.RIFTLoss("covariance", rotation="learned", student_width=4, teacher_width=5)

    loss, other = make(), make()
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    buffer = io.BytesIO()
    torch.save(loss.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    x, y = torch.randn(20, 4), torch.randn(20, 5)
    assert torch.equal(loss(x, y), other(x, y))
    assert not rk.RIFTLoss("cka").state_dict()


def test_copies_and_pickles() -> None:
    loss = rk.RIFTLoss("cka", weight=2.0)
    x, y = features()
    assert torch.equal(copy.deepcopy(loss)(x, y), loss(x, y))
    assert torch.equal(pickle.loads(pickle.dumps(loss))(x, y), loss(x, y))
    rotated = learned(12, x.device)
    assert torch.equal(copy.deepcopy(rotated)(x, y), rotated(x, y))
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(rotated)


def test_under_a_gradient_scaler_and_autocast(device) -> None:
    """A step of mixed-precision training; the scaler skips it if features are NaN."""
    model = torch.nn.Linear(8, 8).to(device)
    loss = rk.RIFTLoss("cka")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type)
    inputs = torch.randn(32, 8, device=device)
    for poison in (False, True):
        before = model.weight.detach().clone()
        optimiser.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            features = model(inputs)
            assert features.dtype == torch.bfloat16
            if poison:
                features = features * float("nan")
            value = loss(features, inputs)
        assert value.dtype == torch.float32
        scaler.scale(value).backward()
        scaler.step(optimiser)
        scaler.update()
        assert torch.equal(before, model.weight) == poison


def test_gradient_accumulates_over_calls() -> None:
    x, y = features()
    loss = rk.RIFTLoss("cka")
    loss(x, y).backward()
    once = x.grad.clone()
    loss(x, y).backward()
    torch.testing.assert_close(x.grad, 2 * once)
