"""TeacherStatistics against numpy in float64, for any batching, dtype, mask, offset and decay."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import Tensor

import rift_kernels as rk
from tests.support import cases

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

PARTS = ("count", "mean", "scatter")


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gathered(*batches: Tensor, decay: float = 1.0) -> rk.TeacherStatistics:
    statistics = rk.TeacherStatistics(batches[0].shape[-1], decay=decay).to(batches[0].device)
    for batch in batches:
        statistics.update(batch)
    return statistics


def state(statistics: rk.TeacherStatistics) -> list[Tensor]:
    return [getattr(statistics, part).clone() for part in PARTS]


def assert_same(actual: rk.TeacherStatistics, expected: rk.TeacherStatistics) -> None:
    """To the last bit."""
    for name in PARTS:
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert actual.decay == expected.decay


def assert_weighted(
    statistics: rk.TeacherStatistics, x: Tensor, weights: Tensor, tolerance: float = 1e-12
) -> None:
    """The statistics are numpy's mean and covariance of the rows of x with these weights."""
    rows, weights = x.double().cpu().numpy(), weights.double().cpu().numpy()
    mean = np.average(rows, axis=0, weights=weights)
    centered = rows - mean
    scatter = (centered * weights[:, None]).T @ centered
    assert float(statistics.count) == pytest.approx(weights.sum(), rel=1e-14)
    spread = np.sqrt(scatter.diagonal().max() / weights.sum())
    np.testing.assert_allclose(statistics.mean.cpu(), mean, rtol=1e-14, atol=tolerance * spread)
    assert cases.relative_error(statistics.scatter, torch.from_numpy(scatter)) < tolerance


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_equals_numpy(dtype, device) -> None:
    x = (normal(100, 7) + 3).to(device, dtype)
    statistics = gathered(*x.split(33))
    rows = x.double().cpu().numpy()
    assert float(statistics.count) == 100
    np.testing.assert_allclose(statistics.mean.cpu(), rows.mean(0), rtol=1e-13)
    for correction in (1.0, 0.0, 2.5):
        expected = np.cov(rows, rowvar=False, ddof=0) * (100 / (100 - correction))
        actual = statistics.covariance(correction)
        assert actual.dtype == torch.float64
        np.testing.assert_allclose(actual.cpu(), expected, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(
        statistics.covariance().cpu(), np.cov(rows, rowvar=False), rtol=1e-11, atol=1e-13
    )


@given(
    st.integers(1, 60),
    st.integers(1, 9),
    st.lists(st.floats(0, 1), max_size=12),
    st.integers(0, 10_000),
    st.sampled_from([0.0, 1.0, 100.0]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_batches_of_any_size_in_any_order_give_the_same(rows, width, cuts, seed, offset) -> None:
    """Repeated cuts make empty batches."""
    x = normal(rows, width, seed=seed) + offset
    bounds = sorted(round(cut * rows) for cut in cuts)
    batches = x.tensor_split(bounds)
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed))
    whole, parts = gathered(x), gathered(*(batches[i] for i in order))
    assert torch.equal(parts.count, whole.count)
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=1e-12)
    difference = float((parts.scatter - whole.scatter).norm())
    assert difference <= 1e-12 * max(1.0, float(whole.scatter.norm()))


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("batch", [1, 7, 250])
def test_an_offset_costs_no_digits(batch, decay) -> None:
    """A plain sum of squares would lose twelve of sixteen digits: std**2 / offset**2 is 1e-12."""
    x = 1e4 + 1e-2 * normal(500, 5)
    statistics = gathered(*x.split(batch), decay=decay)
    update = torch.arange(500) // batch
    weights = decay ** (update[-1] - update).double()
    # The features' own rounding, at this offset, is 1e-10 of their deviation.
    assert_weighted(statistics, x, weights, tolerance=1e-9)
    naive = x.T @ x - 500 * torch.outer(x.mean(0), x.mean(0))
    assert cases.relative_error(naive, (x - x.mean(0)).T @ (x - x.mean(0))) > 1e-5


