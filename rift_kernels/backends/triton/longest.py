"""The rows that are by far the longest, found before moments are summed.

A language model's first token is a thousand times as long as all others. Debiasing subtracts a
row's product with itself, ``||x_i||^4``, which is then nearly all of ``||A||^2``, and nothing of
the other rows survives that difference. So up to LONGEST such rows, S, stay out of moments and
means, which are those of all other rows, R. What S adds is summed over pairs of rows
(covariance_cka_head.py). The unbiased HSIC does not depend on the centre.

If no row is long, later launches compute what they would compute without this one.

Bytes: X and Y once, and 32 rows of them per program; 8 a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Config
from .device import (
    CHUNKS,
    LONG_COUNT,
    LONG_FIELDS,
    LONGEST,
    NO_ROW,
    arrive,
    batch_of,
    features_of,
    first_valid_row,
    layer_of,
    load_features,
    mask_of,
    size,
    valid_rows,
)
from .launch import padded_width, processors
from .layers import Layers
from .row_terms import row_energies

# A long row has more than this many times the mean energy of all shorter rows.
LONG_ENERGY = tl.constexpr(4)
# Energies are about the mean of SAMPLE rows. If a mask leaves fewer than ENOUGH of them, the valid
# ones among ROUNDS * SAMPLE rows take their place, from the first valid row on.
SAMPLE = tl.constexpr(32)
ENOUGH = tl.constexpr(8)
ROUNDS = tl.constexpr(32)
# Rows, or candidates, that are compared at once.
WIDE = tl.constexpr(1024)
# Numbers that each program leaves: the energies of X and Y, and how many rows have them.
TOTALS = tl.constexpr(4)


@triton.jit
def _sample(mask_ptr, n, HAS_MASK: tl.constexpr):
    """A valid row from each of SAMPLE parts, NO_ROW from parts without one. The search begins in
    the middle of a part, because first rows are so often long."""
    part = tl.arange(0, SAMPLE)
    length = tl.maximum(tl.cdiv(n, SAMPLE), 1)
    rows = part * length + length // 2
    if HAS_MASK:
        rows = part * 0 + NO_ROW
        start = n * 0
        while (start < length) & (tl.max(rows, 0) == NO_ROW):
            step = start + tl.arange(0, 32)
            row = part[:, None] * length + ((length // 2 + step) % length)[None, :]
            valid = valid_rows(mask_ptr, row, n, HAS_MASK) & (step < length)[None, :]
            first = tl.min(tl.where(valid, step[None, :], length), 1)
            candidate = part * length + (length // 2 + first) % length
            rows = tl.where((rows == NO_ROW) & (first < length), candidate, rows)
            start += 32
    return rows


@triton.jit
def _centre(
    x_ptr, stride_n, stride_d, mask_ptr, sample, rounds, n, width, stride, out_ptr,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the mean of the valid rows among ``sample`` and, in later rounds, those that follow."""
    for first in range(0, stride, BLOCK):
        column = first + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        count = tl.zeros([SAMPLE], tl.float32)
        for step in range(rounds):
            rows = sample + step * SAMPLE
            valid = valid_rows(mask_ptr, rows, n, HAS_MASK)
            x = load_features(x_ptr, stride_n, stride_d, rows, valid, column, width)
            total += tl.sum(x.to(tl.float32), 0)
            count += valid.to(tl.float32)
        tl.store(out_ptr + column, total / tl.maximum(tl.sum(count, 0), 1))


@triton.jit
def _better(key, row, best, best_row):
    """The larger key and its row, which is the first one if keys are equal."""
    top = tl.max(key, 0)
    top_row = tl.min(tl.where(key == top, row, NO_ROW), 0)
    is_better = (top > best) | ((top == best) & (top_row < best_row))
    return tl.where(is_better, top, best), tl.where(is_better, top_row, best_row)


@triton.jit
def _behind(key, row, last, last_row):
    """Keys that rank behind the last one taken, 0 for all others and for NaN."""
    is_behind = (key < last) | ((key == last) & (row > last_row))
    return tl.where(is_behind, key, 0.0)


