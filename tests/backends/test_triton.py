"""What only the Triton kernels do: launches, schedules, halves, descriptors.

Runs on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1), which takes CPU tensors.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import rift_kernels as rk
from rift_kernels.dispatch import autograd, plan
from rift_kernels.dispatch.plan import Plan
from tests.support import cases

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip(
        "needs a GPU, or TRITON_INTERPRET=1 for Triton's interpreter", allow_module_level=True
    )

from rift_kernels.backends import triton as kernels  # noqa: E402
from rift_kernels.backends.triton import (  # noqa: E402
    blocks,
    config,
    covariance_backward,
    covariance_cka,
    covariance_distance,
    covariance_form,
    covariance_saved,
    gram_backward,
    gram_cka,
    gram_cka_small,
    launch,
    layers,
    longest,
    products,
    raw_moments,
)
from rift_kernels.backends.triton.device import arrive  # noqa: E402

KERNELS = [
    (longest, "longest_kernel"),
    (raw_moments, "raw_moments_kernel"),
    (covariance_cka, "covariance_cka_kernel"),
    (covariance_distance, "covariance_distance_kernel"),
    (blocks, "blocks_kernel"),
    (covariance_backward, "covariance_backward_kernel"),
    (gram_cka, "gram_cka_kernel"),
    (gram_cka_small, "gram_cka_small_kernel"),
    (gram_backward, "gram_backward_kernel"),
    (products, "products_kernel"),
]
BFLOAT16 = torch.bfloat16
BIASED = partial(rk.linear_cka, debiased=False)


@pytest.fixture(autouse=True)
def _triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernels, even where ``auto`` would take the CUDA kernels."""
    kinds = tuple(kind for kind in plan.PREFERRED if kind[0] == "triton")
    monkeypatch.setattr(plan, "PREFERRED", kinds)