@pytest.mark.parametrize("decay", [0.3, 0.99])
def test_decay_is_a_weighting(decay, device) -> None:
    sizes = [5, 1, 20, 3]
    x = (normal(sum(sizes), 4) + torch.arange(sum(sizes))[:, None] * 0.1).to(device)
    update = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    weights = decay ** (3 - update).double()
    statistics = gathered(*x.split(sizes), decay=decay)
    assert_weighted(statistics, x, weights)
    before = state(statistics)
    statistics.update(x[:0])
    statistics.update(x[:5], torch.zeros(5, dtype=torch.bool, device=device))
    assert all(map(torch.equal, state(statistics), before))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_masked_rows_are_left_out(dtype, device) -> None:
    x = (normal(4, 3, 10, 6) + 2).to(device, dtype)
    mask = torch.rand(4, 3, 10, generator=torch.Generator().manual_seed(0)).to(device) < 0.6
    mask[1] = False
    x[~mask] = float("nan")
    statistics = rk.TeacherStatistics(6).to(device)
    for batch, valid in zip(x, mask, strict=True):
        statistics.update(batch, valid)
    rows = x[mask]
    assert_weighted(statistics, rows, torch.ones(len(rows)))
    # All leading axes are rows.
    whole = rk.TeacherStatistics(6).to(device)
    whole.update(x, mask)
    assert_weighted(whole, rows, torch.ones(len(rows)))


def test_without_valid_rows_nothing_changes() -> None:
    x = normal(8, 3)
    for statistics in (rk.TeacherStatistics(3), gathered(x)):
        before = state(statistics)
        statistics.update(x[:0])
        statistics.update(x[None, :0])
        statistics.update(x * float("nan"), torch.zeros(8, dtype=torch.bool))
        assert all(map(torch.equal, state(statistics), before))
    assert not float(rk.TeacherStatistics(3).count)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_valid_row_reaches_the_statistics(value) -> None:
    x = normal(8, 3)
    x[2, 1] = value
    statistics = gathered(x, normal(8, 3, seed=1))
    assert statistics.mean[1].isnan()
    assert statistics.scatter[1].isnan().all()
    assert statistics.scatter[:, 1].isnan().all()
    assert float(statistics.count) == 16


def test_too_few_rows_have_no_covariance() -> None:
    assert rk.TeacherStatistics(2).covariance().isnan().all()
    one_row = gathered(normal(1, 2))
    assert one_row.covariance().isnan().all()
    assert torch.equal(one_row.covariance(0.5), torch.zeros(2, 2, dtype=torch.float64))
    two_rows = gathered(normal(2, 2))
    assert not two_rows.covariance().isnan().any()
    assert two_rows.covariance(2.0).isnan().all()
    assert two_rows.covariance(3).isnan().all()


def test_scatter_is_symmetric_to_the_last_bit(device) -> None:
    statistics = gathered(*(normal(300, 40, seed=3) + 5).to(device).split(70))
    assert torch.equal(statistics.scatter, statistics.scatter.T)


@pytest.mark.parametrize("mode", ["inference", "no_grad", "grad", "autocast"])
def test_in_any_mode(mode, device) -> None:
    x = normal(20, 4).float().to(device)
    expected = gathered(x, x)
    modes = {
        "inference": torch.inference_mode,
        "no_grad": torch.no_grad,
        "grad": torch.enable_grad,
        "autocast": lambda: torch.autocast(device.type, dtype=torch.bfloat16),
    }
    with modes[mode]():
        statistics = rk.TeacherStatistics(4).to(device)
        statistics.update(x.clone().requires_grad_(mode == "grad"))
    statistics.update(x)  # after creation and an update in inference mode
    assert_same(statistics, expected)
    assert not statistics.scatter.requires_grad


