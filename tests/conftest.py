"""Fixtures: where tests run, which form they take, and no uninitialised memory that looks fine."""

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
# What concerns the kernels, and what of it their interpreter, thousands of times slower than a GPU,
# goes through: the dtypes that make a difference to a measure, and not every distance.
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
# Of parameters with these names, nothing else.
INTERPRETED_VALUES = {
    "distance": (1e-1, 1e-5),
    "factor": (1e-17, 1e17),
    "threads": (1,),
    "programs": (2, 11),
    "which": ("one", "eight", "modest"),
    "related": ("independent",),
}


def is_interpreted(item: pytest.Item) -> bool:
    """Whether a test is among those that the interpreter has time for: one of each kind."""
    module = item.module.__name__.split(".")[-1]
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    measure, dtype = parameters.get("measure"), parameters.get("dtype")
    if module == "test_measures" and "case" in parameters:
        if parameters["case"].name == "blocks":
            return measure.name == "cka" and dtype is torch.bfloat16
        return dtype in INTERPRETED_DTYPES.get(measure.name, set())
    # The longest ones, biased: they differ from the debiased in the head alone.
    long = "threads" in parameters
    long = long or ("distance" in parameters and parameters.get("form") == "gram")
    return (
        module in KERNEL_TESTS
        and not (long and measure is not None and measure.name == "cka biased")
        and item.get_closest_marker("eager_only") is None
        and (measure is None or measure.name in FUSED)
        and (dtype is None or dtype in BOTH)
        and all(parameters.get(name, kept[0]) in kept for name, kept in INTERPRETED_VALUES.items())
        and ("distance" not in parameters or dtype in (None, torch.bfloat16))
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED:
        left_out = [item for item in items if not is_interpreted(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if is_interpreted(item)]
        kept = {(item.module, item.originalname) for item in items}
        for item in left_out:
            name = item.originalname
            if (
                item.module.__name__ == "tests.backends.test_triton"
                and (item.module, name) not in kept
            ):
                raise pytest.UsageError(f"the interpreter would run no case of {name}")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that the numerical tests run on: RIFT_TEST_DEVICE, default the CPU."""
    return torch.device(os.environ.get("RIFT_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session")
def has_kernels(device: torch.device) -> bool:
    """Whether ``backend="auto"`` takes the Triton kernels in these tests."""
    return INTERPRETED or (
        device.type == "cuda" and availability.reason_against("triton", device) is None
    )


@pytest.fixture(scope="session")
def emulated_extension(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """``rift_kernels._C`` on a CPU."""
    return emulated.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch, emulated_extension: ModuleType):
    """Make every call run on this kind of GPU, emulated."""

    def start(gpu: str = "clusters", seed: int = 0, threads: int = 64, form: str = "gram") -> None:
        major, shared = emulated.GPUS[gpu]
        monkeypatch.setenv("RIFT_EMULATED_MAJOR", major)
        monkeypatch.setenv("RIFT_EMULATED_SHARED", shared)
        monkeypatch.setenv("RIFT_EMULATED_SEED", str(seed))
        monkeypatch.setenv("RIFT_EMULATED_THREADS", str(threads))
        name = "sm90" if gpu == "clusters" else "sm80"
        as_gpu.patch_cuda(monkeypatch, name, emulated_extension, 3, form)
        # CPU tensors have none; the emulator has two.
        monkeypatch.setattr(cuda, "_device", lambda _: 0)

    yield start
    cuda._plan.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def _threads() -> Iterator[None]:
    """RIFT_TEST_THREADS, which change sums; one by default.

    So small products gain nothing from more, and lose much where another job runs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("RIFT_TEST_THREADS", "1")))
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN, so that reading before writing shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _backend_from_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, CPU tensors take the kernels as those on a GPU do.

    Untested: what is wrong with them is to show here, and not to be avoided.
    """
    monkeypatch.delenv(plan.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv(self_test.ENVIRONMENT_VARIABLE, "0")
    decisions.forget()
    if INTERPRETED:
        monkeypatch.setattr(plan, "_has_kernels", lambda _: True)
        monkeypatch.setattr(plan, "_warned", True)


@pytest.fixture(autouse=INTERPRETED, scope="session")
def _one_writer() -> Iterator[None]:
    """No two programs, and no two threads of one, write the same element."""
    from tests.support import one_writer

    with one_writer.watched():
        yield


@pytest.fixture
def force_form(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make every call take the "gram" or the "covariance" form, whatever costs less."""

    def force(form: str) -> None:
        monkeypatch.setattr(plan, "use_gram", lambda *_: form == "gram")

    return force


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("needs a torch with gloo")
    store = tmp_path_factory.mktemp("store") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
