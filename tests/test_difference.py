from __future__ import annotations

import numpy as np
import pytest

from qcompiler.difference import Difference, OutputDifference


def test_errors_are_sums_over_all_samples() -> None:
    rng = np.random.default_rng(0)
    xs = rng.standard_normal((3, 4, 5)).astype(np.float32)
    ys = xs + rng.standard_normal(xs.shape).astype(np.float32) / 10
    total = Difference()
    for x, y in zip(xs, ys, strict=True):
        total.add(x, y)
    error = total.error()
    wide, near = xs.astype(float).ravel(), ys.astype(float).ravel()
    assert error.sqnr == pytest.approx(10 * np.log10(wide @ wide / ((wide - near) @ (wide - near))), abs=1e-3)
    assert error.cosine == pytest.approx(wide @ near / np.linalg.norm(wide) / np.linalg.norm(near), abs=1e-6)
    assert error.max_error == pytest.approx(np.abs(wide - near).max(), rel=1e-5)


def test_equal_arrays_have_no_finite_sqnr() -> None:
    total = Difference()
    total.add(np.zeros(3, np.float32), np.zeros(3, np.float32))
    error = total.error()
    assert (error.sqnr, error.cosine, error.max_error) == (None, 1.0, 0.0)


def test_positions_that_are_not_finite_in_float_do_not_count() -> None:
    total = Difference()
    total.add(np.array([1, np.inf, np.nan], np.float32), np.array([1, 7, 8], np.float32))
    assert total.error().sqnr is None


def test_agreement_is_the_share_of_equal_top_classes() -> None:
    output = OutputDifference("y")
    output.add(np.array([[1, 2], [4, 3]], np.float32), np.array([[0, 5], [0, 1]], np.float32))
    output.add(np.array([[9, 8], [0, 1]], np.float32), np.array([[2, 1], [2, 3]], np.float32))
    assert output.error().agreement == 0.75


@pytest.mark.parametrize("shape", [(4,), (2, 1), (1, 2, 3)])
def test_only_rows_of_classes_agree(shape: tuple[int, ...]) -> None:
    output = OutputDifference("y")
    output.add(np.ones(shape, np.float32), np.ones(shape, np.float32))
    assert output.error().agreement is None


def test_a_shape_that_depends_on_the_data_is_passed_over() -> None:
    output = OutputDifference("y")
    output.add(np.ones((2, 3), np.float32), np.ones((1, 3), np.float32))
    assert output.error().error.sqnr is None


def test_sequences_and_maps_are_compared_by_what_they_hold() -> None:
    output = OutputDifference("y")
    output.add([{1: 0.0, 2: 3.0}, {1: 4.0, 2: 0.0}], [{1: 0.0, 2: 3.5}, {1: 4.0, 2: 0.0}])
    output.add([np.zeros(2, np.float32)], [np.zeros(2, np.float32)])
    output.add(None, None)
    assert (output.error().error.sqnr, output.error().error.max_error) == (20.0, 0.5)
