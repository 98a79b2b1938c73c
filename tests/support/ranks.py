"""The processes of test_distributed.py: each computes with its rows of the same batches.

    torchrun --nproc-per-node 2 -m tests.support.ranks FOLDER

writes the results of each rank to FOLDER/<rank>.pt. ``outcomes`` without splits computes the
results of one process with all rows.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import rift_kernels as rk
from rift_kernels.dispatch import shared_batch
from tests.support import cases

SIZES = (2, 4)
WAYS = ("gathered", "summed")
ROWS, WIDTH = 40, 6
# The rows of each rank: equal, unequal, and some ranks without any.
SPLITS = {
    2: {"even": (20, 20), "uneven": (33, 7), "empty": (0, 40)},
    4: {"even": (10, 10, 10, 10), "uneven": (3, 17, 19, 1), "empty": (20, 0, 20, 0)},
}
MEASURES = [m for m in cases.MEASURES if "unscaled" not in m.name]
Outcome = dict[str, Any]


@contextmanager
def way(name: str) -> Iterator[None]:
    """Gather features or sum moments as named, and not as the bytes decide."""
    original = shared_batch.bytes_summed
    shared_batch.bytes_summed = lambda *_: float("inf") if name == "gathered" else -1.0
    try:
        yield
    finally:
        shared_batch.bytes_summed = original


def rows_of(rank: int, x: Tensor, split: tuple[int, ...] | None) -> Tensor:
    """The rows of a rank; all rows without a split."""
    return x if split is None else x.split(split, -2)[rank]


def mask_of(rank: int, mask: Tensor, split: tuple[int, ...] | None) -> Tensor:
    return rows_of(rank, mask.unsqueeze(-1), split).squeeze(-1)


def batch(dtype: torch.dtype = torch.float64, axes: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    x, y, _ = cases.Case("", ROWS, WIDTH, WIDTH, batch=axes, offset=3.0).features(dtype)
    return x, y


def long(features: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Features with some rows, on different ranks, far longer than the others."""
    for side in features:
        for row, factor in ((0, 3000), (1, -2000), (18, 50), (21, 3000), (39, 1000)):
            side[row] *= factor
    return features


def valid() -> Tensor:
    return torch.rand(ROWS, generator=torch.Generator().manual_seed(3)) < 0.7


Check = tuple[str, Callable[[], Outcome]]


def outcomes(rank: int, splits: dict[str, tuple[int, ...]] | None) -> Iterator[Check]:
    """The name and function of every check of a rank's rows; without splits, of all rows."""
    group = None if splits is None else "world"
    for name, split in (splits or {"all": None}).items():
        of_rows = partial(values_and_gradients, split=split, rank=rank)
        for measure in MEASURES:
            yield f"{name}, {measure.name}", partial(of_rows, measure, batch())
        for measure in (cases.CKA, cases.PROCRUSTES, cases.BURES, cases.CORAL):
            masked = partial(of_rows, measure, batch(), mask=valid())
            yield f"{name}, {measure.name}, masked", masked
        for dtype in (torch.float32, *cases.HALF):
            yield f"{name}, cka, {dtype}", partial(of_rows, cases.CKA, batch(dtype))
        far = tuple(side + 3e3 for side in batch(torch.float32))
        yield f"{name}, cka, far from 0", partial(of_rows, cases.CKA, far)
        yield f"{name}, cka, long rows", partial(of_rows, cases.CKA, long(batch()))
        yield (
            f"{name}, cka, long rows, float32",
            partial(of_rows, cases.CKA, long(batch(torch.float32)), mask=valid()),
        )
        # The rounding of a mean must not count as variance.
        constant = (torch.full((ROWS, WIDTH), 0.1), batch(torch.float32)[1])
        yield f"{name}, cka, no variance", partial(of_rows, cases.CKA, constant)
        yield f"{name}, cka, leading axes", partial(of_rows, cases.CKA, batch(axes=(2, 3)))
        yield f"{name}, cka, empty batch", partial(of_rows, cases.CKA, batch(axes=(0, 3)))
        for check in (layers, rotated, moments):
            yield f"{name}, {check.__name__}", partial(check, split, rank, group)
        for kind in MODELS:
            yield f"{name}, model, {kind}", partial(model_gradients, kind, split, rank, group)
        sharded = partial(model_gradients, sharded=group is not None)
        yield f"{name}, FSDP2", partial(sharded, "cka", split, rank, group)
        for kind, is_sharded in (("DDP", False), ("FSDP2", group is not None)):
            regularized = partial(regularized_gradients, sharded=is_sharded)
            yield f"{name}, regulariser, {kind}", partial(regularized, split, rank, group)