class _Counted:
    """A kernel that records its launches."""

    def __init__(self, kernel, name: str, seen: list[str]) -> None:
        self._kernel, self._name, self._seen = kernel, name, seen

    def __getitem__(self, grid):
        self._seen.append(self._name)
        return self._kernel[grid]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels launched so far, in order."""
    seen: list[str] = []
    for module, name in KERNELS:
        counted = _Counted(getattr(module, name), name.removesuffix("_kernel"), seen)
        monkeypatch.setattr(module, name, counted)
    return seen


def pair(
    rows: int, width: int, device: torch.device, dtype: torch.dtype = BFLOAT16
) -> tuple[Tensor, Tensor]:
    x, y, _ = cases.Case("", rows, width, width).features(dtype)
    return x.to(device).requires_grad_(), y.to(device)


def backends_agree(function: Callable[..., Tensor], x: Tensor, y: Tensor, **more) -> None:
    """Value and gradients of the kernels against the eager backend in float64."""
    wide = (x.detach().double(), y.detach().double())
    expected = cases.value_and_gradients(function, *wide, backend="eager", **more)
    actual = cases.value_and_gradients(function, x, y, **more)
    torch.testing.assert_close(actual[0].double(), expected[0], atol=2e-5, rtol=2e-5)
    for got, wanted in zip(actual[1:], expected[1:], strict=True):
        assert cases.relative_error(got, wanted) <= cases.GRADIENT_TOLERANCE[got.dtype]


CKA = ["covariance_cka", "covariance_backward"]
DISTANCE = ["covariance_distance", "covariance_backward"]


@pytest.mark.parametrize("count", [1, 12])
@pytest.mark.parametrize(
    ("function", "rows", "dtype", "expected"),
    [
        (rk.linear_cka, 40, BFLOAT16, ["longest", "raw_moments", *CKA]),
        (rk.linear_cka, 40, torch.float32, ["longest", "raw_moments", "raw_moments", *CKA]),
        (BIASED, 40, BFLOAT16, ["raw_moments", *CKA]),
        (rk.covariance_distance, 40, BFLOAT16, ["raw_moments", *DISTANCE]),
        (rk.linear_cka, 8, BFLOAT16, ["gram_cka_small", "gram_backward"]),
        (rk.linear_cka, 8, torch.float32, ["gram_cka_small", "gram_backward"]),
    ],
)
def test_launches(function, rows, dtype, expected, count, launches, device) -> None:
    """Any number of layers takes as few launches as one."""
    x, y = pair(rows, 16, device, dtype)
    function([x] * count, [y] * count).sum().backward()
    assert launches == expected


def test_launches_of_many_rows_in_gram_form(launches, device) -> None:
    x, y = pair(140, 80, device)
    rk.linear_cka(x, y).backward()
    assert launches == ["raw_moments", "gram_cka", "gram_backward"]


def test_a_frozen_teacher_has_no_backward(launches, device) -> None:
    x, y = pair(40, 16, device)
    rk.linear_cka(x, y.requires_grad_()).backward()
    assert launches.count("covariance_backward") == 2


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_layers_of_different_shapes(debiased, masked, device) -> None:
    """Both forms at once, and masks of different lengths."""
    shapes = [(40, 12, 12), (70, 33, 20), (9, 24, 24), (40, 5, 40), (30, 40, 16)]
    students, teachers, masks = [], [], []
    for i, (rows, d1, d2) in enumerate(shapes):
        x, y, mask = cases.Case("", rows, d1, d2, masked=True).features(BFLOAT16, seed=i)
        students.append(x.to(device).requires_grad_())
        teachers.append(y.to(device).requires_grad_())
        masks.append(mask.to(device))
    mask = masks if masked else None
    values = rk.linear_cka(students, teachers, mask=mask, debiased=debiased)
    weights = torch.arange(1.0, 6.0, device=device)
    (values * weights).sum().backward()
    for i, (x, y) in enumerate(zip(students, teachers, strict=True)):
        a, b = (t.detach().double().requires_grad_() for t in (x, y))
        own_mask = mask[i] if masked else None
        expected = rk.linear_cka(a, b, mask=own_mask, debiased=debiased, backend="eager")
        (expected * (i + 1)).backward()
        assert float(values[i]) == pytest.approx(float(expected), abs=1e-5)
        assert cases.relative_error(x.grad, a.grad) <= 4e-3
        assert cases.relative_error(y.grad, b.grad) <= 4e-3


@pytest.mark.parametrize("masked", [True, False])
def test_more_layers_than_a_launch_takes(masked, launches, monkeypatch, device) -> None:
    """Each of the launches has an even share of the layers, in either form."""
    monkeypatch.setattr(kernels, "MAX_LAYERS", 2)
    shapes = [(20, 6, 6), (7, 8, 8), (12, 9, 16), (16, 3, 3), (8, 24, 24)]
    pairs = [cases.Case("", *s, masked=True).features(BFLOAT16, i) for i, s in enumerate(shapes)]
    students, teachers, masks = ([t.to(device) for t in side] for side in zip(*pairs, strict=True))
    xs = [x.requires_grad_() for x in students]
    values = rk.linear_cka(xs, teachers, mask=masks if masked else None)
    grads = torch.autograd.grad(values.sum(), xs)
    assert launches.count("gram_cka_small") == 2
    assert launches.count("covariance_cka") == 1
    monkeypatch.setattr(kernels, "MAX_LAYERS", 24)
    together = rk.linear_cka(xs, teachers, mask=masks if masked else None)
    assert torch.equal(values, together)
    expected = torch.autograd.grad(together.sum(), xs)
    for got, wanted in zip(grads, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("programs", [1, 2, 5, 11])
@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32], ids=str)
def test_any_number_of_programs(programs, dtype, form, force_form, monkeypatch, device) -> None:
    """Tiles that one program finishes, and tiles that several share."""
    force_form(form)
    monkeypatch.setattr(raw_moments, "processors", lambda _: programs)
    x, y = pair(150, 70, device, dtype)
    backends_agree(rk.linear_cka, x, y)


def long_rows(x: Tensor, y: Tensor, mask: Tensor | None = None) -> tuple[list[int], list[int]]:
    """Rows that a launch finds, the longest first, and the chunks of 32 rows that hold them."""
    masks = [] if mask is None else [mask]
    packed = layers.pack([x.detach()], [y], masks)
    record = torch.full((longest.LONG_FIELDS.value,), -7, dtype=torch.int32, device=x.device)
    longest.launch(packed, config.configuration(packed, "covariance"), record)
    count = int(record[8])
    assert record[count:8].tolist() == [-1] * (8 - count)
    return record[:count].tolist(), [chunk for chunk in record[16:24].tolist() if chunk >= 0]


def test_which_rows_are_long(device) -> None:
    x, y = pair(200, 24, device)
    assert long_rows(x, y) == ([], [])
    x, y = x.detach().clone(), y.clone()
    x[170] *= 50
    y[3] *= 20
    x[20], y[20] = 9 * x[5], 9 * y[5]
    assert long_rows(x, y) == ([170, 3, 20], [5, 0])
    # Each is compared with what is left without the longer ones.
    both = x[:100].clone(), y[:100].clone()
    for side, row in zip(both, (7, 31), strict=True):
        side[row] *= 3000
        side[row + 1] *= 7
    assert sorted(long_rows(*both)[0]) == [3, 7, 8, 20, 31, 32]
    # The first rows win among equal ones, and masked rows never count, however long.
    x[40:60] = 3000 * x[0]
    mask = torch.ones(200, dtype=torch.bool, device=device)
    mask[[3, 20, 40, 41, 42, 43, 44]] = False
    assert long_rows(x, y, mask)[0] == list(range(45, 53))
    # At most a quarter of the rows are long, and none if energies cannot be compared.
    mask[:] = False
    mask[100:106] = mask[[170, 3]] = True
    assert long_rows(x, y, mask)[0] == [170, 3]
    mask[105] = False
    assert long_rows(x, y, mask)[0] == [170]
    x[101] = float("nan")
    assert long_rows(x, y, mask)[0] == []


@pytest.mark.parametrize("block_r", [16, 1024])
def test_rows_are_compared_about_a_sample_alone(block_r, monkeypatch, device) -> None:
    """Whatever lies behind the sample in memory: here zeros, as if row 0 were in it again."""
    scratch: list[Tensor] = []

    def empty(self: layers.Layers, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        memory = torch.zeros(size[0] + 4096, dtype=dtype, device=self.device)
        scratch.append(memory[: size[0]])
        return scratch[-1]

    x = torch.ones(200, 16, dtype=BFLOAT16, device=device)
    x[0] = 1000
    packed = layers.pack([x], [x], [])
    chosen = config.configuration(packed, "covariance")._replace(block_r=block_r)
    monkeypatch.setattr(layers.Layers, "empty", empty)
    longest.launch(
        packed, chosen, torch.zeros(longest.LONG_FIELDS.value, dtype=torch.int32).to(x.device)
    )
    centres = scratch[1].view(-1, launch.padded_width(packed, chosen))
    assert (centres[:, :16] == 1).all()


def test_equally_long_rows_that_are_compared_separately(monkeypatch, device) -> None:
    """One of two programs compares 1,024 rows at once, and the first row still comes first."""
    monkeypatch.setattr(longest, "processors", lambda _: 1)
    x, y = (t.detach().clone() for t in pair(2500, 24, device))
    x[[5, 1200, 2490]] = 50 * x[0]
    assert long_rows(x, y)[0] == [5, 1200, 2490]


@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
@pytest.mark.parametrize("rows", [[0, 5, 70, 199], list(range(60, 68))], ids=len)
def test_long_rows_stay_out_of_any_chunk(rows, loads, force_form, monkeypatch, device) -> None:
    """Several blocks of columns. The copy engine cannot mask rows, and leaves out whole chunks."""
    force_form("covariance")
    monkeypatch.setattr(launch, "_descriptor_rows", lambda _: 1 if loads == "descriptors" else 1e9)
    x, y = (t.detach().clone() for t in pair(200, 72, device))
    for side in (x, y):
        side[rows] *= 3000
    wide = (x.double(), y.double())
    expected = cases.value_and_gradients(rk.linear_cka, *wide, backend="eager")
    actual = cases.value_and_gradients(rk.linear_cka, x, y)
    assert float(actual[0]) == pytest.approx(float(expected[0]), abs=2e-6)
    for got, wanted in zip(actual[1:], expected[1:], strict=True):
        assert cases.relative_error(got, wanted) <= 4e-3


@pytest.mark.parametrize("gram", [False, True])
def test_descriptors_load_what_pointers_load(gram, monkeypatch, device) -> None:
    if not INTERPRETED and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0, for the copy engine's descriptors")
    monkeypatch.setattr(plan, "use_gram", lambda *_: gram)
    x, y = pair(200, 72, device)
    monkeypatch.setattr(launch, "_descriptor_rows", lambda _: float("inf"))
    expected = cases.value_and_gradients(rk.linear_cka, x, y)
    descriptors = []
    original = launch.descriptors_of

    def recorded(*arguments):
        descriptors.append(original(*arguments))
        return descriptors[-1]

    monkeypatch.setattr(launch, "_descriptor_rows", lambda _: 1)
    for module in (raw_moments, covariance_backward):
        monkeypatch.setattr(module, "descriptors_of", recorded)
    actual = cases.value_and_gradients(rk.linear_cka, x, y)
    assert descriptors
    assert all(descriptors)
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("kind", cases.OVERLAPS)
def test_rows_that_overlap(kind, gram, monkeypatch, device) -> None:
    """Their stride is less than their width, so the copy engine cannot load them."""
    monkeypatch.setattr(plan, "use_gram", lambda *_: gram)
    monkeypatch.setattr(launch, "_descriptor_rows", lambda _: 1)
    _, y = pair(140, 40, device)
    x = cases.overlapping(kind, 140, 40, BFLOAT16)
    x = x._base.to(device).as_strided(x.shape, x.stride())
    packed = layers.pack([x], [y], [])
    assert launch.descriptors_of(packed, (packed.x,), (32, 32)) is None
    backends_agree(rk.linear_cka, x, y)
    backends_agree(rk.linear_cka, y, x)


@pytest.mark.parametrize("change", ["width", "offset", "mask", "dtype", "stride", "rows"])
def test_descriptors_only_where_the_copy_engine_can(change, monkeypatch, device) -> None:
    monkeypatch.setattr(launch, "_descriptor_rows", lambda _: 1)
    x = torch.zeros(40, 64, dtype=BFLOAT16, device=device)
    masks = []
    if change == "width":
        x = torch.zeros(40, 63, dtype=BFLOAT16, device=device)
    elif change == "offset":
        x = torch.zeros(40 * 64 + 1, dtype=BFLOAT16, device=device)[1:].view(40, 64)
    elif change == "mask":
        masks = [torch.ones(40, dtype=torch.bool, device=device)]
    elif change == "dtype":
        x = x.float()
    elif change == "rows":
        x = x[:1].expand(40, 64)
    else:
        x = torch.zeros(64, 40, dtype=BFLOAT16, device=device).T
    packed = layers.pack([x], [x], masks)
    assert launch.descriptors_of(packed, (packed.x,), (32, 32)) is None


def is_full(x: Tensor, y: Tensor, high: bool = True) -> bool:
    """Whether the student's backward multiplies the low halves as well."""
    _, saved = covariance_form.cka_fwd(layers.pack([x], [y], []), True, False, True, False, high)
    return bool(saved[0][int(covariance_saved.LOW_HALVES.value)])


