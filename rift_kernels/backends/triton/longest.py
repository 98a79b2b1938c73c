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
# Rows that are compared at once, and the most programs, the longest of whose rows are compared.
WIDE = tl.constexpr(1024)
# Numbers that each program leaves: the energies of X and Y, and how many rows have them.
TOTALS = tl.constexpr(3)


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
def _store_centre(
    x_ptr, stride_n, stride_d, mask_ptr, sample_ptr, rounds, n, width, stride, out_ptr,
    HAS_MASK: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store the mean of the valid rows among the sample and, in later rounds, those that follow."""
    for first in range(0, stride, WIDE):
        column = first + tl.arange(0, WIDE)
        total = tl.zeros([WIDE], tl.float32)
        count = tl.zeros([ROWS], tl.float32)
        for step in range(rounds):
            for start in range(0, SAMPLE, ROWS):
                rows = tl.load(sample_ptr + start + tl.arange(0, ROWS)) + step * SAMPLE
                valid = valid_rows(mask_ptr, rows, n, HAS_MASK)
                x = load_features(x_ptr, stride_n, stride_d, rows, valid, column, width)
                total += tl.sum(x.to(tl.float32), 0)
                count += valid.to(tl.float32)
        mean = total / tl.maximum(tl.sum(count, 0), 1)
        tl.store(out_ptr + column, mean, mask=column < stride)


@triton.jit
def _longer(energy, row, best, best_row):
    """Element by element, the row with more energy, the earlier one if they have the same."""
    is_longer = energy > best
    return tl.where(is_longer, energy, best), tl.where(is_longer, row, best_row)


@triton.jit
def _first_longest(energy, row):
    """The largest energy and its row, the first one if energies are equal."""
    top = tl.max(energy, 0)
    return top, tl.min(tl.where(energy == top, row, NO_ROW), 0)


@triton.jit
def _energies(
    x_ptr, stride_n, stride_d, mask_ptr, width, centre_ptr, out_ptr, begin, end,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Store energies of the rows ``begin..end``. Return their sum, the largest and its row."""
    total = tl.zeros([BLOCK_R], tl.float64)
    best = tl.zeros([BLOCK_R], tl.float32)
    best_row = tl.arange(0, BLOCK_R) * 0 + NO_ROW
    for start in range(begin, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        valid = valid_rows(mask_ptr, row, end, HAS_MASK)
        energy = row_energies(
            x_ptr, stride_n, stride_d, row, valid, width, centre_ptr, 1.0, BLOCK, BLOCK_R
        )
        tl.store(out_ptr + row, energy, mask=row < end)
        total += energy.to(tl.float64)
        best, best_row = _longer(energy, row, best, best_row)
    top, top_row = _first_longest(best, best_row)
    return tl.sum(total, 0), top, top_row


@triton.jit
def _longest_of_run(energy_ptr, begin, end, longest_ptr, taken):
    """The largest of the energies ``begin..end`` and its row, without the first ``taken`` long
    rows."""
    best = tl.zeros([WIDE], tl.float32)
    best_row = tl.arange(0, WIDE) * 0 + NO_ROW
    for start in range(begin, end, WIDE):
        row = start + tl.arange(0, WIDE)
        energy = tl.load(energy_ptr + row, mask=row < end, other=0.0)
        for slot in range(taken):
            energy = tl.where(row == tl.load(longest_ptr + slot), 0.0, energy)
        best, best_row = _longer(energy, row, best, best_row)
    return _first_longest(best, best_row)


@triton.jit
def _choose(
    r_ptr, q_ptr, tops_ptr, top_rows_ptr, programs, length, n, total_x, total_y, count,
    longest_ptr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store which rows are long. The row with the largest share of either side's energy comes
    first, and others follow while they have much of the energy that is left."""
    inverse_x, inverse_y = (1 / total_x).to(tl.float32), (1 / total_y).to(tl.float32)
    most = tl.minimum((count * 0.25).to(tl.int32), LONGEST)
    # With NaN or Inf, energies cannot be compared.
    most = tl.where(total_x + total_y < float("inf"), most, 0)
    program = tl.arange(0, WIDE)
    exists = program < programs
    r = tl.load(tops_ptr + program, mask=exists, other=0.0)
    q = tl.load(tops_ptr + programs + program, mask=exists, other=0.0)
    r_row = tl.load(top_rows_ptr + program, mask=exists, other=NO_ROW)
    q_row = tl.load(top_rows_ptr + programs + program, mask=exists, other=NO_ROW)
    slots = tl.arange(0, LONGEST)
    chunks = slots * 0 - 1
    slot = most * 0
    goes_on = most > 0
    while goes_on:
        share, row = _longer(q * inverse_y, q_row, r * 0, r_row * 0 + NO_ROW)
        share_x = r * inverse_x
        row = tl.where((share_x == share) & (r_row < row), r_row, row)
        share, row = _longer(share_x, r_row, share, row)
        best, best_row = _first_longest(share, row)
        is_row = best > 0
        energy_x = tl.load(r_ptr + best_row, mask=is_row, other=0.0).to(tl.float64)
        energy_y = tl.load(q_ptr + best_row, mask=is_row, other=0.0).to(tl.float64)
        total_x -= energy_x
        total_y -= energy_y
        others = count - slot - 1
        stands_out = energy_x * others > total_x * LONG_ENERGY
        stands_out = stands_out | (energy_y * others > total_y * LONG_ENERGY)
        goes_on = is_row & stands_out
        if goes_on:
            tl.store(longest_ptr + slot, best_row)
            # All threads read what one of them stores.
            tl.debug_barrier()
            # A chunk that holds several long rows is listed once.
            chunk = best_row // BLOCK_K
            is_known = tl.max((chunks == chunk).to(tl.int32), 0) > 0
            chunks = tl.where((slots == slot) & (is_known == 0), chunk, chunks)
            slot += 1
            goes_on = slot < most
            owner = best_row // length
            begin, end = owner * length, tl.minimum(n, (owner + 1) * length)
            top, top_row = _longest_of_run(r_ptr, begin, end, longest_ptr, slot)
            r, r_row = (
                tl.where(program == owner, top, r),
                tl.where(program == owner, top_row, r_row),
            )
            top, top_row = _longest_of_run(q_ptr, begin, end, longest_ptr, slot)
            q, q_row = (
                tl.where(program == owner, top, q),
                tl.where(program == owner, top_row, q_row),
            )
    tl.store(longest_ptr + slots, -1, mask=slots >= slot)
    tl.store(longest_ptr + CHUNKS + slots, chunks)
    tl.store(longest_ptr + LONG_COUNT, slot)


@triton.jit(do_not_specialize=["stride_xb", "stride_yb", "stride_mb", "max_rows"])
def longest_kernel(
    xs, ys, masks, rows, widths_x, widths_y, strides_xn, strides_xd, strides_yn, strides_yd,
    stride_xb, stride_yb, stride_mb,
    samples_ptr, centres_ptr, energies_ptr, totals_ptr, tops_ptr, top_rows_ptr, longest_ptr,
    counters_ptr,
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
    tops_ptr += entry * programs * 2
    top_rows_ptr += entry * programs * 2
    longest_ptr += entry * LONG_FIELDS

    sample = _sample(mask_ptr, n, HAS_MASK)
    rounds = n * 0 + 1
    if HAS_MASK:
        if tl.sum((sample < n).to(tl.int32), 0) < ENOUGH:
            sample = first_valid_row(mask_ptr, n, HAS_MASK) + tl.arange(0, SAMPLE)
            rounds += ROUNDS - 1
    # Addresses of single elements fill registers.
    COLUMNS: tl.constexpr = BLOCK if VECTOR > 1 else BLOCK // 2
    # A thread has columns of its own, and loads the rows one after another.
    ROWS: tl.constexpr = BLOCK_R // 8 if BLOCK_R < 8 * SAMPLE else SAMPLE
    sample_ptr = samples_ptr + (entry * programs + program) * SAMPLE
    tl.store(sample_ptr + tl.arange(0, SAMPLE), sample)
    tl.debug_barrier()
    _store_centre(
        x_ptr, stride_xn, stride_xd, mask_ptr, sample_ptr, rounds, n, d1, width, centre_x,
        HAS_MASK, 8 * COLUMNS, ROWS,
    )  # fmt: skip
    _store_centre(
        y_ptr, stride_yn, stride_yd, mask_ptr, sample_ptr, rounds, n, d2, width, centre_y,
        HAS_MASK, 8 * COLUMNS, ROWS,
    )  # fmt: skip
    # Other threads of this program read what it has just stored, here and below.
    tl.debug_barrier()
    length = tl.cdiv(tl.cdiv(n, programs), BLOCK_R) * BLOCK_R
    begin, end = program * length, tl.minimum(n, (program + 1) * length)
    sum_r, top_r, row_r = _energies(
        x_ptr, stride_xn, stride_xd, mask_ptr, d1, centre_x, r_ptr, begin, end,
        HAS_MASK, COLUMNS, BLOCK_R,
    )  # fmt: skip
    sum_q, top_q, row_q = _energies(
        y_ptr, stride_yn, stride_yd, mask_ptr, d2, centre_y, q_ptr, begin, end,
        HAS_MASK, COLUMNS, BLOCK_R,
    )  # fmt: skip
    count = tl.maximum(end - begin, 0)
    if HAS_MASK:
        counts = tl.zeros([WIDE], tl.int32)
        for start in range(begin, end, WIDE):
            row = start + tl.arange(0, WIDE)
            counts += valid_rows(mask_ptr, row, end, HAS_MASK).to(tl.int32)
        count = tl.sum(counts, 0)
    tl.store(tops_ptr + program, top_r)
    tl.store(tops_ptr + programs + program, top_q)
    tl.store(top_rows_ptr + program, row_r)
    tl.store(top_rows_ptr + programs + program, row_q)
    tl.store(totals_ptr + program, sum_r)
    tl.store(totals_ptr + programs + program, sum_q)
    tl.store(totals_ptr + 2 * programs + program, count.to(tl.float64))
    if arrive(counters_ptr + entry, programs):
        tl.debug_barrier()
        other = tl.arange(0, WIDE)
        exists = other < programs
        totals = tl.load(totals_ptr + other, mask=exists, other=0.0)
        total_x = tl.sum(totals, 0)
        totals = tl.load(totals_ptr + programs + other, mask=exists, other=0.0)
        total_y = tl.sum(totals, 0)
        totals = tl.load(totals_ptr + 2 * programs + other, mask=exists, other=0.0)
        _choose(
            r_ptr, q_ptr, tops_ptr, top_rows_ptr, programs, length, n, total_x, total_y,
            tl.sum(totals, 0), longest_ptr, BLOCK_K,
        )  # fmt: skip


def launch(layers: Layers, config: Config, longest: Tensor) -> None:
    """Find the long rows of every layer, whose records ``longest`` receives."""
    entries, width = layers.entries, padded_width(layers, config)
    # Twice as many as run at once, so that runs of rows are short.
    programs = -(-2 * processors(layers.device) // entries)
    programs = min(programs, -(-layers.max_rows // (2 * config.block_r)), WIDE.value)
    # New counters, for the price of a small launch; see gram_cka_small.py.
    counters = torch.zeros(entries, dtype=torch.int32, device=layers.device)
    longest_kernel[(programs, entries)](
        *layers.arguments,
        layers.empty(entries * programs * SAMPLE.value, dtype=torch.int32),
        layers.empty(entries * programs * 2 * width), layers.empty(entries * 2 * layers.max_rows),
        layers.empty(entries * programs * TOTALS.value, dtype=torch.float64),
        layers.empty(entries * programs * 2),
        layers.empty(entries * programs * 2, dtype=torch.int32),
        longest, counters, width, layers.max_rows,
        **layers.feature_options,
        BLOCK=config.block, BLOCK_K=config.block_k, BLOCK_R=config.block_r,
        num_warps=config.head_warps,
    )  # fmt: skip
