"""A batch over 2 and 4 processes against one process that has all of it."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rift_kernels as rk
from rift_kernels.dispatch import checks, shared_batch
from rift_kernels.dispatch.ranks import Ranks
from rift_kernels.measures import centering
from tests.support import cases, ranks

ROOT = Path(__file__).parents[2]
CHECKS = [name.removeprefix("all, ") for name, _ in ranks.outcomes(0, None)]
HALF = [f"cka, {dtype}" for dtype in cases.HALF]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process finds."""
    return {name.removeprefix("all, "): found() for name, found in ranks.outcomes(0, None)}


@pytest.fixture(scope="module", params=ranks.SIZES)
def together(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of several processes finds, started by torchrun."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(request.param)]
    command += ["--master-port", str(free_port()), "-m", "tests.support.ranks", str(folder)]
    result = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("way", ranks.WAYS)
@pytest.mark.parametrize("split", ["even", "uneven", "empty"])
@pytest.mark.parametrize("check", CHECKS)
def test_is_what_one_process_finds(together, alone, way, split, check) -> None:
    """Values bitwise equal on all ranks; gradients, as DDP averages them, those of all rows."""
    found = [of_rank[f"{way}, {split}, {check}"] for of_rank in together]
    expected = alone[check]
    for other in found[1:]:
        assert torch.equal(other["value"], found[0]["value"])
    wide = expected["value"].dtype == torch.float64
    tolerance = 1e-6 if wide else 4e-3 if check in HALF else 1e-4
    value_tolerance = {"rtol": 1e-9, "atol": 1e-9} if wide else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found[0]["value"], expected["value"], **value_tolerance)
    for i, gradient in enumerate(expected.get("rows", ())):
        rows = torch.cat([of_rank["rows"][i] for of_rank in found], -2) / len(together)
        assert cases.relative_error(rows, gradient) < tolerance
    for i, gradient in enumerate(expected.get("parameters", ())):
        for of_rank in found:
            assert cases.relative_error(of_rank["parameters"][i], gradient) < 1e-6


WRONG = {
    "dtype of one": (
        "TypeError",
        "student must be float64",
        "RuntimeError",
        "was given wrong input",
    ),
    "rows of one": ("ValueError", "same number of rows", "RuntimeError", "same number of rows"),
    "width differs": ("ValueError", "agree on shapes", "ValueError", "agree on shapes"),
    "settings differ": (
        "ValueError",
        "agree on the settings",
        "ValueError",
        "agree on the settings",
    ),
    "masks differ": ("ValueError", "the number of masks", "ValueError", "the number of masks"),
    "one without grad": ("ValueError", "need gradients", "ValueError", "need gradients"),
    "rotations differ": (
        "ValueError",
        "agree on the settings",
        "ValueError",
        "agree on the settings",
    ),
    "corrections differ": (
        "ValueError",
        "agree on the settings",
        "ValueError",
        "agree on the settings",
    ),
    "gradients differ": ("ValueError", "need gradients", "ValueError", "need gradients"),
    "too few in all": ("ValueError", "at least 4 rows", "ValueError", "got 3"),
    "after errors": ("", "", "", ""),
}


@pytest.mark.parametrize("check", WRONG)
def test_an_error_of_one_is_told_to_all(together, check) -> None:
    own_type, own_words, other_type, other_words = WRONG[check]
    *others, own = (of_rank[check] for of_rank in together)
    assert own[0] == own_type
    assert own_words in own[1]
    for other in others:
        assert other[0] == other_type
        assert other_words in other[1]
    if other_type == "RuntimeError":
        assert f"rank {len(together) - 1} of the group" in others[0][1]


MISSING = """
import datetime, sys, time, torch, torch.distributed as dist, rift_kernels as rk
limit = datetime.timedelta(seconds=6)
dist.init_process_group("gloo", timeout=limit)
x = torch.randn(8, 4)
rk.linear_cka(x, x, group="world")
if dist.get_rank() == 1:
    {instead}
rk.linear_cka(x, x, group="world")
"""


@pytest.mark.parametrize(
    "instead", ["import os; os._exit(1)", "time.sleep(60)"], ids=["ended", "never calls"]
)
def test_a_missing_rank_is_an_error_and_no_hang(instead) -> None:
    port = str(free_port())

    def start(rank: int) -> subprocess.Popen[str]:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", MISSING.format(instead=instead)],
            env={
                **os.environ,
                **where,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "PYTHONPATH": str(ROOT),
            },
            stderr=subprocess.PIPE,
            text=True,
        )

    left, missing = start(0), start(1)
    begun = time.monotonic()
    try:
        _, words = left.communicate(timeout=60)
    finally:
        left.kill()
        missing.kill()
        missing.communicate()
    assert left.returncode == 1
    assert "RuntimeError: rank 0 of 2 could not exchange" in words
    assert "another rank has ended, or has not made this call" in words
    assert time.monotonic() - begun < 45


