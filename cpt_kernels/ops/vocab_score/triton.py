"""``vocab_score`` in Triton: one program per row makes an online softmax over the row, then writes the vocab score.

A program reads its row in blocks of shape (LANES, WIDTH). WIDTH columns are one 16-byte access. Each of the LANES keeps
its own statistics, so the loop over the blocks exchanges nothing between threads and rescales once per 16 bytes; the
lanes are combined once, after the loop. Writing the score reads the row a second time: from L2 if the rows in flight
fit there, else from device memory. The CUDA kernel keeps such a long row in the shared memory of a cluster of blocks.
"""

from __future__ import annotations

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
    bias, softcap = options.bias, options.softcap
    with backends.on_device_of(logits):
        _vocab_score_kernel[(rows,)](
            logits,
            logits.stride(0),
            targets.contiguous(),
            None if bias is None else bias.contiguous(),
            options.logit_scale,
            softcap,
            None if softcap is None else 1 / softcap,
            columns,
            options.vocabulary(columns),
            *out,
            SCORE=options.score,
            ALIGNED=logits.data_ptr() % 16 == 0 and logits.stride(0) % 16 == 0,
            LANES=tile // width,
            WIDTH=width,
            num_warps=max(1, tile * itemsize // (32 * _BYTES_PER_THREAD)),
            # A fused multiply-subtract of scale * logit - largest does not round the product: where the difference is
            # exactly 0 it would return a rounding error. So fusion is off where a product comes first.
            enable_fp_fusion=options.logit_scale == 1.0 and softcap is None,
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
    columns,
    vocab_size,
    logps,  # (R,)
    lses,  # (R,)
    entropies,  # (R,) or None, as the next three
    mean_logits,  # (R,)
    corrects,  # (R,)
    log_sum_sqs,  # (R,)
    SCORE: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    STATISTICS: tl.constexpr = entropies is not None
    TILE: tl.constexpr = LANES * WIDTH
    scaling = (logit_scale, softcap, inverse_softcap)
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * logits_stride
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]

    # Read the target's logit before the score overwrites it. The mask keeps a bad target from reading outside the row.
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocab_size)
    target_logit = _logits(x, bias, target, known, float("nan"), scaling)

    # Sweep 1, statistics. Per lane, with m the largest logit so far:
    # s = sum e^(z-m), w = sum (z-m) e^(z-m), q = sum e^(2(z-m)), total = sum z.
    m = tl.full([LANES], -_LARGEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    w = tl.zeros([LANES], tl.float32)
    q = tl.zeros([LANES], tl.float32)
    total = tl.zeros([LANES], tl.float32)

    # Whole tiles have no mask: with a mask that varies within 16 bytes Triton loads element by element.
    whole = vocab_size // TILE * TILE
    for start in range(0, whole, TILE):
        z = _logits(x, bias, start + tile, None, None, scaling)
        m, s, w, q = _add_tile(m, s, w, q, z, STATISTICS)
        if STATISTICS:
            total += tl.sum(z, axis=1)
    if whole < vocab_size:
        inside = whole + tile < vocab_size
        z = _logits(x, bias, whole + tile, inside, float("-inf"), scaling)
        z = tl.where(inside, z, float("-inf"))
        m, s, w, q = _add_tile(m, s, w, q, z, STATISTICS)
        if STATISTICS:
            total += tl.sum(tl.where(inside, z, 0.0), axis=1)

    # Combine the lanes. exp(-1e4) is 0 as well, and s * shift stays finite.
    largest = tl.max(m, axis=0)
    shift = tl.maximum(m - largest, -1e4)
    rescale = tl.exp(shift)
    row_s = tl.sum(s * rescale, axis=0)
    lse = largest + tl.log(row_s)
    tl.store(logps + row, target_logit - largest - tl.log(row_s))
    tl.store(lses + row, lse)
    if STATISTICS:
        row_w = tl.sum((w + s * shift) * rescale, axis=0)
        row_q = tl.sum(q * rescale * rescale, axis=0)
        tl.store(entropies + row, tl.log(row_s) - row_w / row_s)
        tl.store(mean_logits + row, tl.sum(total, axis=0) / vocab_size)
        tl.store(corrects + row, (tl.maximum(target_logit, -_LARGEST) >= largest) & known & (lse == lse))
        tl.store(log_sum_sqs + row, tl.log(row_q) - 2 * tl.log(row_s))

    # Sweep 2, the vocab score, over all columns: padding above the vocabulary gets 0.
    if SCORE:
        # Maximum and sum stay apart: e^(z - lse) would carry the rounding of lse, which is large in a peaked row.
        normaliser = tl.where(known, 1 / row_s, float("nan"))
        target = tl.where(known, target, -1).to(tl.int32)  # int64 would take two registers per column
        for start in range(0, columns, TILE):
            column = start + tile
            there = column < columns
            if ALIGNED:  # the mask is constant within 16 bytes, so that Triton stores 16 bytes at once
                there = start // WIDTH + tl.arange(0, LANES)[:, None] < columns // WIDTH
            _write_score(x, column, there, bias, scaling, target, vocab_size, largest, normaliser)
        if ALIGNED:  # the columns of the last, incomplete 16 bytes
            column = columns // WIDTH * WIDTH + tl.arange(0, WIDTH)
            _write_score(x, column, column < columns, bias, scaling, target, vocab_size, largest, normaliser)


@triton.jit
def _write_score(x, column, there, bias, scaling, target, vocab_size, largest, normaliser):
    """Overwrites the logits of some columns with d log p / d x."""
    logit_scale, softcap, inverse_softcap = scaling
    z = _logits(x, bias, column, there, 0.0, scaling)
    gradient = tl.where(column == target, 1.0, 0.0) - tl.exp(z - largest) * normaliser
    if softcap is not None:
        gradient *= 1 - (z * inverse_softcap) * (z * inverse_softcap)
    gradient = tl.where(column < vocab_size, gradient * logit_scale, 0.0)
    tl.store(x + column, gradient.to(x.dtype.element_ty), mask=there)


@triton.jit
def _logits(x, bias, column, mask, other, scaling):
    """Loads the logits of some columns in fp32, with bias, scale and cap applied."""
    logit_scale, softcap, inverse_softcap = scaling
    z = tl.load(x + column, mask=mask, other=other).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + column, mask=mask, other=other).to(tl.float32)
    z *= logit_scale
    if softcap is not None:
        z = _tanh(z * inverse_softcap) * softcap
    return z


