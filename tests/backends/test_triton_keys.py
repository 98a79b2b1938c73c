"""How often triton compiles during training, whatever the shapes: counted, without compiling."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

import rift_kernels as rk
from tests.support import triton_compile

BFLOAT16 = torch.bfloat16
WIDTHS = [64 * i for i in range(1, 13)]
ODD_WIDTHS = [63 * i for i in range(1, 13)]


MOST_ROWS, MOST_WIDTH = 6000, 771


@pytest.fixture(autouse=True)
def _untouched_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs, so memory need not be filled."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@cache
def _room(dtype: torch.dtype) -> Tensor:
    return torch.ones(MOST_ROWS * MOST_WIDTH, dtype=dtype)


def _step(
    rows: Sequence[int],
    widths: Sequence[int],
    *,
    masked: bool = False,
    offset: int = 0,
    dtype: torch.dtype = BFLOAT16,
    measure: Callable[..., Tensor] = rk.linear_cka,
) -> None:
    """A loss and its backward for one or more layers, which begin ``offset`` elements apart."""
    features, valid = _room(dtype), _room(torch.bool)
    students, teachers, masks = [], [], []
    for i, (n, d) in enumerate(zip(rows, widths, strict=True)):
        x = features[i * offset :][: n * d].view(n, d)
        students.append(x.detach().requires_grad_())
        teachers.append(x)
        masks.append(valid[i * offset :][:n])
    if len(rows) > 1:
        values = measure(students, teachers, mask=masks if masked else None)
    else:
        values = measure(students[0], teachers[0], mask=masks[0] if masked else None)
    torch.autograd.grad(values.sum(), students)


def compilations(
    steps: int, least: int, most: int, widths: Sequence[int], target: str = "sm90", **options
) -> int:
    """Kernels compiled in a training with ``least`` to ``most`` rows, different in each layer."""
    draw = random.Random(0)
    with triton_compile.recording(target, triton_compile.Counter) as compiled:
        for _ in range(steps):
            _step([draw.randint(least, most) for _ in widths], widths, **options)
    return len(compiled)


@pytest.mark.parametrize("target", ["sm80", "sm90"])
@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("least", "most", "bound"),
    [
        pytest.param(4, 128, 4, id="pooled features"),
        pytest.param(129, 1500, 4, id="some tokens"),
        pytest.param(1600, 6000, 4, id="all tokens"),
        pytest.param(4, 6000, 12, id="any number of rows"),
    ],
)
def test_rows_vary(least, most, bound, dtype, target) -> None:
    """As with sequences of any length, and with the shorter last batch of an epoch."""
    assert compilations(200, least, most, [768], target, dtype=dtype) <= bound


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("widths", [WIDTHS, ODD_WIDTHS], ids=["even", "odd"])
def test_layers_vary(widths, masked) -> None:
    """Both forms at once, with different layers in either at every step."""
    assert compilations(100, 600, 1600, widths, masked=masked) <= 8
    assert compilations(100, 4, 6000, widths, masked=masked) <= 12


def test_parts_of_one_tensor() -> None:
    """Layers and masks begin at any address."""
    assert compilations(100, 600, 1500, [771] * 12, masked=True, offset=1) <= 8


def test_distances() -> None:
    assert compilations(100, 400, 6000, [768] * 4, measure=rk.covariance_distance) <= 3


def test_more_layers_than_a_launch_takes() -> None:
    """Compile time and parameters grow with the layers of a launch, so their number is limited."""
    for layers in (24, 25, 100):
        assert compilations(2, 300, 900, [256] * layers) <= 8


def test_plain_sizes_compile_many_kernels() -> None:
    """Plain sizes would make a kernel for every pattern of multiples of 16."""
    from rift_kernels.backends.triton import layers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "encoded", tuple)
        assert compilations(6, 600, 1600, WIDTHS) > 20
