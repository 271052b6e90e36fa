"""The arithmetic of quantization on plain NumPy arrays; no graphs.

Everything that the compiler emits is checked against these functions, bit for bit. Notation: `x = scale * (q - zero_point)`
(Jacob et al. 2017, arXiv 1712.05877). Rounding is to nearest, ties to even (RNE), as in ONNX QuantizeLinear.

A requantize multiplies an int32 accumulator by `m * 2**-SHIFT` with an integer `m`. ONNX Runtime computes the same factor in
float32 as `fl(fl(s_x * s_w) / s_y)`; where that value is exactly `m * 2**-SHIFT`, its kernels equal the integer formula for
every int32 accumulator. `snap_weight_scale` and `snap_ratio` find scales for which this holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

SHIFT = 16
"""Bits after the binary point of a requantize multiplier: above 16, float32 kernels start to differ from integers."""

RATIO_SHIFT = 12
"""Bits of the two input multipliers of an addition: |q_a * m_a + q_b * m_b| stays below 2**24."""

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Array = NDArray[Any]


@dataclass(frozen=True)
class QuantSpec:
    """What a tensor is quantized to. How its range is measured is a collector's affair.

    `qmin`, `qmax`: the integers in use (a 7-bit weight is int8 with -64..63). `symmetric`: the zero point is fixed at the
    middle. `axis`: one scale per index of this axis, or None for one scale per tensor. `log2`: the integers are codes of
    attention, q stands for 2**-q.
    """

    dtype: str
    qmin: int
    qmax: int
    symmetric: bool = False
    axis: int | None = None
    log2: bool = False

    def per_channel(self, axis: int | None) -> QuantSpec:
        """Return the same spec with one scale per index of `axis`."""
        return replace(self, axis=axis)

    @property
    def steps(self) -> int:
        """The number of steps between the least and the greatest integer."""
        return self.qmax - self.qmin


@dataclass(frozen=True, eq=False)
class QuantParams:
    """What a tensor got: float32 scale(s), shape () or (channels,), and one zero point for all of them.

    `exponents`: Power-of-Two Factors, one per index of the last axis: the scale of index c is `scale * 2**exponents[c]`.
    """

    spec: QuantSpec
    scale: F32
    zero_point: int = 0
    exponents: tuple[int, ...] = ()

    @cached_property
    def scales(self) -> F32:
        """The scale, or that of each channel where there are Power-of-Two Factors."""
        return (
            np.asarray(self.scale * np.float32(2) ** np.asarray(self.exponents), np.float32)
            if self.exponents
            else self.scale
        )

    @property
    def axis(self) -> int | None:
        """The axis that `scales` run along, or None for one scale."""
        return -1 if self.exponents else self.spec.axis

    @cached_property
    def range(self) -> tuple[float, float]:
        """The least and greatest real number that a per-tensor quantized value can stand for."""
        if self.spec.log2:
            return 2.0**-self.spec.qmax, 1.0
        scale = float(self.scale) * 2.0 ** max(self.exponents, default=0)
        return scale * (self.spec.qmin - self.zero_point), scale * (self.spec.qmax - self.zero_point)

    def with_scale(self, scale: ArrayLike) -> QuantParams:
        """Return the same params with another scale."""
        return replace(self, scale=np.asarray(scale, np.float32))

    def same_as(self, other: QuantParams) -> bool:
        """Whether integers mean the same real numbers under both."""
        return (
            self.spec.dtype == other.spec.dtype
            and self.zero_point == other.zero_point
            and np.array_equal(self.scale, other.scale)
            and self.exponents == other.exponents
        )


def _along(values: Array, axis: int | None, rank: int) -> Array:
    if axis is None or values.ndim == 0:
        return values
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def quantize(x: Array, params: QuantParams) -> Array:
    """QuantizeLinear: `clamp(RNE(x / scale) + zero_point, qmin, qmax)`, the division in float32.

    The codes of attention are `floor(log2(4 / 3x))`: log2 rounded up where the mantissa of 1 / x is at least 1.5.
    """
    spec = params.spec
    if spec.log2:
        inverse = 4 / (3 * np.maximum(np.asarray(x, np.float64), 2.0**-64))
        return np.clip(np.floor(np.log2(inverse)), spec.qmin, spec.qmax).astype(spec.dtype)
    with np.errstate(over="ignore"):  # infinity saturates as well
        scaled = np.asarray(x, np.float32) / _along(params.scales, params.axis, np.ndim(x))
    q = np.clip(np.rint(scaled).astype(np.float64) + params.zero_point, spec.qmin, spec.qmax)
    return q.astype(spec.dtype)


def dequantize(q: Array, params: QuantParams) -> F32:
    """DequantizeLinear: `(q - zero_point) * scale` in float32; `2**-q` for codes of attention."""
    if params.spec.log2:
        return np.asarray(2.0 ** -np.asarray(q, np.float32), np.float32)
    shifted = (np.asarray(q, np.int32) - np.int32(params.zero_point)).astype(np.float32)
    return np.asarray(shifted * _along(params.scales, params.axis, np.ndim(q)), np.float32)


MIN_SCALE = float(np.finfo(np.float32).tiny) * 2**32
"""Scales below this would turn products of scales into subnormal numbers."""


def params_from_range(low: float, high: float, spec: QuantSpec) -> QuantParams:
    """Per-tensor params whose range covers [low, high] and zero, with an even zero point.

    The zero point is `qmin` where no value is negative (so that ReLU is saturation), the middle if the spec is symmetric,
    else the even integer that needs the smallest scale. Even, because QLinearAdd rounds after it adds the zero point. The scale
    of a tensor of zeros is 1. Raises ValueError if a bound is not finite.
    """
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"range [{low}, {high}] is not finite")
    low, high = min(low, 0.0), max(high, 0.0)
    if spec.symmetric:
        middle = (spec.qmin + spec.qmax + 1) // 2
        scale, zero_point = max(-low, high) / min(spec.qmax - middle, middle - spec.qmin), middle
    else:
        scale, zero_point = min(_affine_choices(low, high, spec))
    scale = scale if low < high else 1.0
    return QuantParams(spec, np.float32(max(scale, MIN_SCALE)) * np.ones((), np.float32), zero_point)


def _affine_choices(low: float, high: float, spec: QuantSpec) -> list[tuple[float, int]]:
    """(scale, zero point) for the even zero points next to the exact one."""
    span = high - low
    if low == 0 or span == 0:
        return [(span / spec.steps, spec.qmin)]
    exact = spec.qmin - low / span * spec.steps
    below = int(np.floor(exact / 2)) * 2
    choices = []
    for zero_point in (below, below + 2):
        if not spec.qmin < zero_point <= spec.qmax:
            continue
        above = spec.qmax - zero_point
        if high > 0 and above == 0:
            continue
        choices.append((max(-low / (zero_point - spec.qmin), high / above if above else 0.0), zero_point))
    return choices or [(max(-low / 2, high / (spec.steps - 2)), spec.qmin + 2)]


def rescale(s_x: ArrayLike, s_w: ArrayLike, s_y: ArrayLike) -> F32:
    """The float32 factor from accumulator to output as ONNX Runtime computes it: `fl(fl(s_x * s_w) / s_y)`."""
    product = np.asarray(s_x, np.float32) * np.asarray(s_w, np.float32)
    return np.asarray(product / np.asarray(s_y, np.float32), np.float32)


def is_dyadic(factor: ArrayLike, shift: int = SHIFT) -> NDArray[np.bool_]:
    """Whether each factor is exactly `m * 2**-shift` for an integer m >= 1."""
    scaled = np.asarray(factor, np.float64) * 2.0**shift
    return np.asarray((scaled == np.rint(scaled)) & (scaled >= 1))


def multiplier(factor: ArrayLike, shift: int = SHIFT) -> I64:
    """The integers m with `factor == m * 2**-shift`. Raises ValueError if a factor is not of that form."""
    if not np.all(is_dyadic(factor, shift)):
        raise ValueError(f"a rescale factor is not a multiple of 2**-{shift}")
    return np.asarray(np.rint(np.asarray(factor, np.float64) * 2.0**shift), np.int64)


def neighbours(values: Array, ulps: int = 4) -> F32:
    """The float32 numbers within `ulps` steps of each value, nearest first; shape (2 * ulps + 1, *values.shape)."""
    base = np.asarray(values, np.float32)
    rows = [base]
    up = down = base
    for _ in range(ulps):
        up = np.nextafter(up, np.float32(np.inf))
        down = np.nextafter(down, np.float32(0))
        rows += [up, down]
    return np.stack(rows)


def snap_weight_scale(wanted: ArrayLike, s_x: float, s_y: float) -> F32:
    """The least float32 weight scales >= `wanted` (up to rounding) whose rescale factor is `m * 2**-SHIFT`, exactly.

    The weights are quantized with the scale that this returns, so rounding m costs range, never precision of the rescale.
    """
    wanted = np.atleast_1d(np.asarray(wanted, np.float64))
    m = np.maximum(np.ceil(wanted * s_x / s_y * 2.0**SHIFT * (1 - 2.0**-21)), 1)
    distinct, positions = np.unique(m, return_inverse=True)
    return scale_for_multiplier(distinct, s_x, s_y)[positions].reshape(m.shape)


def scale_for_multiplier(m: ArrayLike, s_x: float, s_y: float) -> F32:
    """Float32 weight scales whose rescale factor is exactly `m * 2**-SHIFT`; m grows by 1 where no float32 fits.

    Raises ValueError if an m does not fit into int32.
    """
    m = np.atleast_1d(np.asarray(m, np.float64)).copy()
    scale = np.zeros(m.shape, np.float32)
    todo = np.ones(m.shape, bool)
    while todo.any():
        target = m[todo] * 2.0**-SHIFT
        near = neighbours(target * np.float64(s_y) / np.float64(s_x))
        hit = rescale(s_x, near, s_y) == target
        found = hit.any(axis=0)
        index = np.flatnonzero(todo)
        scale[index[found]] = near[hit.argmax(axis=0), np.arange(near.shape[1])][found]
        m[index[~found]] += 1
        if m.max() >= 2.0**31:
            raise ValueError("a rescale factor is too large for an int32 multiplier")
        todo[index[found]] = False
    return scale


def snap_ratio(s_a: float, s_c: float, shift: int = RATIO_SHIFT, limit: float = np.inf) -> np.float32:
    """The float32 scale nearest to `s_a`, at most `limit`, for which `fl(s_a / s_c)` is exactly `m * 2**-shift`, m >= 1.

    Powers of two always fit, so there is one unless `limit` is below `s_c * 2**-shift`: ValueError then.
    """
    base = np.float32(s_c)
    m = max(1.0, np.rint(min(float(s_a), limit) / float(base) * 2.0**shift))
    steps = (delta * sign for delta in range(int(m)) for sign in (1, -1))
    for step in steps:
        if m + step < 1:
            continue
        target = np.float32((m + step) * 2.0**-shift)
        near = neighbours(np.asarray(np.float64(target) * np.float64(base)))
        good = near[(near / base == target) & (near <= limit)]
        if good.size:
            return np.float32(good[0])
    raise ValueError(f"no float32 scale up to {limit} has a dyadic ratio to {s_c}")


def snap_scale(factor_of: Callable[[F32], F32], wanted: float, at_least: bool, shift: int = SHIFT) -> np.float32 | None:
    """The float32 scale next to `wanted` whose `factor_of(scale)` is exactly `m * 2**-shift`, m >= 1; None if none is near.

    `factor_of` maps scales to float32 rescale factors and is a power: proportional, inversely proportional, or a square. With
    `at_least`, scales below `wanted` are taken only if none above fits.
    """
    exact = float(factor_of(np.asarray([wanted], np.float32))[0]) * 2.0**shift
    growth = float(factor_of(np.asarray([wanted * 2], np.float32))[0]) * 2.0**shift / exact
    rising = growth > 1
    up = at_least == rising
    start = np.ceil(exact - 1e-6) if up else np.floor(exact + 1e-6)
    steps = np.arange(33 + int(exact / 16)) * (1 if up else -1)
    m = np.concatenate([start + steps, start - steps[1:]])
    m = m[m >= 1]
    near = neighbours(wanted * (exact / m if not rising else np.sqrt(m / exact) if growth > 3 else m / exact))
    hit = factor_of(near) == (m * 2.0**-shift).astype(np.float32)
    if not hit.any():
        return None
    nearest = int(hit.any(axis=0).argmax())
    return np.float32(near[hit[:, nearest].argmax(), nearest])


def snap_pair(s_x: float, s_h: float, s_y: float) -> tuple[np.float32, np.float32] | None:
    """Float32 scales near `s_x` and `s_h` for y = x * h where h is a sum with x as an addend; None if none are near.

    `fl(s_x / s_h)` is exactly a multiple of 2**-RATIO_SHIFT, and `fl(fl(s_x * s_h) / s_y)` one of 2**-SHIFT. The first grows by a
    few steps of the product at most, the second shrinks by a few steps of the ratio.
    """
    least = max(np.ceil(s_x * s_h / s_y * 2.0**SHIFT * (1 - 1e-6)), 1)
    for product in (least + np.arange(8)) * 2.0**-SHIFT:
        start = np.ceil(product * s_y / s_h**2 * 2.0**RATIO_SHIFT)
        ratios = (start + np.arange(24)) * 2.0**-RATIO_SHIFT
        h = neighbours(np.sqrt(product * s_y / ratios))
        x = neighbours(ratios * h.astype(np.float64), 1)
        hits = (x / h == ratios.astype(np.float32)) & (rescale(x, h, s_y) == np.float32(product))
        if hits.any():
            column = hits.any(axis=(0, 1)).argmax()
            near, row = np.unravel_index(hits[..., column].argmax(), hits.shape[:2])
            return np.float32(x[near, row, column]), np.float32(h[row, column])
    return None


def round_shift(values: I64, shift: int) -> I64:
    """RNE(values * 2**-shift) in integers; exact for |values| < 2**62."""
    floor = values >> shift
    odd = floor & 1
    half = np.int64(1) << np.int64(shift - 1) if shift else np.int64(0)
    return (values + half - 1 + odd) >> shift if shift else values


def requantize(acc: Array, m: ArrayLike, zero_point: int, spec: QuantSpec, shift: int = SHIFT) -> Array:
    """`clamp(RNE(acc * m * 2**-shift) + zero_point)`: the reference of every integer kernel.

    acc: int32, any shape; m: int64, a scalar or broadcast against acc. Returns spec.dtype.
    """
    scaled = round_shift(np.asarray(acc, np.int64) * np.asarray(m, np.int64), shift)
    return np.clip(scaled + zero_point, spec.qmin, spec.qmax).astype(spec.dtype)


def add(a: Array, b: Array, p_a: QuantParams, p_b: QuantParams, p_c: QuantParams) -> Array:
    """Quantized a + b in integers; the scale ratios must be dyadic."""
    m_a, m_b = (int(multiplier(p.scale / p_c.scale, RATIO_SHIFT)) for p in (p_a, p_b))
    acc = (np.asarray(a, np.int64) - p_a.zero_point) * m_a + (np.asarray(b, np.int64) - p_b.zero_point) * m_b
    return requantize(acc, 1, p_c.zero_point, p_c.spec, RATIO_SHIFT)


def mul(a: Array, b: Array, p_a: QuantParams, p_b: QuantParams, p_c: QuantParams) -> Array:
    """Quantized a * b in integers; the rescale factor must be dyadic."""
    acc = (np.asarray(a, np.int64) - p_a.zero_point) * (np.asarray(b, np.int64) - p_b.zero_point)
    return requantize(acc, multiplier(rescale(p_a.scale, p_b.scale, p_c.scale)), p_c.zero_point, p_c.spec)