def given(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> checks.Layers:
    x = torch.empty(rows, width, dtype=dtype)
    return checks.Layers([x], [x], [])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bytes_say_which_way(dtype) -> None:
    """Gathering costs with the rows of all others, summing with the square of the width."""
    size, rows, width = 8, 64, 768
    one = given(rows, width, dtype)
    gathered = shared_batch.bytes_gathered(one, [[rows]] * size)
    assert gathered == (size - 1) * rows * 2 * width * dtype.itemsize
    accumulated = 8 if dtype == torch.float64 else 4
    summed = shared_batch.bytes_summed(one, size)
    assert summed == 2 * (size - 1) * (2 * width**2 + width) * accumulated // size
    # Of other widths, A and B do not make one matrix.
    other = checks.Layers(one.students, [torch.empty(rows, 5, dtype=dtype)], [])
    numbers = width**2 + 5 * width + 5**2
    assert shared_batch.bytes_summed(other, size) == 2 * (size - 1) * numbers * accumulated // size
    # What is sent is as long as the longest: rows are padded.
    assert shared_batch.bytes_gathered(one, [[1]] * (size - 1) + [[rows]]) == gathered


def test_group_is_checked() -> None:
    x, y = (t.detach() for t in cases.pair())
    with pytest.raises(TypeError, match=r"group must be None, 'world' or .*; got int"):
        rk.linear_cka(x, y, group=0)
    with pytest.raises(ValueError, match=r"group must be None, 'world' or a .*; got 'all'"):
        rk.linear_cka(x, y, group="all")
    # One process, not started by torchrun: the same script runs.
    assert torch.equal(rk.linear_cka(x, y, group="world"), rk.linear_cka(x, y))


@pytest.mark.parametrize("way", ranks.WAYS)
def test_a_constant_has_no_variance(together, way) -> None:
    for of_rank in together:
        found = of_rank[f"{way}, uneven, cka, no variance"]
        assert float(found["value"]) == 0
        assert not found["rows"][0].any()


@pytest.mark.usefixtures("one_process")
def test_a_dtensor_is_refused() -> None:
    """Its products would be right, and its sums over rows those of a shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    x, y = (t.detach() for t in cases.pair())
    spread = distribute_tensor(x, init_device_mesh("cpu", (1,)), [Replicate()])
    with pytest.raises(TypeError, match="student must be a plain tensor; got a DTensor"):
        rk.linear_cka(spread, y)
    assert torch.equal(rk.linear_cka(spread.to_local(), y), rk.linear_cka(x, y))


@pytest.mark.parametrize("masked", [False, True])
def test_a_mean_far_from_0_is_taken_off_exactly(masked) -> None:
    """Where a float32 has steps of 0.06, as much would be left in every row."""
    x = (1e6 + torch.randn(40, 6, generator=torch.Generator().manual_seed(0))).float()
    mask = torch.arange(40) < 30 if masked else None
    rows = x.double()[:30] if masked else x.double()
    (mean,), count, _ = centering.mean_over_ranks([x], mask, centering.Alone.total)
    centered = centering.subtract(x, mean, mask)
    expected = rows - rows.mean(0)
    torch.testing.assert_close(centered[: len(rows)].double(), expected, atol=1e-6, rtol=0)
    assert not centered[len(rows) :].any()
    assert float(count) == len(rows)


@pytest.mark.usefixtures("one_process")
def test_gathered_features_want_the_gradients_that_were_wanted() -> None:
    """Else a frozen teacher's gradient would be computed on every rank, and thrown away."""
    x, y = (t.detach() for t in cases.pair())
    alone = Ranks(torch.distributed.group.WORLD)
    for sides in ((True, False), (False, True), (True, True), (False, False)):
        own = [t.clone().requires_grad_(side) for t, side in zip((x, y), sides, strict=True)]
        layers = checks.Layers([own[0]], [own[1]], [torch.ones(len(x)) > 0])
        everything = shared_batch.gather(alone, layers, [[len(x)]])
        assert (everything.students[0].requires_grad, everything.teachers[0].requires_grad) == sides
        assert torch.equal(everything.students[0], x)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("dtype", cases.HALF, ids=str)
def test_features_are_gathered_as_they_are_under_autocast(dtype) -> None:
    """Also in a half precision that is not autocast's own."""
    x, y = (t.detach().to(dtype) for t in cases.pair())
    alone = Ranks(torch.distributed.group.WORLD)
    for own in cases.HALF:
        with torch.autocast("cpu", dtype=own):
            everything = shared_batch.gather(alone, checks.Layers([x], [y], []), [[len(x)]])
        assert torch.equal(everything.students[0], x)
        assert torch.equal(everything.teachers[0], y)


@pytest.mark.usefixtures("one_process")
def test_a_copy_of_a_loss_shares_its_group() -> None:
    """An average of models copies them, and no process group can be copied."""
    group = torch.distributed.group.WORLD
    loss = rk.RIFTLoss("cka", group=group, weight=rk.AdaptiveWeight(0.9))
    copied, nested = copy.deepcopy([loss, nn.Sequential(loss)])
    assert copied.group is group
    assert nested[0] is copied
    copied.weight.value.zero_()
    assert float(loss.weight.value) == 1.0
    x, y = cases.pair()
    assert torch.equal(copied.distances(x, y), loss.distances(x, y))


def test_no_check_hides_another() -> None:
    assert len(CHECKS) == len(set(CHECKS))
