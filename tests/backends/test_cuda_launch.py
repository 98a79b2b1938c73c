"""Launches of the CUDA kernels, emulated: the device of each thread, and CUDA calls that fail."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch

import rift_kernels as rk
from rift_kernels.backends import cuda
from tests.support import cases, executed
from tests.support.emulated import GPUS


@pytest.fixture
def runtime(emulated_extension) -> ctypes.CDLL:
    """The emulated CUDA runtime, which can be asked for the state of the calling thread."""
    return ctypes.CDLL(emulated_extension.__file__)


def in_a_new_thread(function: Callable[[], None]) -> None:
    """Call it in a thread that has made no CUDA call yet, as an autograd thread at first."""
    errors = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


FORMS = {"gram": (70, 24, 24), "covariance": (60, 16, 16)}


@pytest.fixture(params=[(form, gpu) for form in FORMS for gpu in GPUS], ids=str)
def features(request, emulate) -> tuple[torch.Tensor, torch.Tensor]:
    """Features for the kernels of few and of many rows, on Hopper and on other GPUs."""
    form, gpu = request.param
    x, y, _ = cases.Case("", *FORMS[form]).features(torch.bfloat16)
    emulate(gpu, form=form)
    return x, y


def test_a_thread_without_a_device(features, runtime) -> None:
    x, y = features
    expected = cases.value_and_gradients(rk.linear_cka, x, y)

    def run() -> None:
        assert runtime.emulated_device() == -1
        actual = cases.value_and_gradients(rk.linear_cka, x, y)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        assert runtime.emulated_device() == -1

    in_a_new_thread(run)
    student = x.clone().requires_grad_()
    value = rk.linear_cka(student, y)

    def backward() -> None:
        value.backward()
        assert runtime.emulated_device() == -1

    in_a_new_thread(backward)
    assert student.grad is not None


def test_launches_are_on_the_device_of_the_features(features, runtime, monkeypatch) -> None:
    student = features[0].clone().requires_grad_()

    def run() -> None:
        runtime.emulated_enter(0)
        monkeypatch.setattr(cuda, "_device", lambda _: 1)
        value = rk.linear_cka(student, features[1])
        assert runtime.emulated_device_of_last_launch() == 1
        assert runtime.emulated_device() == 0
        monkeypatch.setattr(cuda, "_device", lambda _: 0)
        rk.linear_cka(*features)
        monkeypatch.setattr(cuda, "_device", lambda _: 1)
        value.backward()
        assert runtime.emulated_device_of_last_launch() == 1
        assert runtime.emulated_device() == 0

    in_a_new_thread(run)


def test_no_such_device(features, runtime, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "_device", lambda _: 2)
    text = r"device 2: cuDeviceGet: CUDA_ERROR_INVALID_VALUE \(1\)"
    before = runtime.emulated_device()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=text):
            rk.linear_cka(*features)
    assert runtime.emulated_device() == before


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("cudaFuncSetAttribute", "cudaErrorInvalidValue"),
        ("cudaLaunchKernelEx", "cudaErrorLaunchOutOfResources"),
    ],
)
def test_an_error_is_raised_once_by_the_call_that_failed(
    function, error, features, runtime, monkeypatch
) -> None:
    """It names the kernel and the reason, and is no longer CUDA's last error."""
    # With `auto`, another backend would take over.
    cka = partial(rk.linear_cka, backend="cuda")
    expected = cases.value_and_gradients(cka, *features)
    student = features[0].clone().requires_grad_()
    value = cka(student, features[1])
    text = f"^[a-z_]+(_sm[89]0)?: {function}: {error}: it was told to fail"
    monkeypatch.setenv("RIFT_EMULATED_FAILS", function)
    with pytest.raises(RuntimeError, match=text):
        cka(*features)
    assert runtime.emulated_last_error() == 0
    # The backward of few rows has no need to ask for more shared memory.
    if function == "cudaLaunchKernelEx" or len(student) < 70:
        with pytest.raises(RuntimeError, match=text):
            value.backward(retain_graph=True)
        assert runtime.emulated_last_error() == 0
    monkeypatch.delenv("RIFT_EMULATED_FAILS")
    actual = cases.value_and_gradients(cka, *features)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_plan_that_fails(emulate, emulated_extension, runtime, monkeypatch) -> None:
    emulate()
    monkeypatch.setenv("RIFT_EMULATED_FAILS", "cudaFuncGetAttributes")
    with pytest.raises(RuntimeError, match=r"^cka_small: cudaFuncGetAttributes: .*Invalid"):
        emulated_extension.cka_small_plan(0, 8, 8)
    assert runtime.emulated_last_error() == 0


def test_an_error_of_the_driver_is_named(emulated_extension) -> None:
    """Here, that of a thread without a device, in a call that selects none."""
    call = emulated_extension.CkaLargeCall(
        (4096, 8, 8), (4096, 8, 8), 60, True, True, True, False, True, 4, True
    )

    def backward() -> None:
        emulated_extension.cka_large_backward(call, 0, 4096, 4096, 4096, -1, 0)

    text = r"^backward_sm90: cuTensorMapEncodeTiled: CUDA_ERROR_INVALID_CONTEXT \(201\)$"
    with pytest.raises(RuntimeError, match=text):
        in_a_new_thread(backward)


@pytest.mark.parametrize(
    ("major", "architectures"),
    [("9", "80;90"), ("9", "80"), ("8", "80;90a"), ("10", "80;90a;100a")],
)
def test_empty_hopper_kernels_are_not_launched(
    major, architectures, emulated_extension, monkeypatch
) -> None:
    """They would leave memory unchanged, without an error."""
    monkeypatch.setenv("RIFT_EMULATED_MAJOR", major)
    monkeypatch.setenv("RIFT_EMULATED_ARCHS", architectures)
    side = (4096, 8, 8)
    call = emulated_extension.CkaLargeCall(side, side, 60, True, True, True, False, True, 4, True)
    got = rf"9\.0; got {architectures} and {major}\.0"
    for kernel, function, arguments in (
        ("moments_sm90", "moments", (side, side, 60, 4, True, 4096, 4096)),
        ("moments_sm90", "cka_large_forward", (call, 4096, 4096, 4096)),
        ("backward_sm90", "cka_large_backward", (call, 0, 4096, 4096, 4096)),
    ):
        with pytest.raises(RuntimeError, match=f"^{kernel}: needs .* with 90a .* {got}$"):
            getattr(emulated_extension, function)(*arguments, 0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_launches_are_recorded_by_name(dtype, emulate, emulated_extension) -> None:
    """tests/support/executed.py learns from these names which kernels ran."""
    emulate()
    new_launches = executed.emulator_launches(emulated_extension)
    new_launches()
    features = cases.Case("", 20, 12, 12).features(dtype)
    cases.value_and_gradients(rk.linear_cka, *features[:2])
    assert executed.kernel_names(new_launches()) == {"cka_small", "scale"}
    assert new_launches() == []


def test_kernels_opt_in_to_all_shared_memory(features, runtime) -> None:
    """A launch replayed from a CUDA graph may need more than the latest one."""
    runtime.emulated_least_allowed()
    cases.value_and_gradients(rk.linear_cka, *features)
    assert runtime.emulated_least_allowed() >= 163 * 1024
