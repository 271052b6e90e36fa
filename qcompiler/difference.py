"""How far arrays are from those of the float model, summed over samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def arrays(value: Any) -> list[Array]:
    """The arrays in an output of a model: itself, those in a sequence or a map, or none in an optional value that is missing."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [array for inner in value for array in arrays(inner)]
    return [] if value is None else [np.asarray(value)]


@dataclass(frozen=True)
class Error:
    """How far a tensor is from the float model's: SQNR in dB (None if exact), cosine, and the largest absolute difference."""

    sqnr: float | None
    cosine: float
    max_error: float


@dataclass(frozen=True)
class OutputError:
    """The error of a graph output; `agreement`: the share of rows with the same greatest column, for outputs of shape [N, C]."""

    name: str
    error: Error
    agreement: float | None


class Difference:
    """Sums over arrays x and y; positions where x is not finite do not count."""

    def __init__(self) -> None:
        self.signal = self.noise = self.other = self.dot = self.greatest = 0.0

    def add(self, x: Array, y: Array) -> None:
        """Take in two arrays of one shape."""
        finite = np.isfinite(x)
        wide, near = x[finite].astype(np.float64), y[finite].astype(np.float64)
        gap = wide - near
        self.signal += float(wide @ wide)
        self.other += float(near @ near)
        self.dot += float(wide @ near)
        self.noise += float(gap @ gap)
        self.greatest = max(self.greatest, float(np.max(np.abs(gap), initial=0)))

    def error(self) -> Error:
        """SQNR = 10 log10(sum x**2 / sum (x - y)**2); cosine = sum xy / sqrt(sum x**2 sum y**2), 1 for two zeros."""
        sqnr = 10 * float(np.log10((self.signal + 1e-300) / self.noise)) if self.noise else None
        norm = float(np.sqrt(self.signal) * np.sqrt(self.other))
        cosine = self.dot / norm if norm else float(self.signal == self.other)
        return Error(None if sqnr is None else round(sqnr, 3), round(cosine, 7), float(f"{self.greatest:.6g}"))


class OutputDifference:
    """The difference of one graph output over samples."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._total = Difference()
        self._rows = self._equal = 0

    def add(self, x: Any, y: Any) -> None:
        """Take in the output for a sample; shapes that depend on the data and differ, and text, are passed over."""
        for a, b in zip(arrays(x), arrays(y), strict=False):
            if a.shape == b.shape and a.dtype.kind in "fiub":
                self._add(a, b)

    def _add(self, x: Array, y: Array) -> None:
        self._total.add(x, y)
        if x.ndim == 2 and x.shape[1] > 1:
            self._rows += len(x)
            self._equal += int(np.count_nonzero(x.argmax(axis=1) == y.argmax(axis=1)))

    def error(self) -> OutputError:
        """The error so far."""
        return OutputError(self.name, self._total.error(), round(self._equal / self._rows, 6) if self._rows else None)