def test_update_under_compile() -> None:
    x, mask = normal(20, 4), torch.arange(20) < 15
    statistics, expected = rk.TeacherStatistics(4, decay=0.5), rk.TeacherStatistics(4, decay=0.5)
    update = torch.compile(statistics.update, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        update(x, mask)
        expected.update(x, mask)
    for actual, reference in zip(state(statistics), state(expected), strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_update_reads_no_value(decay) -> None:
    """On a GPU the host would wait for a value. On the meta device, reading one raises."""
    statistics = rk.TeacherStatistics(4, decay=decay).to("meta")
    x = torch.empty(20, 4, device="meta")
    statistics.update(x, x[:, 0] > 0)
    statistics.update(x)
    assert statistics.covariance().shape == (4, 4)


def test_features_are_left_alone() -> None:
    x = normal(20, 4)
    before = x.clone()
    gathered(x).update(x, torch.arange(20) < 3)
    assert torch.equal(x, before)


def test_casts_leave_float64() -> None:
    statistics = gathered(normal(30, 5) + 1e4)
    before = state(statistics)
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(5, 5), "statistics": statistics})
    for cast in ("half", "bfloat16", "float", "double"):
        getattr(model, cast)()
        assert all(map(torch.equal, state(statistics), before))
    model.to(torch.float16)
    assert model["layer"].weight.dtype == torch.float16
    assert all(map(torch.equal, state(statistics), before))
    with torch.inference_mode():
        moved = copy.deepcopy(statistics).to("meta", torch.float16)
    assert not any(t.is_inference() for t in moved.buffers())
    assert {(t.device.type, t.dtype) for t in state(moved)} == {("meta", torch.float64)}
    statistics.update(normal(30, 5).half())
    assert float(statistics.count) == 60


def test_state_dict_round_trip() -> None:
    statistics = gathered(normal(30, 5))
    assert set(statistics.state_dict()) == set(PARTS)
    assert not list(statistics.parameters())
    buffer = io.BytesIO()
    torch.save(statistics.state_dict(), buffer)
    buffer.seek(0)
    other = rk.TeacherStatistics(5)
    other.load_state_dict(torch.load(buffer))
    assert_same(other, statistics)
    assert_same(copy.deepcopy(statistics), statistics)
    other.update(normal(30, 5, seed=1))
    statistics.update(normal(30, 5, seed=1))
    assert_same(other, statistics)
    with pytest.raises(RuntimeError, match="size mismatch for mean"):
        rk.TeacherStatistics(4).load_state_dict(statistics.state_dict())


def test_repr() -> None:
    assert repr(rk.TeacherStatistics(768, decay=0.99)) == "TeacherStatistics(768, decay=0.99)"
    assert rk.TeacherStatistics(768).width == 768


X = torch.ones(8, 3)
UPDATES = [
    (TypeError, r"features must be a tensor; got list", [X], None),
    (TypeError, r"features must be float64, .*; got torch.int64", X.long(), None),
    (TypeError, r"features must be a dense tensor; got torch.sparse_coo", X.to_sparse(), None),
    (ValueError, r"features must be \(\.\.\., N, 3\); got \(3,\)", X[0], None),
    (ValueError, r"features must be \(\.\.\., N, 3\); got \(3, 8\)", X.T, None),
    (ValueError, r"features must be on cpu; got meta", X.to("meta"), None),
    (TypeError, r"mask must be a boolean tensor or None; got list", X, [True]),
    (TypeError, r"mask must be boolean, True = valid; got torch.float32", X, X[:, 0]),
    (ValueError, r"mask must be \(8,\), one entry per row; got \(8, 3\)", X, X > 0),
    (ValueError, r"mask and features must be on the same", X, (X[:, 0] > 0).to("meta")),
]


@pytest.mark.parametrize(("error", "message", "features", "mask"), UPDATES)
def test_wrong_updates(error, message, features, mask) -> None:
    statistics = rk.TeacherStatistics(3)
    with pytest.raises(error, match=message):
        statistics.update(features, mask)
    assert not float(statistics.count)


SETTINGS = [
    (TypeError, r"width must be an integer; got float", {"width": 3.0}),
    (TypeError, r"width must be an integer; got bool", {"width": True}),
    (ValueError, r"width must be at least 1; got 0", {"width": 0}),
    (TypeError, r"decay must be a number; got str", {"width": 3, "decay": "1"}),
    (ValueError, r"decay must be above 0 and at most 1; got 0", {"width": 3, "decay": 0}),
    (ValueError, r"decay must be above 0 and at most 1; got 1.5", {"width": 3, "decay": 1.5}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), SETTINGS)
def test_wrong_settings(error, message, arguments) -> None:
    with pytest.raises(error, match=message):
        rk.TeacherStatistics(**arguments)


def test_wrong_correction() -> None:
    with pytest.raises(ValueError, match="correction must be finite and not negative; got -1"):
        rk.TeacherStatistics(3).covariance(-1)
