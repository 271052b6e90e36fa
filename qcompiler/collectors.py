"""Collectors: how the range of one tensor is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from qcompiler.quant import F32, I64, QuantParams, QuantSpec, params_from_range

F64 = NDArray[np.float64]


class Collector(Protocol):
    """Statistics of one tensor. `merge` is associative, commutative and exact, so order and sharding cannot matter."""

    def observe(self, low: float, high: float, values: F32) -> None:
        """Take in one tensor: its exact least and greatest value, and a sample of its values (1-D, contiguous).

        Raises ValueError if any of them is not finite.
        """

    def merge(self, other: Self) -> None:
        """Take in all that another collector of the same tensor has seen."""

    def finish(self, spec: QuantSpec) -> QuantParams:
        """Choose per-tensor params. Raises ValueError if nothing was observed."""
        ...


class MinMax:
    """The range from the least to the greatest value seen."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf

    def observe(self, low: float, high: float, values: F32) -> None:
        """Widen the range."""
        if not (np.isfinite(low) and np.isfinite(high) and np.isfinite(values).all()):
            raise ValueError("a value is not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)

    def merge(self, other: Self) -> None:
        """Widen the range to that of both."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def finish(self, spec: QuantSpec) -> QuantParams:
        """Cover the whole range. Raises ValueError if nothing was observed."""
        if self.low > self.high:
            raise ValueError("no value was observed")
        return params_from_range(self.low, self.high, spec)


_DROPPED_BITS = 18
"""Of a float32, sign, exponent and 5 bits of the mantissa select the bin: 32 bins an octave."""

_BINS = 2 ** (32 - _DROPPED_BITS)


class Omse(MinMax):
    """The clip range that minimizes the mean squared quantization error over the values of all samples.

    Choukroun et al. 2019, arXiv 1902.06822; for activations as in FQ-ViT, arXiv 2111.13824. The values are kept as a histogram
    over the bit patterns of float32: its bins need no range in advance, so that histograms add up exactly; 128 KiB.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: I64 = np.zeros(_BINS, np.int64)

    def observe(self, low: float, high: float, values: F32) -> None:
        """Add the values to the histogram."""
        super().observe(low, high, values)
        # The bounds are exact, and a sample of the values rarely holds them: a few huge activations may carry a transformer.
        seen = np.append(values, np.array([low, high], np.float32))
        self.counts += np.bincount(seen.view(np.uint32) >> _DROPPED_BITS, minlength=_BINS)

    def merge(self, other: Self) -> None:
        """Add the other's histogram."""
        super().merge(other)
        self.counts += other.counts

    def finish(self, spec: QuantSpec) -> QuantParams:
        """Search the clip range, never beyond the range observed. Raises ValueError if nothing was observed."""
        widest = super().finish(spec)
        if self.low == self.high == 0 or not self.counts.any():
            return widest
        histogram = _Histogram.of(self.counts, self.low, self.high)
        low, high = _roughly(histogram, spec)
        best = widest
        for step in (0.03, 0.0075):
            factors = 1 + step * np.arange(-3, 4)
            lows = np.unique(np.maximum(low * factors, min(self.low, 0.0)))
            highs = np.unique(np.minimum(high * factors, max(self.high, 0.0)))
            ranges = [(a, b) for a in lows for b in highs]
            params = [best, *(params_from_range(a, b, spec) for a, b in ranges)]
            choice = int(np.argmin(histogram.errors(params)))
            best = params[choice]
            low, high = ranges[choice - 1] if choice else (low, high)
        return best


class _Histogram:
    """Counts of values that are uniform between the edges `a` < `b` of their bin; bins in ascending order."""

    def __init__(self, a: F64, b: F64, counts: F64) -> None:
        self.a, self.b, self.counts = a, b, counts

    @classmethod
    def of(cls, counts: I64, low: float, high: float) -> _Histogram:
        """The occupied bins, cut to the exact range."""
        half = _BINS // 2
        order = np.concatenate([np.arange(_BINS - 1, half - 1, -1), np.arange(half)])
        bins = order[counts[order] > 0]
        inner = ((bins % half) << _DROPPED_BITS).astype(np.uint32).view(np.float32).astype(np.float64)
        outer = ((bins % half + 1) << _DROPPED_BITS).astype(np.uint32).view(np.float32).astype(np.float64)
        negative = bins >= half
        a = np.clip(np.where(negative, -outer, inner), low, high)
        b = np.clip(np.where(negative, -inner, outer), low, high)
        # A bin that the cut leaves without width holds one value, the bound.
        return cls(a, np.maximum(b, a + 1e-6 * np.abs(a)), counts[bins].astype(np.float64))

    def errors(self, params: list[QuantParams]) -> F64:
        """The sum of squared errors under each of the params, less a constant.

        The error of u = x / scale is u - k, k the nearest integer in use, so that its square has the antiderivative
        k / 12 + (u - k)**3 / 3: exact for rounding and clipping alike, however wide the bin is.
        """
        scale = np.array([float(p.scale) for p in params])[:, None]
        # Where all candidates round to zero they have the same error.
        seen = np.maximum(np.abs(self.a), np.abs(self.b)) > scale.min() / 2
        edges = np.concatenate([self.a[seen], self.b[seen]])
        least = np.array([p.spec.qmin - p.zero_point for p in params], np.float64)[:, None]
        greatest = np.array([p.spec.qmax - p.zero_point for p in params], np.float64)[:, None]
        u = edges / scale
        k = np.clip(np.rint(u), least, greatest)
        u -= k
        area = k / 12 + u * u * u / 3
        half = edges.size // 2
        width = edges[half:] - edges[:half]
        return np.asarray(((area[:, half:] - area[:, :half]) * scale**3) @ (self.counts[seen] / width))


def _roughly(histogram: _Histogram, spec: QuantSpec) -> tuple[float, float]:
    """The best clip range on a coarse grid, if rounding errors were `step**2 / 12` each, or x**2 next to zero.

    With running moments a candidate costs a few look-ups, so that all pairs of bounds over 12 octaves can be tried.
    """
    a, b, n = histogram.a, histogram.b, histogram.counts
    moments = np.cumsum([n, n * (a + b) / 2, n * (a * a + a * b + b * b) / 3], axis=1)
    moments = np.pad(moments, ((0, 0), (1, 0)))
    fractions = np.append(2.0 ** (-np.arange(12 * 8) / 8), 0.0)
    low = min(a[0], 0.0) * (fractions if a[0] < 0 else fractions[-1:])[:, None]
    high = max(b[-1], 0.0) * (fractions if b[-1] > 0 else fractions[-1:])[None, :]
    first, last = np.searchsorted(a, low), np.searchsorted(b, high, side="right")
    step = (2 * np.maximum(-low, high) if spec.symmetric else high - low) / spec.steps
    near = moments[:, np.searchsorted(b, step / 2, side="right")] - moments[:, np.searchsorted(a, -step / 2)]
    rounded = np.maximum(moments[0, last] - moments[0, first] - near[0], 0)
    clipped = _squares(moments[:, first], low) + _squares(moments[:, -1:, None] - moments[:, last], high)
    i, j = np.unravel_index(int(np.argmin(clipped + near[2] + rounded * step**2 / 12)), step.shape)
    return float(low[i, 0]), float(high[0, j])


def _squares(moments: F64, bound: F64) -> F64:
    """The sum of (x - bound)**2 from the sums of 1, x and x**2."""
    return np.asarray(moments[2] - 2 * bound * moments[1] + bound * bound * moments[0])


COLLECTORS: Mapping[str, type[Collector]] = {"minmax": MinMax, "omse": Omse}
"""The built-in collectors, by the name that users type."""
