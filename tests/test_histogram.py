from __future__ import annotations

import numpy as np
import pytest

from qcompiler.histogram import BINS, Histogram, bins_of
from qcompiler.quant import QuantSpec, params_from_range

U8 = QuantSpec("uint8", 0, 255)


def histogram(x: np.ndarray) -> Histogram:
    return Histogram.of(np.bincount(bins_of(x), minlength=BINS), float(x.min()), float(x.max()))


def normal(size: int = 100_000) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(size).astype(np.float32)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("shift", [0.0, 10.0, -10.0])
def test_quantiles_are_those_of_the_values(share: float, shift: float) -> None:
    x = normal() + np.float32(shift)
    wide = 0.02 if shift == 0 else 0.3  # a bin is 3 % of its value wide
    assert histogram(x).quantile(share) == pytest.approx(np.quantile(x, share), abs=wide)


def test_quantiles_stay_in_the_range() -> None:
    x = np.array([0, 1.5], np.float32)
    assert histogram(x).quantile(1) == pytest.approx(1.5, rel=1e-5)
    assert histogram(x).quantile(0) == pytest.approx(0)


def test_zeros_are_left_out_of_divergences_but_not_of_quantiles() -> None:
    x = np.maximum(normal(), 0)
    assert histogram(x).quantile(0.4) == pytest.approx(0, abs=1e-6)
    assert histogram(x).without_zeros().counts.sum() == np.count_nonzero(x)
    assert histogram(np.zeros(5, np.float32)).without_zeros().counts.sum() == 5


def test_divergence_is_small_where_steps_are_fine_and_nothing_is_clipped() -> None:
    x = histogram(np.random.default_rng(0).uniform(-1, 1, 200_000).astype(np.float32))
    exact, coarse, clipped, hopeless = x.divergences([params_from_range(-r, r, U8) for r in (1, 20, 0.5, 1e-3)])
    assert 0 <= exact < 0.01
    assert exact < coarse
    assert clipped > 0.3
    assert hopeless > clipped


def test_divergence_is_finite_and_large_where_clipped_values_have_no_place() -> None:
    x = histogram(np.append(np.tile(np.float32([1, 2, 3]), 100), np.float32([100] * 30)).astype(np.float32))
    clipped, kept = x.divergences([params_from_range(0, 50, U8), params_from_range(0, 101, U8)])
    assert kept < clipped < np.inf
