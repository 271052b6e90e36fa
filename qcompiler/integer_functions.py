"""Means and PRelu in integer arithmetic: NumPy references, and the bodies of the model-local functions that equal them.

The scales are such that float32 gives the same integers, ties included: the qdq form keeps the float operators.

- A mean is taken of the integers themselves, to an output whose steps are 2**-bits of the input's. Sums of up to 2**16 integers
  are exact in float32, and a quotient that is not a tie differs from it by more than it is rounded.
- The factors of PRelu are multiples of 2**-12 with few factors of two, so that no product is a tie, nor nearer to one than
  2**-12. The four roundings of float32 move it by less than 2**-13.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qcompiler.quant import I64, RATIO_SHIFT, Array, QuantParams, requantize

MOST_HALVINGS = 11
"""The finest steps of a mean: 2**-11 of its input's."""

LARGEST_SLOPE = 2**20
"""The largest factor of PRelu, in units of 2**-12: products with 8-bit integers fit into int32."""

_TWOS = 3
"""A product of an 8-bit integer and a number with so many factors of two is no tie: 2**11 does not divide it."""

BODIES = {
    # The dividend is made positive by 2**20 divisors, because Div rounds towards zero.
    "Divide": """
Divide (acc, divisor, factor, zero_point, qmin, qmax) => (y) {
    wide = Cast <to = 7> (acc)
    scaled = Mul (wide, factor)
    base = Constant <value = int64 {1048576}> ()
    base_divisors = Mul (divisor, base)
    lifted = Add (scaled, base_divisors)
    floor = Div (lifted, divisor)
    floor_back = Mul (floor, divisor)
    rest = Sub (lifted, floor_back)
    two = Constant <value = int64 {2}> ()
    floor_half = Div (floor, two)
    floor_even = Mul (floor_half, two)
    odd = Sub (floor, floor_even)
    rest_twice = Mul (rest, two)
    nudged = Add (rest_twice, odd)
    above = Greater (nudged, divisor)
    step = Cast <to = 7> (above)
    rounded = Add (floor, step)
    value = Sub (rounded, base)
    zero = Cast <to = 7> (zero_point)
    shifted = Add (value, zero)
    narrow = Cast <to = 6> (shifted)
    low = Cast <to = 6> (qmin)
    high = Cast <to = 6> (qmax)
    clipped = Clip (narrow, low, high)
    y = CastLike (clipped, zero_point)
}""",
    "Slopes": """
Slopes (q, zero_point, above, below) => (acc) {
    wide = Cast <to = 6> (q)
    zero = Cast <to = 6> (zero_point)
    centred = Sub (wide, zero)
    none = Constant <value = int32 {0}> ()
    positive = Max (centred, none)
    negative = Min (centred, none)
    upper = Mul (positive, above)
    lower = Mul (negative, below)
    acc = Add (upper, lower)
}""",
}

DOCS = {
    "Divide": "clamp(RNE(acc * factor / divisor) + zero_point, qmin, qmax); acc int32, divisor and factor int64",
    "Slopes": "(q - zero_point) * above where that is positive, else * below, in int32",
}


def mean(q: Array, axes: Sequence[int], p_x: QuantParams, p_y: QuantParams) -> Array:
    """Quantized mean over axes, which stay with length 1; the scale of the result is a power of two below that of `q`."""
    bits = halvings(float(p_x.scale), float(p_y.scale))
    if bits is None:
        raise ValueError("the scale of the mean is not 2**-n of its input's")
    acc = (np.asarray(q, np.int64) - p_x.zero_point).sum(axis=tuple(axes), keepdims=True) << bits
    size = np.int64(np.prod([q.shape[a] for a in axes]))
    floor, rest = np.divmod(acc, size)
    rounded = floor + (2 * rest + (floor & 1) > size)
    return np.asarray(np.clip(rounded + p_y.zero_point, p_y.spec.qmin, p_y.spec.qmax), p_y.spec.dtype)


def halved(s_x: float, least: float) -> np.float32:
    """The smallest scale s_x * 2**-bits that is not below `least`, with 0 <= bits <= MOST_HALVINGS."""
    bits = np.clip(np.floor(np.log2(s_x / least * (1 + 1e-6))), 0, MOST_HALVINGS)
    return np.float32(s_x) * np.float32(2.0**-bits)


def doubled(s_y: float, least: float) -> np.float32:
    """The smallest scale s_y * 2**bits that is not below `least`, with 0 <= bits <= MOST_HALVINGS."""
    bits = np.clip(np.ceil(np.log2(least / s_y * (1 - 1e-6))), 0, MOST_HALVINGS)
    return np.float32(s_y) * np.float32(2.0**bits)


def halvings(s_x: float, s_y: float) -> int | None:
    """The bits with `s_y == s_x * 2**-bits`, or None if there are none."""
    bits = round(np.log2(s_x / s_y))
    return bits if 0 <= bits <= MOST_HALVINGS and s_y * 2.0**bits == s_x else None


def prelu(q: Array, slope: ArrayLike, p_x: QuantParams, p_y: QuantParams) -> Array:
    """Quantized PRelu, after `slope` is rounded; it broadcasts against `q`."""
    above = upper_slope(float(p_x.scale), float(p_y.scale))
    if above is None:
        raise ValueError("the ratio of the scales is no multiple of 2**-12 without ties")
    centred = np.asarray(q, np.int64) - p_x.zero_point
    below = lower_slopes(slope, float(p_x.scale), float(p_y.scale))
    return requantize(np.where(centred > 0, above, below) * centred, 1, p_y.zero_point, p_y.spec, RATIO_SHIFT)


def without_ties(factors: ArrayLike) -> I64:
    """The integers nearest to the factors whose products with 8-bit integers are not odd multiples of 2**11."""
    wanted = np.asarray(factors, np.float64)
    nearest = np.clip(np.rint(wanted), -LARGEST_SLOPE, LARGEST_SLOPE).astype(np.int64)
    other = nearest + np.where(wanted > nearest, 1, -1)  # next to an even number is an odd one
    return np.where(_is_without_ties(nearest), nearest, other)


def _is_without_ties(m: I64) -> NDArray[np.bool_]:
    lowest = m & -m
    return np.asarray((lowest <= 2**_TWOS) | (lowest >= 2**RATIO_SHIFT))


def snap_slope(s_x: float, s_y: float) -> float:
    """The ratio nearest to s_x / s_y that PRelu can have for positive numbers."""
    return max(int(without_ties(s_x / s_y * 2.0**RATIO_SHIFT)), 1) * 2.0**-RATIO_SHIFT


def upper_slope(s_x: float, s_y: float) -> int | None:
    """The factor of positive numbers, in units of 2**-12; None if the ratio of the scales is none that PRelu can have."""
    exact = s_x / s_y * 2.0**RATIO_SHIFT
    m = without_ties(exact)
    return int(m) if 0 < m < LARGEST_SLOPE and abs(exact / m - 1) <= 2.0**-23 else None


def lower_slopes(slope: ArrayLike, s_x: float, s_y: float) -> I64:
    """The factors of negative numbers, in units of 2**-12."""
    return without_ties(np.asarray(slope, np.float64) * s_x / s_y * 2.0**RATIO_SHIFT)


def rounded_slope(slope: Array, s_x: float, s_y: float) -> NDArray[np.float32]:
    """The float32 slopes nearest to the factors that stand for them."""
    return np.asarray(lower_slopes(slope, s_x, s_y) * 2.0**-RATIO_SHIFT * s_y / s_x, np.float32)
