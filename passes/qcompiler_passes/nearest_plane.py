"""Rounding weights so that their errors cancel on the data that they are multiplied with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qcompiler.quant import F32

_STRIPE = 128
"""Columns whose errors are passed on one by one; those of whole stripes go through one matrix product."""


def spread(total: int, wanted: int, sample: int) -> NDArray[np.intp]:
    """`wanted` of `total` positions, at even distances, shifted from sample to sample by the golden ratio."""
    distance = max(total / wanted, 1.0)
    start = sample * 0.6180339887 % 1.0 * distance
    positions = np.arange(start, total, distance).astype(np.intp)
    return positions[positions < total]  # rounding may add one


def damp(hessian: NDArray[np.floating], damping: float) -> None:
    """Add to the diagonals, in place, `damping` times their mean, so that few vectors still make a definite matrix."""
    diagonal = np.einsum("gkk->gk", hessian)
    diagonal += damping * diagonal.mean(axis=1, keepdims=True) + np.finfo(np.float32).tiny


def nearest_plane(weights: F32, scale: F32, hessian: F32, qmin: int, qmax: int) -> F32:
    """Integers q in qmin..qmax, as float32, that make (scale q - weights) hessian (scale q - weights)^T small.

    weights: (groups, rows, columns); scale: the same shape; hessian: (groups, columns, columns), positive definite. One weight
    is rounded after the other, and those that are left make up for its error (GPTQ, Frantar et al. 2022, arXiv 2210.17323). Done
    from the last column of the Cholesky factor of the Hessian to the first, this is Babai's nearest plane (Chen et al. 2025,
    arXiv 2507.18553), and takes no inverse.
    """
    # The columns of the largest inputs come last, hence are rounded first, when most others can still make up for them.
    order = np.argsort(np.einsum("gkk->k", hessian), kind="stable")
    factor = np.linalg.cholesky(hessian[:, order][:, :, order].astype(np.float64)).astype(np.float32)
    w, steps = weights[:, :, order], scale[:, :, order]
    q, error = np.zeros_like(w), np.zeros_like(w)
    for end in range(w.shape[2], 0, -_STRIPE):
        begin = max(end - _STRIPE, 0)
        pull = error[:, :, end:] @ factor[:, end:, begin:end]
        for k in range(end - 1, begin - 1, -1):
            wanted = w[:, :, k] - pull[:, :, k - begin] / factor[:, None, k, k]
            q[:, :, k] = np.clip(np.rint(wanted / steps[:, :, k]), qmin, qmax)
            error[:, :, k] = q[:, :, k] * steps[:, :, k] - w[:, :, k]
            pull[:, :, : k - begin] += error[:, :, k, None] * factor[:, None, k, begin:k]
    return q[:, :, np.argsort(order)]
