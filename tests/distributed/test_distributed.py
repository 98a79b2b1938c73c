"""A batch over 2 and 4 processes, compared with one process that has all of it."""

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
from rift_kernels.measures import row_means
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
    """The outcomes of one process."""
    return {name.removeprefix("all, "): outcome() for name, outcome in ranks.outcomes(0, None)}


@pytest.fixture(scope="module", params=ranks.SIZES)
def together(request, tmp_path_factory) -> list[dict[str, Any]]:
    """The outcomes of each of several processes, started by torchrun."""
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
def test_ranks_agree_with_one_process(together, alone, way, split, check) -> None:
    """Values are bitwise equal on all ranks; gradients, averaged as DDP does, are exact."""
    outcomes = [results[f"{way}, {split}, {check}"] for results in together]
    expected = alone[check]
    value = outcomes[0]["value"]
    for outcome in outcomes[1:]:
        assert torch.equal(outcome["value"], value)
    is_float64 = value.dtype == torch.float64
    tolerance = 1e-6 if is_float64 else 4e-3 if check in HALF else 1e-4
    value_tolerance = dict.fromkeys(("rtol", "atol"), 1e-9 if is_float64 else 1e-5)
    torch.testing.assert_close(value, expected["value"], **value_tolerance)
    for i, gradient in enumerate(expected.get("rows", ())):
        rows = torch.cat([outcome["rows"][i] for outcome in outcomes], -2) / len(together)
        assert cases.relative_error(rows, gradient) < tolerance
    for i, gradient in enumerate(expected.get("parameters", ())):
        for outcome in outcomes:
            assert cases.relative_error(outcome["parameters"][i], gradient) < 1e-6


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
    "too few on all ranks": ("ValueError", "at least 4 rows", "ValueError", "got 3"),
    "after errors": ("", "", "", ""),
}


@pytest.mark.parametrize("check", WRONG)
def test_an_error_on_one_rank_is_raised_on_all(together, check) -> None:
    last_type, last_text, other_type, other_text = WRONG[check]
    *others, last = (results[check] for results in together)
    assert last[0] == last_type
    assert last_text in last[1]
    for other in others:
        assert other[0] == other_type
        assert other_text in other[1]
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
def test_a_missing_rank_raises_instead_of_hanging(instead) -> None:
    port = str(free_port())

    def start(rank: int) -> subprocess.Popen[str]:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", MISSING.format(instead=instead)],
            env={
                **os.environ,
                **address,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "PYTHONPATH": str(ROOT),
            },
            stderr=subprocess.PIPE,
            text=True,
        )

    waiting, missing = start(0), start(1)
    begin = time.monotonic()
    try:
        _, stderr = waiting.communicate(timeout=60)
    finally:
        waiting.kill()
        missing.kill()
        missing.communicate()
    assert waiting.returncode == 1
    assert "RuntimeError: rank 0 of 2 could not exchange" in stderr
    assert "another rank has ended, or has not made this call" in stderr
    assert time.monotonic() - begin < 45


