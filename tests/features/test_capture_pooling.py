"""Poolings that turn a captured output into rows, and the masks that select tokens."""

import pytest
import torch

import rift_kernels as rk
from rift_kernels.features.pooling import POOLINGS, last_tokens, mean_over_tokens
from tests.support.captured import captured, net, tokens


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_pooling(dtype) -> None:
    x = tokens(3, 5).to(dtype)
    images = torch.randn(3, 4, 2, 5, dtype=torch.float64).to(dtype)
    rows = images.permute(0, 2, 3, 1)
    for output, pooling, expected in (
        (x, "cls", x[:, 0]),
        (x, "mean", x.double().mean(1).to(dtype)),
        (x, "tokens", torch.cat(list(x))),
        (x, "last", x[:, 4]),
        *((x[:, 0], pooling, x[:, 0]) for pooling in POOLINGS),
        (images, "mean", images.double().mean((2, 3)).to(dtype)),
        (images, "tokens", rows.reshape(-1, 4)),
        (images.unsqueeze(2), "mean", images.double().mean((2, 3)).to(dtype)),
        (images.unsqueeze(4), "tokens", rows.reshape(-1, 4)),
    ):
        features = captured(output, pooling)
        assert features.dtype == dtype
        torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("mask", [None, torch.arange(5000).expand(2, -1) < 4001])
def test_means_of_half_precision_are_accumulated_in_float32(mask) -> None:
    """Neither the sum nor the count is representable in float16."""
    x = torch.full((2, 5000, 3), 100.0, dtype=torch.float16)
    assert torch.equal(captured(x, "mean", mask), x[:, 0])


def test_masked_mean_selects_tokens() -> None:
    x = tokens(2, 5).requires_grad_()
    mask = torch.tensor([[True, True, False, False, False], [False, True, True, True, True]])
    with torch.no_grad():
        x[~mask] = float("nan")
    features = captured(x, "mean", mask)
    torch.testing.assert_close(features, torch.stack([x[0, :2].mean(0), x[1, 1:].mean(0)]))
    features.sum().backward()
    expected = mask / mask.sum(1, keepdim=True)
    torch.testing.assert_close(x.grad, expected.unsqueeze(-1).expand(2, 5, 4))


@pytest.mark.parametrize("compiled", [False, True])
def test_last_is_the_last_valid_token_on_either_side(compiled) -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0], [1, 0, 0, 0, 0]]).bool()
    last = [1, 4, 3, 0]
    x = tokens(4, 5).masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    run = torch.compile(last_tokens, fullgraph=True) if compiled else captured_last
    features = run(x, mask)
    assert torch.equal(features, x[range(4), last])
    features.sum().backward()
    expected = torch.zeros_like(x)
    expected[range(4), last] = 1
    assert torch.equal(x.grad, expected)


def captured_last(x, mask):
    return captured(x, "last", mask)


def test_a_function_gets_output_and_mask() -> None:
    x = torch.randn(2, 3, 3, 4, requires_grad=True)  # channels last
    calls = []

    def pooling(output, mask):
        calls.append((output, mask))
        return output.flatten(1, 2).mean(1)

    for mask in (None, VALID):
        features = captured(x, pooling, mask)
        assert calls.pop() == (x, mask)
    torch.testing.assert_close(features, x.mean((1, 2)))
    assert torch.autograd.grad(features.sum(), x)[0].eq(1 / 9).all()
    with pytest.raises(TypeError, match="mask must be boolean"):
        captured(x, pooling, VALID.float())


@pytest.mark.parametrize(
    ("pooling", "error", "message"),
    [
        (
            lambda x, _: x,
            ValueError,
            r"of layer '', whose output is \(2, 5, 4\); .* \(2, 5, 4\) of",
        ),
        (lambda x, _: x[:, 0].long(), ValueError, r"returned \(2, 4\) of torch.int64"),
        (lambda _, mask: mask, TypeError, r"\(rows, D\) of layer '', .*; it returned NoneType"),
    ],
)
def test_rows_of_a_function_are_checked(pooling, error, message) -> None:
    with pytest.raises(error, match=message):
        captured(tokens(), pooling)


def test_mask_of_rows() -> None:
    model, x = net(), tokens()
    mask = torch.tensor([[True, True, False, False, True], [False, True, True, True, True]])
    for pooling in POOLINGS:
        with rk.FeatureCapture(model, "embed", pooling) as capture:
            model(x)
            rows, features = capture.mask(mask), capture.features(mask)["embed"]
        assert capture.mask(None) is None
        if pooling == "tokens":
            assert torch.equal(features[rows], model.embed(x)[mask])
        else:
            assert rows is None
            assert len(features) == 2


VALID = torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("pooling", "output", "mask", "error", "message"),
    [
        ("cls", torch.ones(2, 4, 3, 3), None, ValueError, "must be 'mean' or 'tokens' for"),
        ("mean", torch.ones(2, 5, 4).long(), None, TypeError, "layer '' must be floating point"),
        ("mean", torch.ones(4), None, ValueError, r"layer '' must be \(batch.*; got \(4,\)"),
        ("mean", torch.ones(2, 3, 4, 5, 6, 7), None, ValueError, r"got \(2, 3, 4, 5, 6, 7\): pool"),
        (
            "last",
            torch.ones(2, 4, 3, 3),
            None,
            ValueError,
            "no first or last token; got 'last' for",
        ),
        ("cls", torch.ones(2, 4, 3, 3, 3), None, ValueError, r"for \(batch, C, T, H, W\), which"),
        ("cls", tokens(), [True], TypeError, "mask must be a boolean tensor or None; got list"),
        (
            "cls",
            tokens(),
            VALID.long(),
            TypeError,
            r"mask must be boolean, .*int64.*mask\.bool\(\)",
        ),
        ("mean", tokens(), VALID.float(), TypeError, r"mask == 0 for an additive mask .* padding"),
        ("mean", tokens(), VALID[0], ValueError, r"mask must be \(batch, tokens\); got \(5,\)"),
        ("mean", tokens(), VALID[:, :4], ValueError, r"be \(2, 5\) for layer ''.*; got \(2, 4\)"),
        ("tokens", tokens(), VALID[:1], ValueError, r"be \(2, 5\) for layer ''.*; got \(1, 5\)"),
        ("mean", torch.ones(2, 4, 1, 5), VALID, ValueError, "mask must be None for layer ''"),
        ("mean", tokens(), VALID.to("meta"), ValueError, "on the same device; got meta and cpu"),
        (
            *("mean", tokens(), VALID & torch.tensor([[True], [False]]), ValueError),
            "at least one valid token per row; row 1 has none",
        ),
        (
            *("last", tokens(), VALID & torch.tensor([[True], [False]]), ValueError),
            "at least one valid token per row; row 1 has none",
        ),
    ],
)
def test_errors_of_features(pooling, output, mask, error, message) -> None:
    with pytest.raises(error, match=message):
        captured(output, pooling, mask)


def test_a_row_without_tokens_is_an_error_for_means_and_last_tokens_only() -> None:
    assert captured(tokens(), "cls", ~VALID).isfinite().all()
    assert captured(tokens()[:, 0], "mean", ~VALID).isfinite().all()
    # On a GPU, masks are not read and the row is NaN.
    assert mean_over_tokens(tokens(), ~VALID).isnan().all()
    assert last_tokens(tokens(), ~VALID).isnan().all()
    with pytest.raises(TypeError, match="mask must be boolean"):
        rk.FeatureCapture(net(), "embed").mask(VALID.long())