@pytest.mark.parametrize("gap", [1e-2, 1e-4])
def test_low_halves_are_multiplied_where_they_matter(gap, device) -> None:
    """Not for a student near its teacher, but for a rotated one; never with precision="medium"."""
    near, rotated = (
        [t.to(device, BFLOAT16) for t in cases.near_pair(256, 32, gap, turn)]
        for turn in (False, True)
    )
    assert not is_full(*near)
    assert is_full(*rotated)
    assert not is_full(*rotated, high=False)
    # A scaled student is near as well.
    assert not is_full(near[0] * 1.5, near[1])


def test_medium_precision_is_cheaper_and_worse(force_form, device) -> None:
    force_form("covariance")
    x, y = (t.to(device, BFLOAT16) for t in cases.near_pair(256, 32, 1e-4, rotated=True))
    wide = (x.double(), y.double())
    _, expected, _ = cases.value_and_gradients(rk.linear_cka, *wide, backend="eager")
    _, high, _ = cases.value_and_gradients(rk.linear_cka, x, y)
    _, medium, _ = cases.value_and_gradients(rk.linear_cka, x, y, precision="medium")
    assert cases.relative_error(high, expected) <= 4e-3
    assert 1e-2 <= cases.relative_error(medium, expected) <= 1


@pytest.mark.parametrize("form", cases.FORMS)
@cases.by_name([cases.CKA, cases.COVARIANCE, cases.PROCRUSTES])
def test_dtypes_may_differ(measure, form, force_form, device) -> None:
    force_form(form)
    x, y, _ = cases.Case("", 40, 12, 12).features(torch.float32)
    backends_agree(measure, x.to(device, BFLOAT16), y.to(device))


