"""Arithmetic of PTX by numpy, where numpy has no function of the same meaning.

fp32 and fp64 results are rounded to nearest. A fused multiply-add is rounded twice, so it may differ from hardware's in
the last bit, in one case of some 2^29 (fp32). Approximate functions err as much as PTX allows: by a relative error of
2^-22 (``ex2``), or by one unit in the last place (``rcp``).
"""

from __future__ import annotations

import numpy as np
import torch


def fma(a, b, c):
    """a * b + c with one rounding."""
    if c.dtype == np.float32:
        return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)
    # fp64: the product as a sum of two numbers (Veltkamp, Dekker), and its sum with c as two numbers (Knuth).
    a, b, c = np.broadcast_arrays(a, b, c)
    product = a * b
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    total = product + c
    virtual = total - product
    rest = (product - (total - virtual)) + (c - virtual)
    result = total + (rest + error)
    return np.where(np.isfinite(result), result, total)  # infinities, NaN, and products too large to split


def split(x):
    """Splits fp64 numbers into two halves of 26 bits that sum to them."""
    scaled = x * 134217729.0  # 2^27 + 1
    high = scaled - (scaled - x)
    return high, x - high


def flush(x):
    """Replaces subnormal fp32 numbers by 0 of their sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def approximate(function, relative_error: float):
    """An approximate fp32 function that flushes subnormal numbers (``.ftz``).

    The error is pseudo-random, as large as PTX allows, and the same for the same operand. For 0 there is none: PTX
    lists ``ex2`` of 0 as 1.
    """

    def compute(x):
        x = flush(x)
        noise = (x.view(np.uint32) * np.uint32(2654435761) >> np.uint32(8)) / np.float64(1 << 23) - 1
        exact = function(np.float64(x))
        return flush(np.where(x == 0, exact, exact * (1 + relative_error * noise)).astype(np.float32))

    return compute


ex2 = approximate(np.exp2, 2.0**-22)
rcp = approximate(np.reciprocal, 2.0**-24)  # with the rounding to fp32: one unit in the last place


def reciprocal_of_high_word(x):
    """``rcp.approx.ftz.f64``: reads the upper 32 bits of x, and writes those of the result."""
    mask = np.uint64(0xFFFFFFFF00000000)
    with_sign = np.where(np.abs(x) < np.finfo(np.float64).tiny, np.copysign(0.0, x), x)
    return ((1 / (with_sign.view(np.uint64) & mask).view(np.float64)).view(np.uint64) & mask).view(np.float64)


def to_bf16(x):
    """The bits of fp32 numbers as bf16, rounded to nearest, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_f16(x):
    return x.astype(np.float16).view(np.uint16)


def pack_halves(upper, lower):
    return upper.astype(np.uint32) << np.uint32(16) | lower


def unordered(x, y):
    return np.isnan(x) | np.isnan(y)


def from_bf16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def shift_left(x, amount):
    width = 8 * x.dtype.itemsize
    return np.where(amount < width, x << np.minimum(amount, width - 1).astype(x.dtype), x.dtype.type(0))


def shift_right(x, amount):
    """A shift by the width or more leaves copies of the sign."""
    width = 8 * x.dtype.itemsize
    if x.dtype.kind == "i":
        return x >> np.minimum(amount, width - 1).astype(x.dtype)
    return np.where(amount < width, x >> np.minimum(amount, width - 1).astype(x.dtype), x.dtype.type(0))


def divide(a, b):
    """Quotient of integers, rounded toward 0."""
    if np.any(b == 0):
        raise ZeroDivisionError("division of integers by 0")
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype) if a.dtype.kind == "i" else a // b


def insert_bits(source, target, position, length):
    """``bfi``: the lowest ``length`` bits of source replace those of target at ``position``."""
    one, width = target.dtype.type(1), 8 * target.dtype.itemsize
    length = np.minimum(length, width - np.minimum(position, width))
    mask = shift_left(shift_left(one + 0 * target, length) - one, position)
    mask = np.where(length >= width, ~(0 * target), mask)
    return (target & ~mask) | (shift_left(source, position) & mask)


def extract_bits(x, position, length):
    """``bfe`` of an unsigned number."""
    one = x.dtype.type(1)
    mask = np.where(length < 8 * x.dtype.itemsize, shift_left(one + 0 * x, length) - one, ~(0 * x))
    return shift_right(x, position) & mask


def cuda_tanh(x: torch.Tensor) -> torch.Tensor:
    """fp32 ``tanh`` as nvcc compiles it; PyTorch's for other types."""
    if x.dtype != torch.float32:
        return torch.tanh(x)
    x = x.numpy()
    two_thirds = rcp(ex2(np.abs(x) * np.float32(2.885390043)) + np.float32(1))
    large = np.copysign(np.where(np.abs(x) >= np.float32(9.010913849), 1, 1 - 2 * np.float64(two_thirds)), x)
    square = x * x
    small = np.full_like(x, 0.015739683)
    for coefficient in (-0.0523039624, 0.133152977, -0.333327687):
        small = fma(small, square, np.float32(coefficient))
    small = fma(small * square, x, x)
    return torch.from_numpy(np.where(np.abs(x) >= np.float32(0.6), large.astype(np.float32), small))
