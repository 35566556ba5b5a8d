"""Arithmetic of PTX by numpy, where numpy has no function of the same meaning.

fp32 and fp64 results are rounded to nearest. A fused multiply-add is rounded twice, so it may differ from hardware's in
the last bit, in one case of some 2^29 (fp32). Approximate functions err as much as PTX allows: by a relative error of
2^-22 (``ex2``), or by one (``rcp``) or two (``div.full``) units in the last place.
"""

from __future__ import annotations

import numpy as np


def fma(a, b, c):
    """a * b + c with one rounding."""
    if c.dtype == np.float32:
        return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)
    # fp64: the product as a sum of two numbers (Veltkamp, Dekker), and its sum with c as two numbers (Knuth).
    product, scaled = a * b, np.stack([a, b]) * 134217729.0  # 2^27 + 1
    a_high, b_high = scaled - (scaled - [a, b])
    a_low, b_low = a - a_high, b - b_high  # halves of 26 bits
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    total = product + c
    virtual = total - product
    rest = (product - (total - virtual)) + (c - virtual)
    result = total + (rest + error)
    return np.where(np.isfinite(result), result, total)  # infinities, NaN, and products too large to split


def flushed(function):
    """Replaces subnormal operands and results of a function by 0 of their sign (``.ftz``)."""
    flush = lambda x: np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)  # noqa: E731
    return lambda *operands: flush(function(*map(flush, operands)))


def approximate(function, relative_error: float):
    """An approximate fp32 function of one or more operands.

    The error is pseudo-random, as large as PTX allows, and the same for the same first operand. There is none where the
    result is an fp32 number, as for ex2(0) and rcp(1): PTX lists it for ex2(0), the kernels rely on it for the others.
    """

    def compute(x, *others):
        noise = (x.view(np.uint32) * np.uint32(2654435761) >> np.uint32(8)) / np.float64(1 << 23) - 1
        exact = function(np.float64(x), *others)
        rounded = exact.astype(np.float32)
        return np.where(rounded == exact, rounded, (exact * (1 + relative_error * noise)).astype(np.float32))

    return compute


ex2 = approximate(np.exp2, 2.0**-22)
rcp = approximate(np.reciprocal, 2.0**-24)  # with the rounding to fp32: one unit in the last place
div_full = approximate(np.divide, 1.5 * 2.0**-23)  # with the rounding to fp32: two units


def reciprocal_of_high_word(x):
    """``rcp.approx.f64``: reads the upper 32 bits of x, and writes those of the result."""
    mask = np.uint64(0xFFFFFFFF00000000)
    return ((1 / (x.view(np.uint64) & mask).view(np.float64)).view(np.uint64) & mask).view(np.float64)


def to_bf16(x):
    """The bits of fp32 numbers as bf16, rounded to nearest, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bf16(bits):
    return (np.uint32(bits) << np.uint32(16)).view(np.float32)


def by_halves(from_bits, to_bits):
    """The larger one of two packed 16-bit numbers, for both halves; of a NaN and a number the number."""
    halves = lambda x: from_bits(np.ascontiguousarray(x).view(np.uint16))  # noqa: E731
    return lambda x, y: to_bits(np.fmax(halves(x), halves(y))).view(np.uint32)


def add_toward_zero(x, y):
    """The sum of fp32 numbers, rounded toward 0. It is exact in fp64 unless it has more than 53 digits."""
    total = np.float64(x) + np.float64(y)
    rounded = total.astype(np.float32)
    return np.where(np.abs(rounded) > np.abs(total), np.nextafter(rounded, np.float32(0)), rounded)


def unordered(x, y):
    return np.isnan(x) | np.isnan(y)


def divide(x, y):
    """Quotient of integers, rounded toward 0."""
    if (y == 0).any():
        raise ZeroDivisionError("division of integers by 0")
    return (x - np.fmod(x, y)) // y


def mask(x, position, length):
    """Ones in the ``length`` bits from ``position`` on."""
    return (np.ones_like(x) << length.astype(x.dtype)) - x.dtype.type(1) << position.astype(x.dtype)
