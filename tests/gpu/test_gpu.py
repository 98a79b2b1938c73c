"""Tests that need a GPU, with the kernels that ``auto`` chooses and with Triton's alone."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import rift_kernels as rk
from rift_kernels.backends import cuda
from rift_kernels.dispatch import plan
from tests.support import cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True, params=["cuda and triton", "triton"])
def preferred(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = tuple(kind for kind in plan.PREFERRED if kind[0] in request.param)
    monkeypatch.setattr(plan, "PREFERRED", kinds)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


def pair(
    rows: int, width: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    x, y, _ = cases.Case("", rows, width, width).features(dtype)
    return x.to(device).requires_grad_(), y.to(device)


@pytest.mark.parametrize("rows", [40, 140, 400])
def test_graph_replays(rows, device) -> None:
    """A captured loss and backward repeats bitwise a thousand times, and follows its inputs."""
    x, y = pair(rows, 64, device)
    function = rk.RIFTLoss("cka")

    def step() -> tuple[Tensor, Tensor]:
        loss = function(x, y)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    expected = [t.clone() for t in step()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for replay in range(1000):
        graph.replay()
        if replay % 100 == 0:
            for got, wanted in zip(results, expected, strict=True):
                assert torch.equal(got, wanted)
    with torch.no_grad():
        x.copy_(x + y)
    expected = step()
    graph.replay()
    for got, wanted in zip(results, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("rows", [40, 140, 400])
def test_reduce_overhead(rows, device) -> None:
    """torch.compile captures a graph, and raises if others keep memory of its pool."""
    x, y = pair(rows, 600, device)
    expected = cases.value_and_gradients(rk.linear_cka, x, y)
    compiled = torch.compile(rk.linear_cka, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        actual = cases.value_and_gradients(compiled, x, y)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("rows", [40, 400])
def test_two_streams_at_once(rows, device) -> None:
    pairs = [pair(rows, 64, device), pair(rows, 64, device, torch.float32)]
    expected = [rk.linear_cka(x, y).detach() for x, y in pairs]
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for (x, y), stream, values in zip(pairs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                values.append(rk.linear_cka(x, y).detach())
    torch.cuda.synchronize()
    for values, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(value, wanted) for value in values)


def test_peak_memory(device) -> None:
    """Beside features and gradient there are partial tiles and planes, but no copies."""
    x, y = pair(65536, 512, device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rk.linear_cka(x, y).backward()
    extra = torch.cuda.max_memory_allocated() - before - x.grad.nbytes
    assert extra < x.nbytes / 2


@pytest.mark.parametrize("pooling", ["mean", "tokens", "last"])
def test_a_step_of_a_regulariser_does_not_wait(pooling, device) -> None:
    """From the second step on; the first also looks for constant features."""
    student = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).to(device)
    valid = torch.arange(5, device=device) < torch.arange(1, 41, device=device)[:, None]
    settings = {"layers": ["0", "2"], "pooling": pooling, "token_mask": lambda _: valid}
    rift = rk.RIFTRegularizer(student, copy.deepcopy(student).bfloat16(), **settings)
    x = torch.randn(40, 5, 64, device=device)
    try:
        for mode in ("default", "error", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            student(x)
            rift().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert rift.step == 3


def test_layers_share_a_launch(device) -> None:
    """Lists and batches agree, also with more layers than one launch takes."""
    x, y, _ = cases.Case("", 40, 64, 64, batch=(30,)).features(torch.bfloat16)
    x, y = x.to(device), y.to(device)
    batch, grads, _ = cases.value_and_gradients(rk.linear_cka, x, y)
    students = [layer.clone().requires_grad_() for layer in x]
    values = rk.linear_cka(students, list(y))
    incoming = torch.rand(batch.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    values.backward(incoming.to(device))
    torch.testing.assert_close(values, batch, atol=1e-6, rtol=0)
    for student, grad in zip(students, grads, strict=True):
        assert cases.relative_error(student.grad, grad) <= 4e-3


@pytest.fixture(params=["of this GPU", "of any GPU"])
def _kernels(request, device, monkeypatch) -> None:
    """The kernels for Hopper, if this is one, or those for any GPU."""
    if request.param == "of any GPU":
        if not cuda._is_hopper(device):
            pytest.skip("needs a Hopper GPU, which has other kernels")
        monkeypatch.setattr(cuda, "_is_hopper", lambda _: False)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("shape", [(300, 64), (1000, 136), (4096, 768), (12608, 768)], ids=str)
def test_many_rows_in_cuda(shape, debiased, device) -> None:
    """An explicit choice: ``auto`` does not take these kernels."""
    y = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(0))
    noise = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(1))
    x, y = (y + 0.1 * noise + 1).bfloat16(), y.bfloat16()
    cka = partial(rk.linear_cka, debiased=debiased)
    expected = cases.value_and_gradients(cka, x.double(), y.double(), backend="eager")
    first = cases.value_and_gradients(cka, x, y, backend="cuda")
    assert abs(float(first[0]) - float(expected[0])) <= 1e-5
    for got, wanted in zip(first[1:], expected[1:], strict=True):
        assert cases.relative_error(got, wanted) <= 4e-3
    for _ in range(20):
        repeat = cases.value_and_gradients(cka, x, y, backend="cuda")
        assert all(torch.equal(a, b) for a, b in zip(repeat, first, strict=True))
