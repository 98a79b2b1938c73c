"""Fixtures: the device and the form that tests run with, and torch.empty filled with NaN."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import distributed

from rift_kernels.backends import cuda
from rift_kernels.dispatch import availability, plan
from rift_kernels.trust import decisions, self_test
from tests import as_gpu
from tests.support import emulated

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Triton's interpreter is thousands of times slower than a GPU. It runs only the tests of kernels,
# with the dtypes that matter to a measure and some of the distances.
KERNEL_TESTS = {
    *("test_triton", "test_tensor_cores", "test_measures", "test_numerics", "test_autograd"),
    "test_compile",
}
BOTH = {torch.bfloat16, torch.float32}
FUSED = {"cka": {*BOTH, torch.float16}, "cka biased": BOTH, "covariance": BOTH}
INTERPRETED_DTYPES = {
    **FUSED,
    "coral": {torch.bfloat16},
    "procrustes": {torch.float32},
    "bures": {torch.float32},
}
# The only values that it runs of parameters with these names.
INTERPRETED_VALUES = {
    "distance": (1e-1, 1e-5),
    "factor": (1e-17, 1e17),
    "threads": (1,),
    "programs": (2, 11),
    "which": ("one", "eight", "modest"),
    "related": ("independent",),
}


def is_interpreted(item: pytest.Item) -> bool:
    """Whether the interpreter runs this test: it has time for one of each kind."""
    module = item.module.__name__.split(".")[-1]
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    measure, dtype = parameters.get("measure"), parameters.get("dtype")
    if module == "test_measures" and "case" in parameters:
        if parameters["case"].name == "blocks":
            return measure.name == "cka" and dtype is torch.bfloat16
        return dtype in INTERPRETED_DTYPES.get(measure.name, set())
    # The slowest tests, biased, are left out: they differ from the debiased ones in the head alone.
    is_slow = "threads" in parameters
    is_slow = is_slow or ("distance" in parameters and parameters.get("form") == "gram")
    return (
        module in KERNEL_TESTS
        and not (is_slow and measure is not None and measure.name == "cka biased")
        and item.get_closest_marker("eager_only") is None
        and (measure is None or measure.name in FUSED)
        and (dtype is None or dtype in BOTH)
        and all(parameters.get(name, run[0]) in run for name, run in INTERPRETED_VALUES.items())
        and ("distance" not in parameters or dtype in (None, torch.bfloat16))
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED:
        deselected = [item for item in items if not is_interpreted(item)]
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if is_interpreted(item)]
        selected = {(item.module, item.originalname) for item in items}
        for item in deselected:
            name = item.originalname
            if (
                item.module.__name__ == "tests.backends.test_triton"
                and (item.module, name) not in selected
            ):
                raise pytest.UsageError(f"the interpreter would run no case of {name}")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of the numerical tests: RIFT_TEST_DEVICE, by default the CPU."""
    return torch.device(os.environ.get("RIFT_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session")
def has_kernels(device: torch.device) -> bool:
    """Whether ``backend="auto"`` takes Triton's kernels in these tests."""
    return INTERPRETED or (
        device.type == "cuda" and availability.reason_against("triton", device) is None
    )


@pytest.fixture(scope="session")
def emulated_extension(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """``rift_kernels._C``, emulated on a CPU."""
    return emulated.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch, emulated_extension: ModuleType):
    """Make every call run on this kind of GPU, emulated."""

    def start(gpu: str = "clusters", seed: int = 0, form: str = "gram") -> None:
        major, shared = emulated.GPUS[gpu]
        monkeypatch.setenv("RIFT_EMULATED_MAJOR", major)
        monkeypatch.setenv("RIFT_EMULATED_SHARED", shared)
        monkeypatch.setenv("RIFT_EMULATED_SEED", str(seed))
        name = "sm90" if gpu == "clusters" else "sm80"
        as_gpu.patch_cuda(monkeypatch, name, emulated_extension, 3, form)
        # CPU tensors have no device index; the emulator has two devices.
        monkeypatch.setattr(cuda, "_device", lambda _: 0)

    yield start
    cuda._plan.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def _threads() -> Iterator[None]:
    """Use RIFT_TEST_THREADS threads, which change rounding; one by default.

    Products this small gain nothing from more threads, and are much slower if another job runs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("RIFT_TEST_THREADS", "1")))
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN, so that a read before a write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _backend_from_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the call chooses a backend; in Triton's interpreter, CPU tensors take the kernels.

    Without a self-test, so that wrong kernels fail here instead of being avoided.
    """
    monkeypatch.delenv(plan.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv(self_test.ENVIRONMENT_VARIABLE, "0")
    decisions.forget()
    if INTERPRETED:
        monkeypatch.setattr(plan, "_has_kernels", lambda _: True)
        monkeypatch.setattr(plan, "_warned", True)


@pytest.fixture(autouse=INTERPRETED, scope="session")
def _one_writer() -> Iterator[None]:
    """No two programs, and no two threads of a program, write the same element."""
    from tests.support import one_writer

    with one_writer.watched():
        yield


@pytest.fixture
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for a GPU, in this process."""
    from benchmarks import run, workloads
    from tests.support import stand_in_gpu

    stand_in_gpu.install(monkeypatch.setattr)
    monkeypatch.setattr(run, "PROFILES", workloads.PROFILES)
    with stand_in_gpu.OnCPU():
        yield


@pytest.fixture
def force_form(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make every call take the "gram" or the "covariance" form, regardless of cost."""

    def force(form: str) -> None:
        monkeypatch.setattr(plan, "use_gram", lambda *_: form == "gram")

    return force


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group that contains only this process."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("needs a torch with gloo")
    store = tmp_path_factory.mktemp("store") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
