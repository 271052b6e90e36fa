"""scale-weights: every weight scale makes its requantize multiplier an integer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from qcompiler_passes.align_scales import AlignScales
from qcompiler_passes.annotate import Annotate
from qcompiler_passes.calibrate import Calibrate
from qcompiler_passes.form_blocks import FormBlocks
from qcompiler_passes.scale_weights import ScaleWeights
from qcompiler_passes.targets import ORT_CPU, ORT_CPU_AVX2

from qcompiler import quant
from qcompiler.errors import UserError
from qcompiler.quant import dequantize, quantize
from qcompiler.state import CompileState
from qcompiler.target import Target
from tests.forms import all_forms, assert_bit_identical, compiled, graph_text, weights

BEFORE = (FormBlocks(), Annotate(), Calibrate(collector="minmax"), AlignScales())


def scaled(
    w: np.ndarray, stage: ScaleWeights | None = None, target: Target = ORT_CPU, **bias: np.ndarray
) -> CompileState:
    extra = ", b" if bias else ""
    model = graph_text(f"g (float[1,4,5,5] x) => (float[] y) {{ y = Conv(x, w{extra}) }}", w=w, **bias)
    return compiled(model, *BEFORE, stage or ScaleWeights(), target=target)


def factor(state: CompileState) -> np.ndarray:
    return quant.rescale(*(state.params[n].scale for n in ("x", "w", "y")))


def error(state: CompileState, w: np.ndarray) -> float:
    params = state.params["w"]
    return float(np.square(dequantize(quantize(w, params), params) - w).sum())


def test_factors_are_dyadic_and_the_range_is_used() -> None:
    w = weights(64, 4, 3, 3) * np.geomspace(0.01, 4, 64, dtype=np.float32).reshape(-1, 1, 1, 1)
    state = scaled(w, ScaleWeights(search=False))
    assert state.params["w"].scale.shape == (64,)
    assert np.all(quant.is_dyadic(factor(state)))
    largest = np.abs(quantize(w, state.params["w"]).astype(int)).max(axis=(1, 2, 3))
    m = quant.multiplier(factor(state))
    assert np.all(largest >= 127 * (m - 4) / m - 1)
    assert largest.max() <= 127


def test_the_search_only_ever_lowers_the_error() -> None:
    w = weights(16, 4, 3, 3)
    w[3, 0, 0, 0] = 5  # an outlier that is worth clipping, or not
    found, first = scaled(w), scaled(w, ScaleWeights(search=False))
    assert np.all(quant.is_dyadic(factor(found)))
    assert error(found, w) < error(first, w)


def test_a_channel_of_zeros_gets_the_smallest_multiplier() -> None:
    w = weights(4, 4, 1, 1)
    w[2] = 0
    state = scaled(w)
    assert quant.multiplier(factor(state))[2] == 1
    assert not np.any(quantize(w, state.params["w"])[2])


@pytest.mark.parametrize("magnitude", [1e-12, 1e-3, 1e6])
def test_weights_of_any_magnitude(magnitude: float) -> None:
    w = (weights(4, 4, 1, 1) * magnitude).astype(np.float32)
    assert np.all(quant.is_dyadic(factor(scaled(w))))


def test_a_huge_bias_widens_the_scale_until_the_accumulator_holds_it() -> None:
    bias = np.float32([0, 1, 1e4, -3e6])
    state = scaled(weights(4, 4, 1, 1), b=bias)
    step = state.params["x"].scale.astype(np.float64) * state.params["w"].scale
    assert np.all(np.abs(bias) / step <= 2.0**30 * 1.001)
    assert np.all(quant.is_dyadic(factor(state)))
    model = graph_text("g (float[1,4,5,5] x) => (float[] y) { y = Conv(x, w, b) }", w=weights(4, 4, 1, 1), b=bias)
    assert_bit_identical(all_forms(model))


def test_per_tensor_scales_are_one_number() -> None:
    target = replace(ORT_CPU, per_channel=False)
    state = scaled(weights(8, 4, 1, 1), target=target, b=np.linspace(-9, 9, 8, dtype=np.float32))
    assert state.params["w"].scale.shape == ()
    assert state.params["w"].spec.axis is None
    assert np.all(quant.is_dyadic(factor(state)))
    model = graph_text("g (float[1,4,5,5] x) => (float[] y) { y = Conv(x, w) }", w=weights(8, 4, 1, 1))
    assert_bit_identical(all_forms(model, target))


def test_seven_bit_weights() -> None:
    w = weights(8, 4, 3, 3)
    q = quantize(w, scaled(w, target=ORT_CPU_AVX2).params["w"])
    assert q.min() >= -64
    assert 50 < q.max() <= 63


def test_a_float_result_takes_any_scale() -> None:
    model = graph_text("g (float[2,6] x) => (float[] y) { y = MatMul(x, w) }", w=weights(6, 4))
    state = compiled(model, *BEFORE, ScaleWeights(search=False))
    w = state.params["w"]
    assert w.spec.axis == 1
    np.testing.assert_allclose(w.scale, np.abs(weights(6, 4)).max(axis=0) / 127, rtol=1e-6)


def test_two_layers_that_share_a_weight_scale_it_apart() -> None:
    text = "g (float[1,4,5,5] x) => (float[] y) { a = Conv(x, w) y = Conv(a, w) }"
    state = compiled(graph_text(text, w=3 * weights(4, 4, 1, 1)), *BEFORE, ScaleWeights())
    names = [n.inputs[1].name for n in state.graph.nodes]
    assert len(set(names)) == 2
    assert not np.array_equal(*(state.params[n].scale for n in names))
    assert ScaleWeights().run(state) == 0


def test_stochastic_rounding_is_unbiased_and_repeatable() -> None:
    w = weights(64, 4, 3, 3)
    states = [scaled(w, ScaleWeights(rounding="stochastic", seed=seed)) for seed in (0, 0, *range(1, 40))]
    integers = [state.integers["w"] for state in states]
    np.testing.assert_array_equal(integers[0], integers[1])
    assert not np.array_equal(integers[0], integers[2])
    params = states[0].params["w"]
    quotient = w / params.scale.reshape(-1, 1, 1, 1)
    clipped = np.clip(quotient, params.spec.qmin, params.spec.qmax)
    assert all(np.abs(q - clipped).max() < 1 for q in integers)
    assert np.abs(np.mean(integers[1:], axis=0) - clipped).mean() < 0.07
    assert abs(np.mean(integers[0] - clipped)) < 0.03
    assert params.same_as(scaled(w).params["w"])
    assert not scaled(w).integers


def test_unknown_rounding_is_refused() -> None:
    with pytest.raises(UserError, match="choose nearest or stochastic"):
        scaled(weights(8, 4, 3, 3), ScaleWeights(rounding="up"))
