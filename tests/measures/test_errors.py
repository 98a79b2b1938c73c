"""Wrong input: an error names the argument, what is accepted and what was passed."""

import pytest
import torch

import rift_kernels as rk

X = torch.randn(8, 3)
Y = torch.randn(8, 5)
SQUARE = torch.randn(8, 3)
MASK = torch.ones(8, dtype=torch.bool)
ONE_ROW = MASK.clone()
ONE_ROW[1:] = False
THREE_ROWS = MASK.clone()
THREE_ROWS[3:] = False

BOTH_WIDTHS = (rk.linear_cka, rk.procrustes_similarity, rk.cross_covariance, rk.second_moments)
EQUAL_WIDTHS = (rk.covariance_distance, rk.bures_distance)
ALL = (*BOTH_WIDTHS, *EQUAL_WIDTHS)

ANY_FUNCTION = [
    (TypeError, r"student must be float64, .*; got torch.int64", (X.long(), SQUARE), {}),
    (TypeError, r"teacher must be float64, .*; got torch.complex64", (X, SQUARE.cfloat()), {}),
    (TypeError, r"teacher must be a tensor, because student is one; got list", (X, [SQUARE]), {}),
    (TypeError, r"student must be a tensor or a list of tensors; got float", (1.0, SQUARE), {}),
    (TypeError, r"student\[1\] must be a tensor; got int", ([X, 3], [X, X]), {}),
    (TypeError, r"teacher must be a list, as student is; got Tensor", ([X], X), {}),
    (TypeError, r"student must be a dense tensor; got torch.sparse_coo", (X.to_sparse(), X), {}),
    (ValueError, r"student must be \(\.\.\., N, D\); got \(8,\)", (X[:, 0], SQUARE), {}),
    (ValueError, r"same number of rows; got 8 and 7", (X, SQUARE[:7]), {}),
    (ValueError, r"same leading axes; got \(2, 8, 3\) and \(8, 3\)", (X.expand(2, 8, 3), X), {}),
    (ValueError, r"same device; got cpu and meta", (X, SQUARE.to("meta")), {}),
    (ValueError, r"student must have at least one feature per row", (X[:, :0], SQUARE), {}),
    (ValueError, r"student must have at least one layer; got an empty list", ([], []), {}),
    (ValueError, r"same number of layers; got 2 and 1", ([X, X], [X]), {}),
    (ValueError, r"student\[0\] must be \(N, D\) in a list; got \(1, 8, 3\)", ([X[None]], [X]), {}),
    (ValueError, r"all layers of teacher must have one dtype", ([X, X], [X, X.double()]), {}),
    (TypeError, r"student must be a dense tensor; got nested", (torch.nested.nested_tensor([X], layout=torch.jagged), X), {}),
    (ValueError, r"mask must leave at least \d valid rows .*; got 1", (X.expand(2, 8, 3), X.expand(2, 8, 3)), {"mask": torch.stack([MASK, ONE_ROW])}),
    (ValueError, r"all layers of student must have one dtype", ([X, X.double()], [X, X]), {}),
    (TypeError, r"mask must be boolean, True = valid; got torch.float32", (X, SQUARE), {"mask": 1}),
    (TypeError, r"mask must be a boolean tensor or None; got list", (X, SQUARE), {"mask": [MASK]}),
    (ValueError, r"mask must be \(8,\), one entry per row; got \(7,\)", (X, SQUARE), {"mask": 7}),
    (ValueError, r"mask must have one entry per layer, 2; got 1", ([X, X], [X, X]), {"mask": [MASK]}),
    (ValueError, r"mask and student must be on the same device", (X, SQUARE), {"mask": "meta"}),
    (ValueError, r"at least \d valid rows? for this measure; got 0", (X, SQUARE), {"mask": ~MASK}),
    (ValueError, r"precision must be one of 'highest', 'high', 'medium'; got 'low'", (X, SQUARE), {"precision": "low"}),
    (ValueError, r"backend must be one of 'auto', 'eager', .*; got 'jax'", (X, SQUARE), {"backend": "jax"}),
    (RuntimeError, r"backend='triton' cannot run: .*Triton", (X, SQUARE), {"backend": "triton"}),
    (RuntimeError, r"backend='cuda' cannot run: .*CUDA", (X, SQUARE), {"backend": "cuda"}),
]  # fmt: skip
ODD_MASKS = {1: MASK.float(), 7: MASK[:7], "meta": MASK.to("meta")}

