"""Weights that make up for what the layers before got wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.quant import F32
from qcompiler_passes.nearest_plane import damp

F64 = NDArray[np.float64]

_DAMPINGS = (0.01, 0.1, 0.5, 2.0)


@dataclass
class Moments:
    """Sums over the vectors x that the weights of a layer are multiplied with, and over d, what they lack of the float vectors.

    `origin`: where x is measured from, (groups, 1, weights): with a mean much larger than the spread, sums of squares would
    hold nothing but rounding. None where the mean counts, because no bias takes care of it.
    """

    origin: F32 | None
    xx: Any = 0
    xd: Any = 0
    x: Any = 0
    d: Any = 0
    count: int = 0

    def add(self, x: F32, d: F32) -> None:
        """Take in vectors, both of shape (groups, vectors, weights per output channel)."""
        x = x if self.origin is None else x - self.origin
        rows = x.transpose(0, 2, 1)
        sums = (rows @ x, rows @ d, x.sum(axis=1, dtype=np.float64), d.sum(axis=1, dtype=np.float64), x.shape[1])
        self.xx, self.xd, self.x, self.d, self.count = (a + b for a, b in zip(self._sums(), sums, strict=True))

    def _sums(self) -> tuple[Any, ...]:
        return self.xx, self.xd, self.x, self.d, self.count

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.origin, *(a + b for a, b in zip(self._sums(), other._sums(), strict=True)))

    def means(self) -> tuple[F64, F64]:
        """Of x and of d: (groups, weights) each."""
        mean = self.x / self.count
        return mean if self.origin is None else mean + self.origin[:, 0], self.d / self.count

    def products(self) -> tuple[F64, F64]:
        """The means of x^T x and x^T d, less those of the means where these do not count: (groups, weights, weights) each."""
        xx, xd = self.xx / self.count, self.xd / self.count
        if self.origin is not None:
            x, d = self.x[:, :, None] / self.count, self.d[:, None, :] / self.count
            xx, xd = xx - x * x.transpose(0, 2, 1), xd - x * d
        return np.asarray(xx, np.float64), np.asarray(xd, np.float64)


def compensated(weights: F32, halves: tuple[Moments, Moments]) -> F32:
    """Weights w + w M with which a layer gives, on the x it reads, what w gave on the float vectors x + d.

    weights: (groups, rows, columns). M solves the ridge regression of d on x, in closed form (asymmetric calibration: GPTAQ,
    Li et al. 2025, arXiv 2504.02692). How much it is damped is what serves one half of the samples best when learned from the
    other: a layer whose errors do not follow from what it reads keeps its weights.
    """
    w = weights.astype(np.float64)
    parts = [half.products() for half in halves]
    gains = [sum(_excess(w, w @ _map(*parts[i], damping), *parts[1 - i]) for i in (0, 1)) for damping in _DAMPINGS]
    best = int(np.argmin(gains))
    if not gains[best] < 0:
        return weights
    return np.asarray(w + w @ _map(*(halves[0] + halves[1]).products(), _DAMPINGS[best]), np.float32)


def _map(xx: F64, xd: F64, damping: float) -> F64:
    damped = xx.copy()
    damp(damped, damping)
    return np.asarray(np.linalg.solve(damped, xd).transpose(0, 2, 1))


def _excess(w: F64, change: F64, xx: F64, xd: F64) -> float:
    """By how much (change x - w d)^2 exceeds (w d)^2, on average over all vectors."""
    return float(np.sum((change @ xx - 2 * (w @ xd.transpose(0, 2, 1))) * change))