@triton.jit
def _store_candidates(energy_ptr, begin, end, out_ptr):
    """Store the rows among ``begin..end`` with most energy, the longest first, then -1."""
    last_row = begin * 0 - 1
    last = last_row.to(tl.float32) + float("inf")
    for slot in range(LONGEST):
        best_row = begin * 0 + NO_ROW
        best = (begin * 0).to(tl.float32)
        for start in range(begin, end, WIDE):
            row = start + tl.arange(0, WIDE)
            energy = tl.load(energy_ptr + row, mask=row < end, other=0.0)
            best, best_row = _better(_behind(energy, row, last, last_row), row, best, best_row)
        last, last_row = best, best_row
        tl.store(out_ptr + slot, tl.where(best > 0, best_row, -1))


@triton.jit
def _choose(
    r_ptr, q_ptr, candidates_ptr, candidates, total_x, total_y, count, longest_ptr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store which candidates are long. The row with the largest share of either side's energy comes
    first, and others follow while they have much of the energy that is left."""
    inverse_x, inverse_y = (1 / total_x).to(tl.float32), (1 / total_y).to(tl.float32)
    most = tl.minimum((count * 0.25).to(tl.int32), LONGEST)
    long_count = most * 0
    last_row = long_count - 1
    last = long_count.to(tl.float32) + float("inf")
    is_long = most > 0
    for slot in range(LONGEST):
        best_row = long_count * 0 + NO_ROW
        best = (long_count * 0).to(tl.float32)
        if is_long:
            for start in range(0, candidates, WIDE):
                i = start + tl.arange(0, WIDE)
                row = tl.load(candidates_ptr + i, mask=i < candidates, other=-1)
                r = tl.load(r_ptr + row, mask=row >= 0, other=0.0)
                q = tl.load(q_ptr + row, mask=row >= 0, other=0.0)
                share = tl.maximum(r * inverse_x, q * inverse_y)
                best, best_row = _better(_behind(share, row, last, last_row), row, best, best_row)
        last, last_row = best, best_row
        exists = best > 0
        r = tl.load(r_ptr + best_row, mask=exists, other=0.0).to(tl.float64)
        q = tl.load(q_ptr + best_row, mask=exists, other=0.0).to(tl.float64)
        total_x -= r
        total_y -= q
        others = count - slot - 1
        stands_out = (r * others > total_x * LONG_ENERGY) | (q * others > total_y * LONG_ENERGY)
        is_long = is_long & exists & stands_out & (slot < most)
        # A chunk that holds several long rows is listed once.
        chunk = best_row // BLOCK_K
        for before in range(slot):
            known = tl.load(longest_ptr + CHUNKS + before)
            chunk = tl.where(known == chunk, -1, chunk)
        tl.store(longest_ptr + slot, tl.where(is_long, best_row, -1))
        tl.store(longest_ptr + CHUNKS + slot, tl.where(is_long, chunk, -1))
        # All threads read what one of them stores.
        tl.debug_barrier()
        long_count += is_long.to(tl.int32)
    tl.store(longest_ptr + LONG_COUNT, long_count)


@triton.jit(do_not_specialize=["stride_xb", "stride_yb", "stride_mb", "max_rows"])
def longest_kernel(
    xs, ys, masks, rows, widths_x, widths_y, strides_xn, strides_xd, strides_yn, strides_yd,
    stride_xb, stride_yb, stride_mb,
    centres_ptr, energies_ptr, totals_ptr, candidates_ptr, longest_ptr, counters_ptr,
    width, max_rows,
    LAYERS: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program owns a run of rows, and the last one to finish compares the longest of all."""
    program = tl.program_id(0)
    entry = tl.program_id(1)
    programs = tl.num_programs(0)
    layer, batch = layer_of(entry, LAYERS), batch_of(entry, LAYERS)
    n, d1, d2 = size(rows, layer), size(widths_x, layer, VECTOR), size(widths_y, layer, VECTOR)
    x_ptr, stride_xn, stride_xd = features_of(
        xs, strides_xn, strides_xd, stride_xb, layer, batch, DTYPE, VECTOR
    )
    y_ptr, stride_yn, stride_yd = features_of(
        ys, strides_yn, strides_yd, stride_yb, layer, batch, DTYPE, VECTOR
    )
    mask_ptr = mask_of(masks, stride_mb, layer, batch, x_ptr, HAS_MASK)
    centre_x = centres_ptr + (entry * programs + program).to(tl.int64) * 2 * width
    centre_y = centre_x + width
    r_ptr = energies_ptr + entry.to(tl.int64) * 2 * max_rows
    q_ptr = r_ptr + max_rows
    totals_ptr += entry * programs * TOTALS
    candidates_ptr += entry * programs * (2 * LONGEST)
    longest_ptr += entry * LONG_FIELDS

    sample = _sample(mask_ptr, n, HAS_MASK)
    rounds = n * 0 + 1
    if HAS_MASK:
        if tl.sum((sample < n).to(tl.int32), 0) < ENOUGH:
            sample = first_valid_row(mask_ptr, n, HAS_MASK) + tl.arange(0, SAMPLE)
            rounds += ROUNDS - 1
    _centre(
        x_ptr, stride_xn, stride_xd, mask_ptr, sample, rounds, n, d1, width, centre_x,
        HAS_MASK, BLOCK,
    )  # fmt: skip
    _centre(
        y_ptr, stride_yn, stride_yd, mask_ptr, sample, rounds, n, d2, width, centre_y,
        HAS_MASK, BLOCK,
    )  # fmt: skip
    # Other threads of this program read what it has just stored, here and below.
    tl.debug_barrier()
    length = tl.cdiv(tl.cdiv(n, programs), BLOCK_R) * BLOCK_R
    begin, end = program * length, tl.minimum(n, (program + 1) * length)
    sum_r = row_energies(
        x_ptr, stride_xn, stride_xd, mask_ptr, mask_ptr, n, d1, centre_x, 1, width, 1.0, 1.0,
        r_ptr, begin, end, HAS_MASK, False, BLOCK, BLOCK_R,
    )  # fmt: skip
    sum_q = row_energies(
        y_ptr, stride_yn, stride_yd, mask_ptr, mask_ptr, n, d2, centre_y, 1, width, 1.0, 1.0,
        q_ptr, begin, end, HAS_MASK, False, BLOCK, BLOCK_R,
    )  # fmt: skip
    tl.debug_barrier()
    out_ptr = candidates_ptr + program * (2 * LONGEST)
    _store_candidates(r_ptr, begin, end, out_ptr)
    _store_candidates(q_ptr, begin, end, out_ptr + LONGEST)
    count = tl.maximum(end - begin, 0)
    if HAS_MASK:
        counts = tl.zeros([WIDE], tl.int32)
        for start in range(begin, end, WIDE):
            row = start + tl.arange(0, WIDE)
            counts += valid_rows(mask_ptr, row, end, HAS_MASK).to(tl.int32)
        count = tl.sum(counts, 0)
    tl.store(totals_ptr + program * TOTALS, sum_r)
    tl.store(totals_ptr + program * TOTALS + 1, sum_q)
    tl.store(totals_ptr + program * TOTALS + 2, count.to(tl.float64))
    if arrive(counters_ptr + entry, programs):
        tl.debug_barrier()
        total_x, total_y, valid_count = sum_r * 0, sum_r * 0, sum_r * 0
        for other in range(programs):
            total_x += tl.load(totals_ptr + other * TOTALS)
            total_y += tl.load(totals_ptr + other * TOTALS + 1)
            valid_count += tl.load(totals_ptr + other * TOTALS + 2)
        _choose(
            r_ptr, q_ptr, candidates_ptr, programs * (2 * LONGEST), total_x, total_y,
            valid_count, longest_ptr, BLOCK_K,
        )  # fmt: skip


def launch(layers: Layers, config: Config, longest: Tensor) -> None:
    """Find the long rows of every layer, whose records ``longest`` receives."""
    entries, width = layers.entries, padded_width(layers, config)
    # Twice as many as run at once, so that runs of rows are short.
    programs = -(-2 * processors(layers.device) // entries)
    programs = min(programs, -(-layers.max_rows // (2 * config.block_r)))
    # New counters, for the price of a small launch; see gram_cka_small.py.
    counters = torch.zeros(entries, dtype=torch.int32, device=layers.device)
    longest_kernel[(programs, entries)](
        *layers.arguments,
        layers.empty(entries * programs * 2 * width), layers.empty(entries * 2 * layers.max_rows),
        layers.empty(entries * programs * TOTALS.value, dtype=torch.float64),
        layers.empty(entries * programs * 2 * LONGEST.value, dtype=torch.int32),
        longest, counters, width, layers.max_rows,
        **layers.feature_options,
        BLOCK=config.block, BLOCK_K=config.block_k, BLOCK_R=config.block_r,
        num_warps=config.head_warps,
    )  # fmt: skip
