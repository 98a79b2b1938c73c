"""Products of matrices in float64, and in float32 as three products of bfloat16 halves.

    out = a @ b,  for any strides and one batch axis

Products known to be symmetric compute only the tiles on or above the diagonal: even powers in
Newton-Schulz iterations, and second moments in float64.

Bytes: a tile of each operand per step of the inner loop, the result once (symmetric: twice).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses import FakeTensor

from .device import split
from .tiles import triangle


@triton.jit
def products_kernel(
    a_ptr, b_ptr, out_ptr, m, n, inner,
    stride_ab, stride_am, stride_ak, stride_bb, stride_bk, stride_bn,
    SYMMETRIC: tl.constexpr, DOUBLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns one tile of the result."""
    tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    a_ptr += batch * stride_ab
    b_ptr += batch * stride_bb
    out_ptr += batch * m * n
    if SYMMETRIC:
        block_m, block_n = triangle(tile)
    else:
        blocks_n = tl.cdiv(n, BLOCK_N)
        block_m, block_n = tile // blocks_n, tile % blocks_n
    i = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    j = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    if DOUBLE:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float64)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        a = tl.load(
            a_ptr + i[:, None] * stride_am + k[None, :] * stride_ak,
            mask=(i < m)[:, None] & (k < inner)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            b_ptr + k[:, None] * stride_bk + j[None, :] * stride_bn,
            mask=(k < inner)[:, None] & (j < n)[None, :], other=0.0,
        )  # fmt: skip
        if DOUBLE:
            acc = tl.dot(a.to(tl.float64), b.to(tl.float64), acc, out_dtype=tl.float64)
        else:
            a_high, a_low = split(a)
            b_high, b_low = split(b)
            acc = tl.dot(a_low, b_high, acc)
            acc = tl.dot(a_high, b_low, acc)
            acc = tl.dot(a_high, b_high, acc)
    inside = (i < m)[:, None] & (j < n)[None, :]
    tl.store(out_ptr + i[:, None] * n + j[None, :], acc, mask=inside)
    if SYMMETRIC:
        if block_m != block_n:
            tl.store(out_ptr + j[None, :] * n + i[:, None], acc, mask=inside)


def product(a: Tensor, b: Tensor, *, symmetric: bool = False) -> Tensor:
    """``a @ b`` of (..., M, K) and (..., K, N), in the wider dtype of both."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    if dtype == torch.float64 and not _multiplies_float64(a.device):
        return a @ b
    batch = a.shape[:-2]
    out = torch.empty(*batch, a.shape[-2], b.shape[-1], dtype=dtype, device=a.device)
    if isinstance(out, FakeTensor) or not out.numel():
        return out
    a, b = (t.reshape(-1, *t.shape[-2:]) for t in (a, b))
    block_m, block_n, block_k, warps = _blocks(dtype, out.device.type)
    blocks_m, blocks_n = -(-a.shape[1] // block_m), -(-b.shape[2] // block_n)
    tiles = blocks_m * (blocks_m + 1) // 2 if symmetric else blocks_m * blocks_n
    with torch.cuda.device_of(out):
        products_kernel[(tiles, a.shape[0])](
            a, b, out, a.shape[1], b.shape[2], a.shape[2], *a.stride(), *b.stride(),
            SYMMETRIC=symmetric, DOUBLE=dtype == torch.float64,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=2,
        )  # fmt: skip
    return out


@cache
def _multiplies_float64(device: torch.device) -> bool:
    """Whether triton compiles float64 products for a device: not for sm_100, nor AMD's GPUs."""
    if device.type == "cpu":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (8, 9)


def _blocks(dtype: torch.dtype, device: str) -> tuple[int, int, int, int]:
    """Block sizes and warps. Tiles are square, because symmetric results are a triangle of them."""
    if device == "cpu":
        return 64, 64, 64, 4
    # Deeper blocks run out of registers where sizes are odd.
    return (64, 64, 16, 8 if dtype == torch.float64 else 4)
