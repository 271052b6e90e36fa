"""Weights that lie on a grid, as those of a model do that was trained or calibrated with quantization."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qcompiler import quant
from qcompiler.quant import F32, QuantSpec

_TOLERANCE = 1e-3
"""How far, in steps, a weight may be from the grid: rounding in float32 and folded factors move it by about 1e-5."""

_FIRST = 8
"""Weights of a channel that are tried before all of them are."""

LARGEST_ERROR = 0.003
"""A channel whose multiplier would change by more is rounded anew: errors of single weights cancel, those of a factor do not."""

LARGEST_MULTIPLIER = 2**20
"""Above it, finer steps are better: the factor would be larger than measured ranges ever give."""


def steps(rows: F32, spec: QuantSpec) -> NDArray[np.float64]:
    """The largest step of which all weights of a row are multiples within the spec's range, (channels,); 0 where there is none.

    rows: shape (channels, weights per channel). A grid survives whatever multiplies whole channels, such as a folded
    BatchNormalization, and whatever moves weights or adds zeros; so nothing has to be remembered of where weights came from.
    """
    peaks = np.abs(rows).max(axis=1, initial=0).astype(np.float64)
    found = np.zeros(len(rows))
    open_rows = np.flatnonzero(peaks > 0)
    for peak in range(1, -spec.qmin + 1):
        hits = open_rows[_fits(rows[open_rows, :_FIRST], peaks[open_rows], peak, spec)]
        hits = hits[_fits(rows[hits], peaks[hits], peak, spec)]
        found[hits] = peaks[hits] / peak
        open_rows = np.setdiff1d(open_rows, hits, assume_unique=True)
        if not open_rows.size:
            break
    return found


def _fits(rows: F32, peaks: NDArray[np.float64], peak: int, spec: QuantSpec) -> NDArray[np.bool_]:
    scaled = rows * (peak / peaks)[:, None]
    near = np.abs(scaled - np.rint(scaled)) < _TOLERANCE
    return np.asarray((near & (scaled < spec.qmax + 0.5)).all(axis=1))


def on_grid(step: NDArray[np.float64], s_x: float, s_y: float | None) -> F32:
    """The weight scales for the steps of a grid whose integers are kept, (channels,); 0 where there is no grid.

    The rescale factor is rounded to the nearest `m * 2**-SHIFT`; what that changes by more than `LARGEST_ERROR` has no grid.
    """
    scale = step.astype(np.float32)
    if s_y is None:
        return scale
    m = np.rint(step * s_x / s_y * 2.0**quant.SHIFT)
    scale[(m < 8) | (m > LARGEST_MULTIPLIER)] = 0
    for i in np.flatnonzero(scale):
        near = _nearest(step[i], m[i], s_x, s_y)
        scale[i] = near if abs(near / step[i] - 1) <= LARGEST_ERROR else 0
    return scale


def _nearest(step: float, m: float, s_x: float, s_y: float) -> np.float32:
    """The scale nearest to `step` whose factor is dyadic; a few m have no float32 scale."""
    candidates = quant.scale_for_multiplier(m - np.arange(4), s_x, s_y)
    return np.float32(candidates[np.abs(candidates - step).argmin()])


def rounded(rows: F32, scale: F32, kernel: int, spec: QuantSpec) -> NDArray[np.float64]:
    """Integers next to rows / scale whose rounding errors nearly cancel over each kernel, then over each channel.

    rows: (channels, weights per channel); scale: (channels,); kernel: how many weights read one input channel. What a kernel
    reads is much alike, so that the sum of its errors counts; no data is needed (SQuant, Guo et al. 2022, arXiv 2202.07471).
    """
    exact = rows / scale.astype(np.float64)[:, None]
    nearest = np.rint(exact)
    if kernel > 1:
        by_kernel = (len(rows), rows.shape[1] // kernel, kernel)
        nearest = _cancelled(nearest.reshape(by_kernel), exact.reshape(by_kernel)).reshape(rows.shape)
    return np.clip(_cancelled(nearest, exact), spec.qmin, spec.qmax)


def _cancelled(integers: NDArray[np.float64], exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move those integers by one that are farthest off, until the sum over the last axis is off by a half at most."""
    errors = integers - exact
    surplus = np.rint(errors.sum(axis=-1, keepdims=True))
    rank = errors.argsort(axis=-1, kind="stable").argsort(axis=-1)
    return np.asarray(integers - (rank >= rank.shape[-1] - surplus) + (rank < -surplus))
