"""Statistics of two processes, merged by gloo, equal those of one process with all data."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import rift_kernels as rk
from tests.features.test_statistics import PARTS, assert_same, gathered, normal

WORLD = 2
TIMEOUT = 60  # seconds; it takes a few
ROOT = Path(rk.__file__).parents[1]

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(),
    reason="needs a torch with gloo",
)


def shards(kind: str) -> list[torch.Tensor]:
    """The rows of each process."""
    x = normal(50, 6, seed=2) + 1e3
    return list(x.tensor_split([{"uneven": 37, "one is empty": 0, "one row": 1}[kind]]))


def images() -> list[torch.Tensor]:
    return list(normal(12, 3, seed=4).float().split(4))


def worker(rank: int, folder: Path) -> None:
    """Everything that the processes do together; the results go into a file."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    result = {"merged": {}, "collected": {}, "errors": {}}
    for kind in ("uneven", "one is empty", "one row"):
        for decay in (1.0, 0.5):
            statistics = gathered(shards(kind)[rank], decay=decay)
            statistics.all_reduce_()
            result["merged"][kind, decay] = statistics
    result["merged"]["nothing"] = rk.TeacherStatistics(6)
    result["merged"]["nothing"].all_reduce_()
    nan = gathered(shards("uneven")[rank] * (float("nan") if rank else 1))
    nan.all_reduce_()
    result["merged"]["nan"] = nan
    first = distributed.new_group([0])
    for name, call in {
        "width": lambda: rk.TeacherStatistics(3 + rank).all_reduce_(),
        "decay": lambda: rk.TeacherStatistics(3, decay=0.5 + rank / 4).all_reduce_(),
        "group": lambda: rk.TeacherStatistics(3).all_reduce_(first),
        "layers": lambda: collect(nn.Linear(3, 3 + rank), images()),
        "no batches": lambda: collect(nn.Linear(3, 3), []),
    }.items():
        result["errors"][name] = None
        try:
            call()
        except (RuntimeError, ValueError) as error:
            result["errors"][name] = f"{type(error).__name__}: {error}"
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    for kind, batches in (("shards", images()[rank::WORLD]), ("empty", images() * (1 - rank))):
        path = folder / f"{kind} {rank}"
        with contextlib.suppress(InterruptedError):
            collect(model, interrupted(batches), path=path)
        for run in ("first", "complete"):
            result["collected"][kind, run] = collect(model, batches, path=path)[""]
    torch.save(result, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def collect(model: nn.Module, batches, **options) -> dict[str, rk.TeacherStatistics]:
    options |= {"layers": "", "progress": False, "save_every": 1}
    return rk.collect_teacher_statistics(model, batches, group="world", **options)


def interrupted(batches):
    """One batch, after which both processes stop."""
    yield from batches[:1]
    raise InterruptedError


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The results of each process."""
    pytest.importorskip("safetensors", reason="needs safetensors")
    folder = tmp_path_factory.mktemp("gloo")
    code = "import sys, pathlib; from tests.distributed.test_statistics_distributed import worker; "
    code += "worker(int(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["uneven", "one is empty", "one row"])
def test_merged_statistics_are_those_of_one_process(kind, decay, results) -> None:
    """With decay, each process makes one update, so all rows weigh the same."""
    first, second = (result["merged"][kind, decay] for result in results)
    assert_same(first, second)
    assert torch.equal(first.scatter, first.scatter.T)
    expected = gathered(torch.cat(shards(kind)))
    assert torch.equal(first.count, expected.count)
    # Two sums of 50 rows, each with up to 50 rounding errors.
    torch.testing.assert_close(first.mean, expected.mean, rtol=2 * 50 * 2**-53, atol=0)
    # Float64's rounding, times offset over deviation.
    torch.testing.assert_close(first.scatter, expected.scatter, rtol=1e-11, atol=1e-9)


def test_nothing_and_nan(results) -> None:
    for result in results:
        assert_same(result["merged"]["nothing"], rk.TeacherStatistics(6))
        nan = result["merged"]["nan"]
        assert float(nan.count) == 50
        assert nan.mean.isnan().all()
        assert nan.scatter.isnan().all()


def test_errors_are_the_same_everywhere(results) -> None:
    first, second = (result["errors"] for result in results)
    expected = {
        "width": "ValueError: width must be the same on every process; got [3.0, 4.0]",
        "decay": "ValueError: decay must be the same on every process; got [0.5, 0.75]",
        "layers": "ValueError: layers and their widths must be the same on every process; "
        "got [{'': 3}, {'': 4}]",
        "no batches": "ValueError: dataloader must give at least one process a batch; "
        "got none on all",
    }
    assert first == {**expected, "group": None}
    assert second == {
        **expected,
        "group": "RuntimeError: group must contain this process; got one without it",
    }


@pytest.mark.parametrize("kind", ["shards", "empty"])
def test_collected_in_parts(kind, results) -> None:
    """Resumed after an interruption, and read once complete: each file has its process's part."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    expected = rk.collect_teacher_statistics(model, images(), layers="", progress=False)[""]
    for run in ("first", "complete"):
        first, second = (result["collected"][kind, run] for result in results)
        assert_same(first, second)
        assert torch.equal(first.count, expected.count)
        torch.testing.assert_close(first.mean, expected.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(first.scatter, expected.scatter, rtol=1e-12, atol=1e-12)


def test_no_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"need a process group: call torch\.distributed\.init"):
        rk.TeacherStatistics(3).all_reduce_()


def test_every_part_is_merged() -> None:
    """These tests compare all entries of the statistics."""
    assert set(rk.TeacherStatistics(3).state_dict()) == set(PARTS)