ONE_FUNCTION = [
    (rk.linear_cka, ValueError, r"at least 4 rows for this measure; got 3", (X[:3], X[:3]), {}),
    (rk.linear_cka, ValueError, r"mask must leave at least 4 valid rows .*; got 3", (X, X), {"mask": THREE_ROWS}),
    (rk.linear_cka, ValueError, r"at least 2 rows", (X[:1], X[:1]), {"debiased": False}),
    (rk.linear_cka, TypeError, r"debiased must be True or False; got 1", (X, X), {"debiased": 1}),
    (rk.procrustes_similarity, ValueError, r"at least 2 valid rows", (X, X), {"mask": ONE_ROW}),
    (rk.procrustes_similarity, ValueError, r"method must be one of 'newton_schulz', 'svd'; got 'qr'", (X, X), {"method": "qr"}),
    (rk.bures_distance, ValueError, r"method must be one of 'newton_schulz', 'eigh'; got 'svd'", (X, X), {"method": "svd"}),
    (rk.bures_distance, TypeError, r"squared must be True or False; got 'no'", (X, X), {"squared": "no"}),
    (rk.bures_distance, ValueError, r"same width for this measure; got 3 and 5", (X, Y), {}),
    (rk.covariance_distance, ValueError, r"same width .*; got 3 and 5 .*rotation", (X, Y), {}),
    (rk.covariance_distance, ValueError, r"scale must be one of 'relative', 'coral', 'none'; got 'max'", (X, X), {"scale": "max"}),
    (rk.covariance_distance, TypeError, r"mean_weight must be a number; got str", (X, X), {"mean_weight": "1"}),
    (rk.covariance_distance, ValueError, r"mean_weight must be finite and not negative; got -1", (X, X), {"mean_weight": -1}),
    (rk.covariance_distance, ValueError, r"rotation must be .* = \(5, 3\); got \(3, 5\)", (X, Y), {"rotation": torch.ones(3, 5)}),
    (rk.covariance_distance, TypeError, r"rotation must be float64, .*; got torch.int64", (X, Y), {"rotation": torch.ones(5, 3).long()}),
    (rk.covariance_distance, ValueError, r"rotation and teacher must be on the same device", (X, Y), {"rotation": torch.ones(5, 3, device="meta")}),
    (rk.covariance_distance, ValueError, r"rotation\[1\] must be .* = \(5, 3\); got \(3, 5\)", ([X, X], [Y, Y]), {"rotation": [torch.ones(5, 3), torch.ones(3, 5)]}),
    (rk.covariance_distance, ValueError, r"rotation must have one matrix per layer; got 1 for 2", ([X, X], [Y, Y]), {"rotation": [torch.ones(5, 3)]}),
    (rk.cross_covariance, TypeError, r"correction must be an integer; got 0.5", (X, X), {"correction": 0.5}),
    (rk.cross_covariance, ValueError, r"correction must not be negative; got -1", (X, X), {"correction": -1}),
    (rk.cross_covariance, ValueError, r"at least 2 rows .*; got 1", (X[:1], X[:1]), {"correction": 0}),
    (rk.cross_covariance, ValueError, r"at least 9 rows .*; got 8", (X, X), {"correction": 8}),
    (rk.second_moments, ValueError, r"at least 2 rows .*; got 1", (X[:1], X[:1]), {}),
]  # fmt: skip

LOSS = [
    (ValueError, r"measure must be one of 'cka', .*; got 'cca'", {"measure": "cca"}),
    (ValueError, r"reduction must be one of 'mean', 'sum', 'none'; got 'max'", {"reduction": "max"}),
    (ValueError, r"rotation must be one of 'identity', 'learned', 'optimal'; got 'free'", {"rotation": "free"}),
    (ValueError, r"rotation='learned' needs measure='covariance'; measure='cka'", {"rotation": "learned"}),
    (ValueError, r"student_width must be a positive integer .*; got None", {"measure": "covariance", "rotation": "learned"}),
    (ValueError, r"teacher_width must be a positive integer .*; got 0", {"measure": "covariance", "rotation": "learned", "student_width": 3, "teacher_width": 0}),
    (ValueError, r"weight must be finite and not negative; got -1", {"weight": -1}),
    (ValueError, r"weight must be finite and not negative; got inf", {"weight": float("inf")}),
    (TypeError, r"weight must be a number; got bool", {"weight": True}),
    (ValueError, r"scale must be one of", {"scale": "big"}),
    (ValueError, r"mean_weight must be 0.0 for measure='cka', .*; got 1.0", {"mean_weight": 1.0}),
    (ValueError, r"scale must be 'relative' for measure='bures', .*; got 'coral'", {"measure": "bures", "scale": "coral"}),
    (ValueError, r"debiased must be True for measure='procrustes', .*; got False", {"measure": "procrustes", "debiased": False}),
    (ValueError, r"student_width and teacher_width must be None without rotation='learned'; got 3 and None", {"student_width": 3}),
    (ValueError, r"precision must be one of", {"precision": "low"}),
    (ValueError, r"backend must be one of", {"backend": "jax"}),
    (TypeError, r"debiased must be True or False", {"debiased": None}),
]  # fmt: skip


@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("error", "message", "features", "options"), ANY_FUNCTION)
def test_any_function(function, error, message, features, options) -> None:
    options = dict(options)
    if isinstance(options.get("mask"), int | str):
        options["mask"] = ODD_MASKS[options["mask"]]
    with pytest.raises(error, match=message):
        function(*features, **options)


@pytest.mark.parametrize(("function", "error", "message", "features", "options"), ONE_FUNCTION)
def test_one_function(function, error, message, features, options) -> None:
    with pytest.raises(error, match=message):
        function(*features, **options)


@pytest.mark.parametrize(("error", "message", "settings"), LOSS)
def test_loss(error, message, settings) -> None:
    with pytest.raises(error, match=message):
        rk.RIFTLoss(**settings)


def test_environment_variable_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIFT_KERNELS_BACKEND", "numpy")
    with pytest.raises(ValueError, match=r"RIFT_KERNELS_BACKEND must be one of .*; got 'numpy'"):
        rk.linear_cka(X, X)
    monkeypatch.setenv("RIFT_KERNELS_BACKEND", "")
    rk.linear_cka(X, X)
    monkeypatch.setenv("RIFT_KERNELS_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="RIFT_KERNELS_BACKEND='cuda' cannot run"):
        rk.linear_cka(X, X)
    assert float(rk.linear_cka(X, X, backend="eager")) == pytest.approx(1)


def test_too_few_rows_by_mask_under_compile_is_nan() -> None:
    """NaN is returned where reading the mask would make the host wait."""
    compiled = torch.compile(rk.linear_cka, fullgraph=True, backend="aot_eager")
    assert compiled(X, X, mask=THREE_ROWS).isnan()
    assert not compiled(X, X, mask=MASK).isnan()
