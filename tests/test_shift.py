"""Sums of a tensor and one number: the integers stay, the zero point moves."""

from __future__ import annotations

import numpy as np
import pytest
from qcompiler_passes.align_scales import AlignScales
from qcompiler_passes.annotate import Annotate
from qcompiler_passes.calibrate import Calibrate
from qcompiler_passes.form_blocks import FormBlocks
from qcompiler_passes.scale_solver import COARSER, COARSEST

from qcompiler.quant import QuantSpec, params_from_range
from qcompiler.runtime import run, session
from qcompiler.shift import is_shift, zero_point_behind
from qcompiler.state import CompileState
from tests.forms import advance, all_forms, assert_bit_identical, compiled, graph_text, weights
from tests.support import random_feeds

BODY = "a = Conv(x, w) h = Mul(a, a) s = Add({}) y = Conv<pads=[1,1,1,1]>(s, v)"


def model(number: float | np.ndarray, operands: str = "h, c"):  # type: ignore[no-untyped-def]
    text = f"g (float[1,4,5,3] x) => (float[] y) {{ {BODY.format(operands)} }}"
    return graph_text(text, w=weights(4, 4, 1, 1), v=weights(4, 4, 3, 3), c=number)


def aligned(number: float | np.ndarray) -> CompileState:
    return compiled(model(number), FormBlocks(), Annotate(), Calibrate(collector="minmax"))


def moved(state: CompileState) -> bool:
    advance(state, AlignScales())
    return any(is_shift(state, n) for n in state.graph.nodes)


@pytest.mark.parametrize("number", [-0.1957, -3.0])
@pytest.mark.parametrize("operands", ["h, c", "c, h"])
def test_the_three_forms_agree_and_the_number_is_exact(number: float, operands: str) -> None:
    forms = all_forms(model(number, operands))
    assert_bit_identical(forms)
    assert not any(n.op_type in ("Add", "QLinearAdd") for n in forms.kernels.graph.node)


def test_both_tensors_get_a_scale_of_which_the_number_is_a_multiple() -> None:
    state = aligned(-0.1957)
    measured = float(state.params["h"].scale)
    assert moved(state)
    before, after = state.params["h"], state.params["s"]
    assert before.scale == after.scale
    steps = after.zero_point - before.zero_point
    assert steps > 0
    assert steps * float(after.scale) == pytest.approx(0.1957, rel=1e-6)
    assert 1 / COARSER <= float(after.scale) / measured <= COARSEST


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(1e-4, id="less than a step"),
        pytest.param(2.0, id="zero would not be among the values"),
        pytest.param(-1e6, id="more than all steps"),
        pytest.param(weights(1, 4, 1, 1), id="another number for each channel"),
    ],
)
def test_other_sums_are_computed(number: float | np.ndarray) -> None:
    assert not moved(aligned(number))


def test_a_range_that_an_activation_bounds_is_not_widened() -> None:
    text = "g (float[1,4,5,3] x) => (float[] y) { a = Conv(x, w) r = Clip(a, z, o) s = Add(r, c) y = Conv(s, w) }"
    state = compiled(
        graph_text(text, w=20 * weights(4, 4, 1, 1), z=0.0, o=6.0, c=-0.1),
        FormBlocks(),
        Annotate(),
        Calibrate(collector="minmax"),
    )
    moved(state)
    assert state.params["r"].range[1] == pytest.approx(6.0, rel=1e-3)


def test_the_zero_point_behind() -> None:
    params = params_from_range(-1.0, 1.55, QuantSpec("uint8", 0, 255))
    scale = float(params.scale)
    assert zero_point_behind(params, 3 * scale) == params.zero_point - 3
    assert zero_point_behind(params, -3 * scale) == params.zero_point + 3
    assert zero_point_behind(params, 2.5 * scale) is None
    assert zero_point_behind(params, 200 * scale) is None


def test_what_is_computed_is_the_float_model() -> None:
    proto = model(-0.1957)
    forms = all_forms(proto)
    for seed in range(4):
        feeds = random_feeds(proto, 1000 + seed)
        [wanted], [given] = run(session(proto), feeds), run(session(forms.kernels), feeds)
        assert np.square(wanted - given).sum() < 0.01 * np.square(wanted).sum()