def values_and_gradients(
    measure: cases.Measure,
    features: tuple[Tensor, Tensor],
    *,
    split: tuple[int, ...] | None,
    rank: int,
    mask: Tensor | None = None,
) -> Outcome:
    x, y = (rows_of(rank, side, split).contiguous() for side in features)
    options: dict[str, Any] = {} if split is None else {"group": dist.group.WORLD}
    if mask is not None:
        x = x.masked_fill(~mask_of(rank, mask, split).unsqueeze(-1), float("nan"))
        options["mask"] = mask_of(rank, mask, split)
    value, grad_x, grad_y = cases.value_and_gradients(measure, x, y, **options)
    return {"value": value, "rows": [grad_x, grad_y]}


def layers(split: tuple[int, ...] | None, rank: int, group: str | None) -> Outcome:
    """Layers that differ in width and in the number of rows on a rank."""
    x, y = batch()
    students = [x, x[:, :4] ** 2, x[: ROWS // 2]]
    teachers = [y, y[:, :3], y[: ROWS // 2]]
    if split is not None:
        half = tuple(n // 2 for n in split)
        half = (*half[:-1], ROWS // 2 - sum(half[:-1]))
        splits = (split, split, half)
        students = [rows_of(rank, s, n) for s, n in zip(students, splits, strict=True)]
        teachers = [rows_of(rank, t, n) for t, n in zip(teachers, splits, strict=True)]
    students = [s.detach().requires_grad_() for s in students]
    values = rk.linear_cka(students, teachers, group=group)
    (values * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    return {"value": values.detach(), "rows": [s.grad for s in students]}


def moments(split: tuple[int, ...] | None, rank: int, group: str | None) -> Outcome:
    x, y = (rows_of(rank, side, split).requires_grad_() for side in batch())
    result = rk.second_moments(x, y, group=group)
    cross = rk.cross_covariance(x, y, group=group)
    sum((t.double() ** 2).sum() for t in (*result[1:], cross)).backward()
    return {
        "value": torch.cat([t.detach().flatten() for t in (*result, cross)]),
        "rows": [x.grad, y.grad],
    }


def rotated(split: tuple[int, ...] | None, rank: int, group: str | None) -> Outcome:
    """A rotation that DDP does not average has the same gradient on all ranks."""
    x, y = (rows_of(rank, side, split).requires_grad_() for side in batch())
    q = cases.rotation(WIDTH).requires_grad_()
    value = rk.covariance_distance(x, y, rotation=q, mean_weight=0.3, group=group)
    value.backward()
    return {"value": value.detach(), "rows": [x.grad, y.grad], "parameters": [q.grad]}


MODELS = ("cka", "covariance, learned", "covariance, optimal", "covariance, statistics", "bures")


class Model(nn.Module):
    """A layer and the loss of its output; DDP averages the gradients of both."""

    def __init__(self, kind: str, group: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, WIDTH).double()
        measure, _, variant = kind.partition(", ")
        options: dict[str, Any] = {}
        if variant == "learned":
            options = {"rotation": "learned", "student_width": WIDTH, "teacher_width": WIDTH}
        elif variant == "optimal":
            options = {"rotation": "optimal"}
        self.loss = rk.RIFTLoss(measure, group=group, **options).double()
        self.stored = None
        if variant == "statistics":
            self.stored = rk.TeacherStatistics(WIDTH)
            self.stored.update(batch()[1])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.layer(x).tanh(), y if self.stored is None else self.stored)


def model_gradients(
    kind: str,
    split: tuple[int, ...] | None,
    rank: int,
    group: str | None,
    sharded: bool = False,
) -> Outcome:
    """The gradients of the parameters as an optimiser gets them."""
    model: nn.Module = Model(kind, group)
    plain = model
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    elif group is not None:
        model = nn.parallel.DistributedDataParallel(model)
    x, y = (rows_of(rank, side, split) for side in batch())
    value = model(x, y)
    value.backward()
    grads = [p.grad.full_tensor() if sharded else p.grad for p in plain.parameters()]
    return {"value": value.detach(), "parameters": grads}


def regularized_gradients(
    split: tuple[int, ...] | None, rank: int, group: str | None, sharded: bool = False
) -> Outcome:
    """The gradients of a regulariser that calls the teacher as it saw the student called."""
    torch.manual_seed(0)
    student: nn.Module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double()
    plain, teacher = student, copy.deepcopy(student)
    with torch.no_grad():
        teacher[0].weight.add_(0.3 * torch.randn(WIDTH, WIDTH, dtype=torch.float64))
    if sharded:
        fully_shard(student, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    elif group is not None:
        student = nn.parallel.DistributedDataParallel(student)
    rift = rk.RIFTRegularizer(student, teacher, layers="1", group=group)
    output = student(rows_of(rank, batch()[0], split))
    with torch.no_grad():
        student(batch()[1])
    value = rift()
    (value + 0 * output.sum()).backward()
    grads = [p.grad.full_tensor() if sharded else p.grad for p in plain.parameters()]
    return {"value": value.detach(), "parameters": grads}


def errors(rank: int) -> Iterator[tuple[str, Any]]:
    """The type and message of each rank's error if one rank is wrong."""
    x, y = (side[:10] for side in batch(torch.float32))

    def error_of(call: Callable[[], object]) -> tuple[str, str]:
        try:
            call()
        except Exception as error:
            return type(error).__name__, str(error)
        return "", ""

    last = rank == dist.get_world_size() - 1
    group = {"group": "world"}
    yield "dtype of one", error_of(lambda: rk.linear_cka(x.int() if last else x, y, **group))
    yield "rows of one", error_of(lambda: rk.linear_cka(x[:3] if last else x, y, **group))
    yield "width differs", error_of(lambda: rk.linear_cka(x[:, :4] if last else x, y, **group))
    yield "settings differ", error_of(lambda: rk.linear_cka(x, y, debiased=last, **group))
    yield (
        "masks differ",
        error_of(lambda: rk.linear_cka(x, y, mask=torch.ones(10) > 0 if last else None, **group)),
    )
    yield (
        "gradients differ",
        error_of(lambda: rk.linear_cka(x.clone().requires_grad_(last), y, **group)),
    )
    wanted = x.clone().requires_grad_()
    with torch.set_grad_enabled(not last):
        yield "one without grad", error_of(lambda: rk.linear_cka(wanted, y, **group))
    turned = torch.eye(WIDTH) if last else None
    yield (
        "rotations differ",
        error_of(lambda: rk.covariance_distance(x, y, rotation=turned, **group)),
    )
    correction = 5 if last else 1
    yield (
        "corrections differ",
        error_of(lambda: rk.cross_covariance(x, y, correction=correction, **group)),
    )
    few = x[: 3 if rank == 0 else 0], y[: 3 if rank == 0 else 0]
    yield "too few on all ranks", error_of(lambda: rk.linear_cka(*few, **group))
    yield "after errors", error_of(lambda: rk.linear_cka(x, y, **group))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    results: dict[str, Any] = {}
    for name in WAYS:
        with way(name):
            for check, outcome in outcomes(rank, SPLITS[size]):
                results[f"{name}, {check}"] = outcome()
    results.update(errors(rank))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
