"""Histograms over the bit patterns of float32, and what they tell about clip ranges.

Sign, exponent and 5 bits of the mantissa select the bin: 32 bins an octave, 128 KiB. The bins need no range in advance, so
that histograms add up exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qcompiler.quant import F32, I64, QuantParams, QuantSpec

F64 = NDArray[np.float64]

_DROPPED_BITS = 18

BINS = 2 ** (32 - _DROPPED_BITS)


def bins_of(values: F32) -> NDArray[np.uint32]:
    """The number of the bin of each value; values must be contiguous."""
    return values.view(np.uint32) >> np.uint32(_DROPPED_BITS)


class Histogram:
    """Counts of values that are uniform between the edges `a` < `b` of their bin; bins in ascending order."""

    def __init__(self, a: F64, b: F64, counts: F64) -> None:
        self.a, self.b, self.counts = a, b, counts

    @classmethod
    def of(cls, counts: I64, low: float, high: float) -> Histogram:
        """The occupied bins, cut to the exact range."""
        half = BINS // 2
        order = np.concatenate([np.arange(BINS - 1, half - 1, -1), np.arange(half)])
        bins = order[counts[order] > 0]
        inner = ((bins % half) << _DROPPED_BITS).astype(np.uint32).view(np.float32).astype(np.float64)
        outer = ((bins % half + 1) << _DROPPED_BITS).astype(np.uint32).view(np.float32).astype(np.float64)
        negative = bins >= half
        a = np.clip(np.where(negative, -outer, inner), low, high)
        b = np.clip(np.where(negative, -inner, outer), low, high)
        # A bin that the cut leaves without width holds one value, the bound.
        return cls(a, np.maximum(b, a + 1e-6 * np.abs(a)), counts[bins].astype(np.float64))

    def without_zeros(self) -> Histogram:
        """The same without the bins next to zero, unless they hold all there is."""
        kept = np.maximum(np.abs(self.a), np.abs(self.b)) > float(np.finfo(np.float32).tiny)
        return Histogram(self.a[kept], self.b[kept], self.counts[kept]) if kept.any() else self

    def quantile(self, share: float) -> float:
        """The number below which this share of all values lies."""
        return float(np.interp(share, *self._distribution()[::-1]))

    def _distribution(self) -> tuple[F64, F64]:
        """Numbers in ascending order, and the share of values below each."""
        edges = np.stack([self.a, self.b], axis=1).reshape(-1)
        below = np.cumsum(self.counts) / self.counts.sum()
        return edges, np.stack([np.append(0.0, below[:-1]), below], axis=1).reshape(-1)

    def divergences(self, params: Sequence[QuantParams]) -> F64:
        """The Kullback-Leibler divergence of the quantized values from the values, under each of the params.

        A step of the quantizer is cut into equal cells; quantized values spread evenly over those cells of their step that hold
        values at all. Values out of range count to the outermost steps, where no quantized value makes up for them.
        """
        edges, below = self._distribution()
        return np.array([_divergence(p, edges, below, 0.5 / self.counts.sum()) for p in params])

    def errors(self, params: Sequence[QuantParams]) -> F64:
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


_CELLS = 8
"""Cells of a quantization step: 2,048 over the range of 8 bits, as many as TensorRT has over the range of a tensor."""


def _divergence(params: QuantParams, edges: F64, below: F64, least: float) -> float:
    """`edges`, `below`: a distribution; `least`: the share that a step is taken to keep if only clipped values reach it."""
    spec = params.spec
    bounds = np.arange((spec.steps + 1) * _CELLS + 1) / _CELLS + (spec.qmin - params.zero_point - 0.5)
    shares = np.interp(bounds * float(params.scale), edges, below)
    cells = np.maximum(np.diff(shares), 0).reshape(-1, _CELLS)
    kept = cells.sum(axis=1)
    wanted = kept.copy()
    wanted[0] += shares[0]
    wanted[-1] += 1 - shares[-1]
    used = kept > 0
    even = kept[used] / np.count_nonzero(cells[used], axis=1)
    logs = np.log(np.where(cells[used] > 0, cells[used] / even[:, None], 1))
    lost = (cells[used] * logs).sum(axis=1) / kept[used]
    reached = wanted > 0
    clipped = np.log(wanted[reached] / np.maximum(kept[reached], least))
    return float(wanted[used] @ lost + wanted[reached] @ clipped + np.log(max(kept.sum(), least)))


def rough_clip_range(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
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
