"""The steps on which weights lie."""

from __future__ import annotations

import numpy as np
from qcompiler_passes.import_weights import LARGEST_ERROR, on_grid, rounded, steps

from qcompiler import quant
from qcompiler.quant import QuantSpec

INT8 = QuantSpec("int8", -128, 127, symmetric=True)


def test_the_step_of_dequantized_weights() -> None:
    rng = np.random.default_rng(0)
    integers = rng.integers(-127, 128, (5, 40))
    integers[:, 0], integers[:, 1] = 127, 1
    scale = np.array([0.001, 0.5, 3e-5, 1.0, 0.0123])
    rows = (integers * scale[:, None]).astype(np.float32)
    np.testing.assert_allclose(steps(rows, INT8), scale, rtol=1e-6)


def test_a_common_divisor_is_part_of_the_step() -> None:
    np.testing.assert_allclose(steps(np.array([[0.2, -0.4, 0.0, 0.6]], np.float32), INT8), [0.2], rtol=1e-6)


def test_float_weights_have_none() -> None:
    rows = np.random.default_rng(1).standard_normal((20, 30)).astype(np.float32)
    assert not steps(rows, INT8).any()
    assert not steps(np.zeros((2, 3), np.float32), INT8).any()


def test_more_integers_than_there_are_have_none() -> None:
    rows = np.array([[200.0, 199.0, 1.0]], np.float32)
    assert steps(rows, INT8)[0] == 0
    assert steps(rows, QuantSpec("int16", -255, 255))[0] == 1


def test_only_negative_weights_reach_the_least_integer() -> None:
    rows = np.array([[-128.0, 127.0, 1.0], [128.0, -127.0, 1.0]], np.float32)
    assert steps(rows, INT8).tolist() == [1.0, 0.0]


def test_scales_are_next_to_the_steps_and_dyadic() -> None:
    step = np.linspace(0.001, 0.02, 50)
    scale = on_grid(step, 0.03, 0.05)
    kept = scale > 0
    assert kept.sum() > 35
    assert np.abs(scale[kept] / step[kept] - 1).max() <= LARGEST_ERROR
    assert quant.is_dyadic(quant.rescale(0.03, scale[kept], 0.05)).all()


def test_a_multiplier_that_would_change_much_is_not_taken() -> None:
    assert on_grid(np.array([1.5 * 2.0**-16]), 1.0, 1.0)[0] == 0


def test_a_float_result_takes_the_step_as_it_is() -> None:
    assert on_grid(np.array([0.0, 0.0123]), 0.1, None).tolist() == [0.0, np.float32(0.0123)]


def test_rounding_errors_cancel_over_kernels_and_channels() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 8 * 9)).astype(np.float32)
    scale = np.full(6, 0.05, np.float32)
    integers = rounded(rows, scale, 9, INT8)
    errors = integers - rows / 0.05
    assert np.abs(errors).max() <= 2
    assert np.abs(errors.reshape(6, 8, 9).sum(axis=2)).max() <= 1.5
    assert np.abs(errors.sum(axis=1)).max() <= 0.5
    nearest = np.rint(rows / 0.05) - rows / 0.05
    assert np.abs(nearest.sum(axis=1)).max() > 1
    assert np.square(errors).sum() < 1.5 * np.square(nearest).sum()
    np.testing.assert_array_equal(rounded(rows[:0], scale[:0], 9, INT8), np.empty((0, 72)))