@pytest.mark.parametrize("form", cases.FORMS)
def test_offsets_beyond_32_bits(form, force_form, device) -> None:
    """Rows lie 2^30 elements apart, and only a few pages are ever touched."""
    force_form(form)
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        False,
    )
    try:
        room = torch.empty(5 * 2**30, dtype=BFLOAT16, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    x, y = (t.detach() for t in pair(5, 8, device))
    far = room.as_strided((5, 8), (2**30, 1))
    far.copy_(x)
    expected = cases.value_and_gradients(rk.linear_cka, x, y)
    actual = cases.value_and_gradients(rk.linear_cka, far, y)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_features_changed_in_place_raise(device) -> None:
    """The kernels keep no copies of the features, but autograd notices a change and raises."""
    x, y = pair(40, 16, device)
    features = x * 1
    value = rk.linear_cka(features, y)
    features += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_too_large_a_batch(monkeypatch, device) -> None:
    monkeypatch.setattr(layers, "MAX_ENTRIES", 2)
    x, y, _ = cases.Case("", 8, 4, 4, batch=(3,)).features(BFLOAT16)
    with pytest.raises(ValueError, match="batches of up to 2; got 3"):
        rk.linear_cka(x.to(device), y.to(device))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_blocks_of_products_are_square(kind, dtype) -> None:
    """Symmetric products compute only a triangle of tiles."""
    block_m, block_n, *_ = products._blocks(dtype, kind)
    assert block_m == block_n


def test_float64_is_refused_and_left_to_eager(device) -> None:
    x, y = (t.detach().double() for t in pair(20, 4, device))
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run: .*float64"):
        rk.linear_cka(x, y, backend="triton")
    assert plan.choose_backend("auto", device, (x.dtype, y.dtype)) == "eager"


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, Triton's interpreter")
def test_the_interpreter_still_needs_repair() -> None:
    """Remove backends/triton/interpreter.py once this fails."""
    code = """
import torch, triton, triton.language as tl
@triton.jit
def kernel(a, out):
    i = tl.arange(0, 16)
    x = tl.load(a + i[:, None] * 16 + i[None, :])
    tl.store(out + i[:, None] * 16 + i[None, :], tl.dot(x, x))
a = torch.randn(16, 16).bfloat16()
out = torch.empty(16, 16)
kernel[(1,)](a, out)
print(bool((out - a.float() @ a.float()).abs().max() > 1))
"""
    # From a file, because triton reads a kernel's source.
    result = subprocess.run(
        [sys.executable, "-c", f"import runpy, tempfile, os\nf = tempfile.NamedTemporaryFile('w', "
         f"suffix='.py')\nf.write({code!r})\nf.flush()\nrunpy.run_path(f.name)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.strip() == "True"


@triton.jit
def arrivals_kernel(counter_ptr, last_ptr, PROGRAMS: tl.constexpr):
    program = tl.program_id(0)
    tl.store(last_ptr + program, arrive(counter_ptr, PROGRAMS).to(tl.int32))


def test_arrivals_are_counted_anew_in_each_launch(device) -> None:
    counter, last = (torch.zeros(n, dtype=torch.int32, device=device) for n in (1, 3))
    for _ in range(2):
        arrivals_kernel[(3,)](counter, last, 3)
        assert last.sum() == 1
        assert counter == 0


class _OneRank:
    """One of two ranks, where the other one has no rows."""

    size, rank = 2, 0

    @staticmethod
    def exchange(own: Tensor) -> Tensor:
        return torch.stack([own, torch.full_like(own, -2.0)])

    @staticmethod
    def total(*tensors: Tensor | None) -> Callable[[], tuple[Tensor | None, ...]]:
        return lambda: tensors

    blocks = total


# Not fused, in covariance form.
SUMMED = Plan("triton", (False,))


@pytest.mark.parametrize("measure", [cases.CKA, cases.COVARIANCE], ids=lambda m: m.name)
@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32], ids=str)
def test_moments_that_ranks_sum(measure, dtype, device) -> None:
    """The gradient is multiplied by the number of ranks."""
    settings = {"cka": (True, False), "covariance": ("relative", 0.0)}[measure.name]
    call = autograd.Call(measure.name, settings, SUMMED, "highest", _OneRank())
    x, y, mask = cases.Case("", 50, 20, 20, masked=True).features(dtype)

    def summed(x: Tensor, y: Tensor) -> Tensor:
        return autograd.measure(call, [x], [y], [mask.to(device)])

    value, grad_x, grad_y = cases.value_and_gradients(summed, x.to(device), y.to(device))
    wide = (x.double(), y.double())
    expected, *gradients = cases.value_and_gradients(measure.reference, *wide, mask=mask)
    assert abs(float(value) - float(expected)) < cases.VALUE_TOLERANCE[dtype]
    for actual, wanted in zip((grad_x, grad_y), gradients, strict=True):
        assert cases.relative_error(actual / 2, wanted) < cases.GRADIENT_TOLERANCE[dtype]


def test_a_rank_without_rows(device) -> None:
    call = autograd.Call("cka", (True, False), SUMMED, "highest", _OneRank())
    x = torch.empty(0, 20, device=device, requires_grad=True)
    value = autograd.measure(call, [x], [x.detach()], [])
    value.backward()
    assert value.isnan()
    assert x.grad.shape == (0, 20)
