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
    hold nothing but rounding. None where the mean counts, because no bias takes care of it. `crossed`: whether products of x
    with d are wanted, or only their means.
    """

    origin: F32 | None
    crossed: bool = True
    xx: Any = 0
    xd: Any = 0

    def add(self, x: F32, d: F32) -> None:
        """Take in vectors, both of shape (groups, vectors, weights per output channel)."""
        # A column of ones: the products then hold the sums, too, and the count.
        rows = np.ones((*x.shape[:2], x.shape[2] + 1), np.float32)
        np.subtract(x, 0 if self.origin is None else self.origin, out=rows[:, :, :-1])
        columns = rows.transpose(0, 2, 1)
        self.xx = self.xx + columns @ rows
        self.xd = self.xd + (columns @ d if self.crossed else d.sum(axis=1, keepdims=True))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.origin, self.crossed, self.xx + other.xx, self.xd + other.xd)

    def means(self) -> tuple[F64, F64]:
        """Of x and of d: (groups, weights) each."""
        x, d = (sums[:, -1] / self._count for sums in (self.xx[:, :, :-1], self.xd))
        return x if self.origin is None else x + self.origin[:, 0], d

    def squares(self) -> F64:
        """The mean of x^T x, less that of the means where these do not count: (groups, weights, weights)."""
        return self._mean(self.xx[:, :, :-1])

    def products(self) -> F64:
        """The same of x^T d."""
        return self._mean(self.xd)

    @property
    def _count(self) -> np.float64:
        return np.float64(self.xx[0, -1, -1])

    def _mean(self, sums: F32) -> F64:
        means = sums / self._count
        if self.origin is None:
            return np.asarray(means[:, :-1])
        return np.asarray(means[:, :-1] - self.xx[:, :-1, -1:] / self._count * means[:, -1:])


def compensated(weights: F32, halves: tuple[Moments, Moments]) -> F32:
    """Weights w + w M with which a layer gives, on the x it reads, what w gave on the float vectors x + d.

    weights: (groups, rows, columns). M solves the ridge regression of d on x, in closed form (asymmetric calibration: GPTAQ,
    Li et al. 2025, arXiv 2504.02692). How much it is damped is what serves one half of the samples best when learned from the
    other: a layer whose errors do not follow from what it reads keeps its weights.
    """
    rows = weights.astype(np.float64).transpose(0, 2, 1)
    parts = [_products(half, rows) for half in halves]
    gains = [sum(_excess(_change(*parts[i], d), *parts[1 - i]) for i in (0, 1)) for d in _DAMPINGS]
    best = int(np.argmin(gains))
    if not gains[best] < 0:
        return weights
    change = _change(*_products(halves[0] + halves[1], rows), _DAMPINGS[best])
    return np.asarray((rows + change).transpose(0, 2, 1), np.float32)


def _products(moments: Moments, rows: F64) -> tuple[F64, F64]:
    """The means of x^T x and of x^T (d w), w as the columns of `rows`."""
    return moments.squares(), moments.products() @ rows


def _change(xx: F64, xdw: F64, damping: float) -> F64:
    damped = xx.copy()
    damp(damped, damping)
    return np.asarray(np.linalg.solve(damped, xdw))


def _excess(change: F64, xx: F64, xdw: F64) -> float:
    """By how much (x change - d w)^2 exceeds (d w)^2, on average over all vectors."""
    return float(np.sum(change * (xx @ change - 2 * xdw)))