def layer(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> checks.Layers:
    x = torch.empty(rows, width, dtype=dtype)
    return checks.Layers([x], [x], [])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bytes_of_both_ways(dtype) -> None:
    """Gathering moves all other ranks' rows; summing moves blocks of width x width."""
    size, rows, width = 8, 64, 768
    equal = layer(rows, width, dtype)
    gathered = shared_batch.bytes_gathered(equal, [[rows]] * size)
    assert gathered == (size - 1) * rows * 2 * width * dtype.itemsize
    accumulated = 8 if dtype == torch.float64 else 4
    summed = shared_batch.bytes_summed(equal, size)
    assert summed == 2 * (size - 1) * (2 * width**2 + width) * accumulated // size
    # If the widths differ, A and B do not share a matrix.
    other = checks.Layers(equal.students, [torch.empty(rows, 5, dtype=dtype)], [])
    numbers = width**2 + 5 * width + 5**2
    assert shared_batch.bytes_summed(other, size) == 2 * (size - 1) * numbers * accumulated // size
    # Messages are padded to the longest.
    assert shared_batch.bytes_gathered(equal, [[1]] * (size - 1) + [[rows]]) == gathered


def test_group_is_checked() -> None:
    x, y = (t.detach() for t in cases.pair())
    with pytest.raises(TypeError, match=r"group must be None, 'world' or .*; got int"):
        rk.linear_cka(x, y, group=0)
    with pytest.raises(ValueError, match=r"group must be None, 'world' or a .*; got 'all'"):
        rk.linear_cka(x, y, group="all")
    # The same script runs as one process, without torchrun.
    assert torch.equal(rk.linear_cka(x, y, group="world"), rk.linear_cka(x, y))


@pytest.mark.parametrize("way", ranks.WAYS)
def test_a_constant_has_no_variance(together, way) -> None:
    for results in together:
        outcome = results[f"{way}, uneven, cka, no variance"]
        assert float(outcome["value"]) == 0
        assert not outcome["rows"][0].any()


@pytest.mark.usefixtures("one_process")
def test_a_dtensor_is_refused() -> None:
    """Its products would be right, but its sums over rows would be those of a shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    x, y = (t.detach() for t in cases.pair())
    sharded = distribute_tensor(x, init_device_mesh("cpu", (1,)), [Replicate()])
    with pytest.raises(TypeError, match="student must be a plain tensor; got a DTensor"):
        rk.linear_cka(sharded, y)
    assert torch.equal(rk.linear_cka(sharded.to_local(), y), rk.linear_cka(x, y))


@pytest.mark.parametrize("masked", [False, True])
def test_a_mean_far_from_0_is_subtracted_exactly(masked) -> None:
    """A float32 has steps of 0.06 there, which would be left in every row."""
    x = (1e6 + torch.randn(40, 6, generator=torch.Generator().manual_seed(0))).float()
    mask = torch.arange(40) < 30 if masked else None
    rows = x.double()[:30] if masked else x.double()
    (mean,), count, _ = row_means.means_over_ranks([x], mask, None)
    centered = row_means.subtract_mean(x, mean, mask)
    expected = rows - rows.mean(0)
    torch.testing.assert_close(centered[: len(rows)].double(), expected, atol=1e-6, rtol=0)
    assert not centered[len(rows) :].any()
    assert float(count) == len(rows)


@pytest.mark.usefixtures("one_process")
def test_gathered_features_require_the_same_gradients() -> None:
    """Else every rank would compute a frozen teacher's gradient and throw it away."""
    x, y = (t.detach() for t in cases.pair())
    alone = Ranks(torch.distributed.group.WORLD)
    for sides in ((True, False), (False, True), (True, True), (False, False)):
        student, teacher = (
            t.clone().requires_grad_(side) for t, side in zip((x, y), sides, strict=True)
        )
        layers = checks.Layers([student], [teacher], [torch.ones(len(x)) > 0])
        gathered = shared_batch.gather(alone, layers, [[len(x)]])
        assert (gathered.students[0].requires_grad, gathered.teachers[0].requires_grad) == sides
        assert torch.equal(gathered.students[0], x)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("dtype", cases.HALF, ids=str)
def test_autocast_does_not_change_gathered_features(dtype) -> None:
    """Even if they are not in autocast's half precision."""
    x, y = (t.detach().to(dtype) for t in cases.pair())
    alone = Ranks(torch.distributed.group.WORLD)
    for autocast_dtype in cases.HALF:
        with torch.autocast("cpu", dtype=autocast_dtype):
            gathered = shared_batch.gather(alone, checks.Layers([x], [y], []), [[len(x)]])
        assert torch.equal(gathered.students[0], x)
        assert torch.equal(gathered.teachers[0], y)


@pytest.mark.usefixtures("one_process")
def test_a_copy_of_a_loss_shares_its_group() -> None:
    """Averaging models copies them, and a process group cannot be copied."""
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
