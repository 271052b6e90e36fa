"""nearest_plane: where vectors are taken from."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from qcompiler_passes.nearest_plane import spread


@given(st.integers(1, 3000), st.integers(1, 300), st.integers(0, 70))
def test_positions_are_distinct_spread_evenly_and_inside(total: int, wanted: int, sample: int) -> None:
    found = spread(total, wanted, sample)
    assert len(found) in (min(wanted, total) - 1, min(wanted, total), min(wanted, total) + 1)
    assert found[0] >= 0
    assert found[-1] < total
    assert np.all(np.diff(found) >= max(total // wanted, 1))


def test_a_distance_that_rounds_to_one_more_step_adds_no_position() -> None:
    assert spread(1600, 29, 0)[-1] < 1600
    assert len(spread(1600, 29, 0)) == 29