@triton.jit
def _tanh(x):
    """tanh to a few ulp. 1 - 2 / (e^2x + 1) cancels near 0, where an odd polynomial takes over."""
    square = x * x
    small = 1.64374650e-2
    small = small * square - 5.26717548e-2
    small = small * square + 1.33207242e-1
    small = small * square - 3.33329466e-1
    small = small * square * x + x
    large = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.55, small, tl.where(x < 0, -large, large))


@triton.jit
def _add_tile(m, s, w, q, z, STATISTICS: tl.constexpr):
    """Adds a tile (LANES, WIDTH) of logits to the statistics of the lanes, rescaled to the new maxima."""
    new_m = tl.minimum(tl.maximum(m, tl.max(z, axis=1)), _LARGEST)
    d = z - new_m[:, None]
    e = tl.exp(d)
    shift = tl.maximum(m - new_m, -1e4)  # exp(-1e4) is 0 as well, and s * shift stays finite
    rescale = tl.exp(shift)
    if STATISTICS:
        d = tl.maximum(d, -_LARGEST)  # -inf * 0 would be NaN
        w = (w + s * shift) * rescale + tl.sum(e * d, axis=1)
        q = q * rescale * rescale + tl.sum(e * e, axis=1)
    s = s * rescale + tl.sum(e, axis=1)
    return new_m, s, w, q
