"""compensate: weights that make up for what the layers before got wrong."""

from __future__ import annotations

import numpy as np
import pytest
from qcompiler_passes.compensate import Moments, compensated

RNG = np.random.default_rng(0)
W = RNG.standard_normal((2, 5, 8)).astype(np.float32)


def moments(x: np.ndarray, d: np.ndarray, centered: bool = True, crossed: bool = True) -> tuple[Moments, Moments]:
    halves = [Moments(x[:, :1] if centered else None, crossed) for _ in range(2)]
    for i, (some, error) in enumerate(zip(np.split(x, 4, axis=1), np.split(d, 4, axis=1), strict=True)):
        halves[i % 2].add(some, error)
    return halves[0], halves[1]


def vectors(count: int = 4000) -> np.ndarray:
    return RNG.standard_normal((2, count, 8)).astype(np.float32)


@pytest.mark.parametrize("centered", [True, False])
def test_errors_that_follow_from_what_is_read_are_taken_out(centered: bool) -> None:
    exact = vectors()
    mixed = np.eye(8) + 0.2 * RNG.standard_normal((8, 8))
    x = (exact @ mixed).astype(np.float32) + (3 if centered else 0)
    found = compensated(W, moments(x, exact - x, centered))
    wanted = W @ np.linalg.inv(mixed).T
    assert np.abs(found - wanted).max() < 0.1 * np.abs(W - wanted).max()


def test_errors_that_follow_from_nothing_leave_the_weights_alone() -> None:
    x = vectors(48)
    assert compensated(W, moments(x, 0.1 * vectors(48))) is W


def test_moments_are_those_about_the_mean_unless_the_mean_counts() -> None:
    x, d = vectors() + 100, vectors()
    both = np.concatenate([x[0], d[0]], axis=1).astype(np.float64)
    centered = moments(x, d)[0] + moments(x, d)[1]
    covariance = np.cov(both.T, bias=True)
    np.testing.assert_allclose(centered.squares()[0], covariance[:8, :8], atol=1e-4)
    np.testing.assert_allclose(centered.products()[0], covariance[:8, 8:], atol=1e-4)
    whole = sum(moments(x, d, centered=False)[1:], moments(x, d, centered=False)[0])
    np.testing.assert_allclose(whole.squares()[0], both[:, :8].T @ both[:, :8] / len(both), rtol=1e-4)
    both_halves = moments(x, d, crossed=False)
    np.testing.assert_array_equal((both_halves[0] + both_halves[1]).squares(), centered.squares())
    mean_x, mean_d = whole.means()
    np.testing.assert_allclose(mean_x[0], both[:, :8].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(mean_d[0], both[:, 8:].mean(axis=0), atol=1e-6)


def test_a_mean_much_larger_than_the_spread_leaves_a_covariance() -> None:
    x = np.float32(300) + 1e-3 * vectors(400)
    found = sum_of(np.split(x, 4, axis=1)).squares()
    np.testing.assert_allclose(found[0], np.cov(x[0].astype(np.float64).T, bias=True), atol=1e-8)
    assert np.all(sum_of([np.full((1, 9, 5), 7.3, np.float32)]).squares() == 0)


def sum_of(parts: list[np.ndarray]) -> Moments:
    whole = Moments(parts[0][:, :1])
    for part in parts:
        whole.add(part, np.zeros_like(part))
    return whole
