"""``vocab_score`` in Triton: one program per row makes an online softmax over the row, then writes the vocab score.

A program reads its row in blocks of shape (PARTS, LANES, WIDTH). WIDTH columns are one 16-byte access. Each of the
LANES is a thread with its own statistics, so the loop over the blocks exchanges nothing between threads and rescales
once per PARTS accesses; the lanes are combined once, after the loop. Loops over whole blocks test no column, scale and
log2 e are one factor of the exponent, and the target's element is written after the others (bench/NOTES.md counts the
instructions). Writing the score reads the row a second time: from L2 if the rows in flight fit there, else from device
memory. The CUDA kernel keeps such a long row in the shared memory of a cluster of blocks.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .. import backends
from .reference import TileOptions, VocabScore

_TILE_BYTES = 8192
_BYTES_PER_THREAD = 32

# Running maxima stay finite, so the difference of two maxima is never inf - inf. An infinite logit then shows as an
# infinite sum and a NaN as a NaN sum, and every statistic equals eager PyTorch's without any branch.
_LARGEST = tl.constexpr(3.4028234663852886e38)
_LOG2E = tl.constexpr(math.log2(math.e))


def vocab_score_triton(
    logits: Tensor,  # (R, V) bf16, fp16 or fp32
    targets: Tensor,  # (R,) int64
    options: TileOptions,
) -> VocabScore:
    """Scores a tile as ``vocab_score_reference`` does. A target outside the vocabulary makes its row NaN."""
    rows, columns = logits.shape
    out = VocabScore.empty(rows, logits, options.statistics)
    if rows == 0:
        return out
    itemsize = logits.element_size()
    width = 16 // itemsize
    tile = min(_TILE_BYTES // itemsize, max(256, triton.next_power_of_2(columns)))
    bias, softcap, scale = options.bias, options.softcap, options.logit_scale
    aligned = logits.data_ptr() % 16 == 0 and logits.stride(0) % 16 == 0
    # A positive scale does not change which logit is largest, so it is left to the exponent.
    scaled = softcap is not None or scale <= 0
    with backends.on_device_of(logits):
        _vocab_score_kernel[(rows,)](
            logits,
            logits.stride(0),
            targets.contiguous(),
            None if bias is None else bias.contiguous(),
            float(scale),
            softcap,
            None if softcap is None else 1 / softcap,
            1.0 if scaled else float(scale),
            _LOG2E.value * (1.0 if scaled else scale),
            columns,
            options.vocabulary(columns),
            *out,
            SCORE=options.score,
            SCALED=scaled,
            ALIGNED=aligned,
            PARTS=_BYTES_PER_THREAD // 16,
            LANES=tile * itemsize // _BYTES_PER_THREAD,
            WIDTH=width,
            # Without a number ptxas aims at 48 registers on sm_100 and spills. Narrow accesses need more than 64.
            maxnreg=64 if aligned else None,
            num_warps=max(1, tile * itemsize // (32 * _BYTES_PER_THREAD)),
            # A fused multiply-subtract of scale * logit - largest does not round the product: where the difference is
            # exactly 0 it would return a rounding error. So fusion is off where a product comes first.
            enable_fp_fusion=not scaled,
        )
    return out


@triton.jit
def _vocab_score_kernel(
    logits,  # (R, columns)
    logits_stride,
    targets,  # (R,)
    bias,  # (columns,) or None
    logit_scale,
    softcap,  # or None
    inverse_softcap,  # 1 / softcap: a division costs some ten instructions
    factor,  # logits are `factor` times the numbers y that are reduced
    unit,  # factor * log2 e
    columns,
    vocab_size,
    logps,  # (R,)
    lses,  # (R,)
    entropies,  # (R,) or None, as the next three
    mean_logits,  # (R,)
    corrects,  # (R,)
    log_sum_sqs,  # (R,)
    SCORE: tl.constexpr,
    SCALED: tl.constexpr,  # y is the logit after scale and cap, else before the scale
    ALIGNED: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    STATISTICS: tl.constexpr = entropies is not None
    TILE: tl.constexpr = PARTS * LANES * WIDTH
    scaling = (logit_scale if SCALED else None, softcap, inverse_softcap)
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * logits_stride
    vector = tl.arange(0, PARTS)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
    tile = vector * WIDTH + tl.arange(0, WIDTH)[None, None, :]

    # Read the target's logit before the score overwrites it. The mask keeps a bad target from reading outside the row.
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocab_size)
    target_y = _load_y(x, bias, target, known, float("nan"), scaling)

    # Sweep 1, statistics. Per lane, with m the largest y so far and t = unit (y - m):
    # s = sum 2^t, w = sum t 2^t, q = sum 2^2t, total = sum y.
    m = tl.full([LANES], -_LARGEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    w = tl.zeros([LANES], tl.float32)
    q = tl.zeros([LANES], tl.float32)
    total = tl.zeros([LANES], tl.float32)

    # Whole tiles have no mask: with a mask that varies within 16 bytes Triton loads element by element.
    whole = vocab_size // TILE * TILE
    for start in range(0, whole, TILE):
        y = _load_y(x, bias, start + tile, None, None, scaling)
        m, s, w, q = _add_tile(m, s, w, q, y, unit, STATISTICS)
        if STATISTICS:
            total += _sum(y)
    if whole < vocab_size:
        inside = whole + tile < vocab_size
        y = _load_y(x, bias, whole + tile, inside, float("-inf"), scaling)
        y = tl.where(inside, y, float("-inf"))
        m, s, w, q = _add_tile(m, s, w, q, y, unit, STATISTICS)
        if STATISTICS:
            total += _sum(tl.where(inside, y, 0.0))

    # Combine the lanes. 2^-10000 is 0 as well, and s * shift stays finite.
    largest = tl.max(m, axis=0)
    shift = tl.maximum((m - largest) * unit, -1e4)
    rescale = tl.exp2(shift)
    row_s = tl.sum(s * rescale, axis=0)
    lse = factor * largest + tl.log(row_s)
    tl.store(logps + row, (target_y - largest) * factor - tl.log(row_s))
    tl.store(lses + row, lse)
    if STATISTICS:
        row_w = tl.sum((w + s * shift) * rescale, axis=0)
        row_q = tl.sum(q * rescale * rescale, axis=0)
        tl.store(entropies + row, tl.log(row_s) - row_w / (row_s * _LOG2E))
        tl.store(mean_logits + row, factor * tl.sum(total, axis=0) / vocab_size)
        tl.store(corrects + row, (tl.maximum(target_y, -_LARGEST) >= largest) & known & (lse == lse))
        tl.store(log_sum_sqs + row, tl.log(row_q) - 2 * tl.log(row_s))

    # Sweep 2, the vocab score: -p dz/dx of all columns, and then the target's.
    if SCORE:
        # Maximum and sum stay apart: e^(z - lse) would carry the rounding of lse, which is large in a peaked row.
        slope = tl.where(known, 1 / row_s, float("nan")) * logit_scale
        softmax = (largest, unit, slope, tl.log2(slope), inverse_softcap)
        for start in range(0, whole, TILE):
            y = _load_y(x, bias, start + tile, None, None, scaling)
            tl.store(x + (start + tile), _minus_p(y, softmax, x.dtype.element_ty, SCALED))
        # Padding above the vocabulary gets 0.
        for start in range(whole, columns, TILE):
            column = start + tile
            there = column < columns
            if ALIGNED:  # the mask is constant within 16 bytes, so that Triton stores 16 bytes at once
                there = start // WIDTH + vector < columns // WIDTH
            _write_tail(x, column, there, bias, scaling, softmax, vocab_size, SCALED)
        if ALIGNED:  # the columns of the last, incomplete 16 bytes
            column = columns // WIDTH * WIDTH + tl.arange(0, WIDTH)
            _write_tail(x, column, column < columns, bias, scaling, softmax, vocab_size, SCALED)
        # Without the barrier another thread may overwrite the target's element afterwards.
        tl.debug_barrier()
        gradient = (1 - tl.exp2((target_y - largest) * unit) / row_s) * logit_scale
        if softcap is not None:
            gradient *= 1 - (target_y * inverse_softcap) * (target_y * inverse_softcap)
        tl.store(x + target, gradient.to(x.dtype.element_ty), mask=known)


@triton.jit
def _write_tail(x, column, there, bias, scaling, softmax, vocab_size, SCALED: tl.constexpr):
    """Overwrites the logits of columns that may lie above the vocabulary."""
    y = _load_y(x, bias, column, there, 0.0, scaling)
    gradient = tl.where(column < vocab_size, _minus_p(y, softmax, tl.float32, SCALED), 0.0)
    tl.store(x + column, gradient.to(x.dtype.element_ty), mask=there)


@triton.jit
def _minus_p(y, softmax, dtype: tl.constexpr, SCALED: tl.constexpr):
    """Returns -p dz/dx. Where a 16-bit result hides the rounding of the exponent, all factors are part of it."""
    largest, unit, slope, log_slope, inverse_softcap = softmax
    t = (y - largest) * unit
    if SCALED:
        gradient = tl.exp2(t) * -slope
        if inverse_softcap is not None:
            gradient *= 1 - (y * inverse_softcap) * (y * inverse_softcap)
    elif dtype == tl.float32:
        gradient = tl.exp2(t) * -slope
    else:
        gradient = tl.exp2(t + log_slope) * -1.0  # rounding takes the sign, and not `0 - x`
    return gradient.to(dtype)


@triton.jit
def _load_y(x, bias, column, mask, other, scaling):
    """Loads the logits of some columns in fp32, with bias and, unless left to the exponent, scale and cap applied."""
    logit_scale, softcap, inverse_softcap = scaling
    y = tl.load(x + column, mask=mask, other=other)
    if y.dtype == tl.bfloat16:  # a shift or a mask; Triton's conversion takes two instructions for every other element
        y = (y.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    y = y.to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=mask, other=other).to(tl.float32)
    if logit_scale is not None:
        y *= logit_scale
    if softcap is not None:
        y = _tanh(y * inverse_softcap) * softcap
    return y


@triton.jit
def _tanh(x):
    """tanh to a few ulp. 1 - 2 / (e^2x + 1) cancels near 0, where an odd polynomial takes over."""
    square = x * x
    small = tl.fma(square, 1.64374650e-2, -5.26717548e-2)
    small = tl.fma(small, square, 1.33207242e-1)
    small = tl.fma(small, square, -3.33329466e-1)
    small = tl.fma(small * square, x, x)
    large = 1 - 2 / (tl.exp2(tl.abs(x) * (2 * _LOG2E)) + 1)
    return tl.where(tl.abs(x) < 0.55, small, tl.where(x < 0, -large, large))


@triton.jit
def _sum(y):
    """Sums over the columns of each lane: (PARTS, LANES, WIDTH) -> (LANES,), within a thread."""
    return tl.sum(tl.sum(y, axis=2), axis=0)


@triton.jit
def _add_tile(m, s, w, q, y, unit, STATISTICS: tl.constexpr):
    """Adds a tile (PARTS, LANES, WIDTH) of numbers to the statistics of the lanes, rescaled to the new maxima."""
    new_m = tl.minimum(tl.maximum(m, tl.max(tl.max(y, axis=2), axis=0)), _LARGEST)
    # The subtraction comes first: t is 0 at the maximum, and a number that all y have in common costs no digits.
    t = (y - new_m[None, :, None]) * unit
    e = tl.exp2(t)
    shift = tl.maximum((m - new_m) * unit, -1e4)  # 2^-10000 is 0 as well, and s * shift stays finite
    rescale = tl.exp2(shift)
    if STATISTICS:
        t = tl.maximum(t, -_LARGEST)  # -inf * 0 would be NaN
        w = (w + s * shift) * rescale + _sum(e * t)
        q = q * rescale * rescale + _sum(e * e)
    s = s * rescale + _sum(e)
    return new_m, s, w, q
