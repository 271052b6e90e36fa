"""Collectors: how the range of one tensor is measured."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from fractions import Fraction
from typing import Protocol, Self

import numpy as np

from qcompiler.histogram import BINS, Histogram, bins_of, rough_clip_range
from qcompiler.quant import F32, I64, QuantParams, QuantSpec, params_from_range


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
        if not (math.isfinite(low) and math.isfinite(high) and np.isfinite(values).all()):
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


class MovingAverage(MinMax):
    """The range between the mean of the least and the mean of the greatest values of the samples.

    That is what the moving averages of Jacob et al. 2017 (arXiv 1712.05877) and FQ-ViT (arXiv 2111.13824) estimate, with the
    same weight for all samples, so that their order does not matter. Sums are exact rational numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.lows = self.highs = Fraction()

    def observe(self, low: float, high: float, values: F32) -> None:
        """Add the bounds to the sums."""
        super().observe(low, high, values)
        self.count += 1
        self.lows += Fraction(low)
        self.highs += Fraction(high)

    def merge(self, other: Self) -> None:
        """Add the other's sums."""
        super().merge(other)
        self.count += other.count
        self.lows += other.lows
        self.highs += other.highs

    def finish(self, spec: QuantSpec) -> QuantParams:
        """Cover the range between the means. Raises ValueError if nothing was observed."""
        widest = super().finish(spec)
        if self.low == self.high:
            return widest
        mean = params_from_range(float(self.lows / self.count), float(self.highs / self.count), spec)
        return min(mean, widest, key=lambda params: float(params.scale))


class _Counting(MinMax, ABC):
    """Counts the sampled values in bins."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: I64 = np.zeros(BINS, np.int64)

    def observe(self, low: float, high: float, values: F32) -> None:
        """Add the values to the histogram."""
        super().observe(low, high, values)
        np.add.at(self.counts, bins_of(values), 1)

    def merge(self, other: Self) -> None:
        """Add the other's histogram."""
        super().merge(other)
        self.counts += other.counts

    def finish(self, spec: QuantSpec) -> QuantParams:
        """Choose a range from the histogram. Raises ValueError if nothing was observed."""
        widest = super().finish(spec)
        if self.low == self.high or not self.counts.any():
            return widest
        clipped = self.clipped(widest, Histogram.of(self.counts, self.low, self.high))
        return min(clipped, widest, key=lambda params: float(params.scale))

    @abstractmethod
    def clipped(self, widest: QuantParams, histogram: Histogram) -> QuantParams:
        """The params of the chosen range, given those of the widest."""


class Percentile(_Counting):
    """The range without the outermost 0.005 % of the sampled values at either end: 99.99 % of them."""

    def clipped(self, widest: QuantParams, histogram: Histogram) -> QuantParams:
        """Cut both tails."""
        cut = (1 - 0.9999) / 2
        return params_from_range(histogram.quantile(cut), histogram.quantile(1 - cut), widest.spec)


class Entropy(_Counting):
    """The range that minimizes the Kullback-Leibler divergence of the quantized from the sampled values.

    After Migacz, "8-bit inference with TensorRT", GTC 2017, for ranges with two ends: each end is searched in turn, over five
    octaves. Zeros are left out, because they are exact under all params.
    """

    def clipped(self, widest: QuantParams, histogram: Histogram) -> QuantParams:
        """Search the high end, the low end, and the high end again."""
        histogram = histogram.without_zeros()
        best, low, high = widest, self.low, self.high
        for end in ("high", "low", "high"):
            if high > 0 if end == "high" else low < 0:
                fractions = 2.0 ** (-np.arange(40) / 8)
                ranges = [(low, self.high * f) if end == "high" else (self.low * f, high) for f in fractions]
                params = [params_from_range(a, b, widest.spec) for a, b in ranges]
                choice = int(np.argmin(histogram.divergences(params)))
                best, (low, high) = params[choice], ranges[choice]
        return best


class Omse(_Counting):
    """The clip range that minimizes the mean squared quantization error over the values of all samples.

    Choukroun et al. 2019, arXiv 1902.06822; for activations as in FQ-ViT, arXiv 2111.13824.
    """

    def observe(self, low: float, high: float, values: F32) -> None:
        """Add the values and the bounds to the histogram."""
        # The bounds are exact, and a sample of the values rarely holds them: a few huge activations may carry a transformer.
        super().observe(low, high, np.append(values, np.array([low, high], values.dtype)))

    def clipped(self, widest: QuantParams, histogram: Histogram) -> QuantParams:
        """Search the clip range, never beyond the range observed."""
        best, spec = widest, widest.spec
        low, high = rough_clip_range(histogram, spec)
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


COLLECTORS: Mapping[str, type[Collector]] = {
    "minmax": MinMax,
    "omse": Omse,
    "ema": MovingAverage,
    "percentile": Percentile,
    "entropy": Entropy,
}
"""The built-in collectors, by the name that users type."""
