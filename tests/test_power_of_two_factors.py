"""power-of-two-factors: which tensors get factors, and that they are those with the least error."""

from __future__ import annotations

import numpy as np
import pytest
from qcompiler_passes.align_scales import AlignScales
from qcompiler_passes.annotate import Annotate
from qcompiler_passes.calibrate import Calibrate
from qcompiler_passes.form_blocks import FormBlocks
from qcompiler_passes.insert_qdq import InsertQdq
from qcompiler_passes.power_of_two_factors import PowerOfTwoFactors
from qcompiler_passes.scale_weights import ScaleWeights
from qcompiler_passes.targets import INTEGER, ORT_CPU

from qcompiler import ir, quant
from qcompiler.runtime import run, session
from qcompiler.state import CompileState
from qcompiler.target import Target
from tests.forms import advance, graph_text, state_of, weights

WIDTH = 8
SPREAD = np.geomspace(0.05, 12, WIDTH).astype(np.float32)
RNG = np.random.default_rng(0)
INPUTS = [{"x": RNG.standard_normal((2, 5, WIDTH)).astype(np.float32)} for _ in range(6)]

STREAM = "a = MatMul(x, w) b = MatMul(x, w) s = Add(a, b) n = LayerNormalization(s, g) m = MatMul(n, v) "


def calibrated(body: str, target: Target = INTEGER, *passes: PowerOfTwoFactors) -> CompileState:
    arrays = {"w": weights(WIDTH, WIDTH) * SPREAD, "v": weights(WIDTH, WIDTH), "g": 1 / SPREAD, "zero": np.float32(0)}
    arrays |= {"first": np.int64(0), "wide": np.asarray([2, 5, WIDTH])}
    outputs = f"float[] y{', float[] s' if ' output' in body else ''}"
    text = f"g (float[2,5,{WIDTH}] x) => ({outputs}) {{ {body.replace(' output', '')} }}"
    state = state_of(graph_text(text, **arrays), target)
    state.calibration = INPUTS
    advance(state, FormBlocks(), Annotate(), Calibrate(collector="minmax"))
    return advance(state, *(passes or (PowerOfTwoFactors(),)))


def factors(state: CompileState) -> dict[str, tuple[int, ...]]:
    return {name: params.exponents for name, params in state.params.items() if params.exponents}


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (STREAM + "y = Add(m, s)", ["s"]),
        (STREAM + "t = Add(m, s) y = LayerNormalization(t, g)", ["s", "t"]),
        ("n = LayerNormalization(x, g) y = MatMul(n, v)", ["x"]),
        ("n = LayerNormalization(x, g) k = LayerNormalization(n, g) y = MatMul(k, v)", ["n", "x"]),
        ("n = LayerNormalization(x, g) m = MatMul(n, v) s = Add(m, n) y = LayerNormalization(s, g)", ["s", "x"]),
        (STREAM + "y = Add(m, s) output", ["s"]),  # a float reader gets dequantized values
        (STREAM + "c = Gather<axis=1>(s, first) d = MatMul(c, v) e = Gather<axis=1>(m, first) y = Add(d, e)", []),
        (STREAM + "r = Reshape(s, wide) t = MatMul(r, v) y = Add(m, t)", []),
        (STREAM.replace("s = Add(a, b)", "c = Add(a, b) s = Relu(c)") + "y = Add(m, s)", []),
        (STREAM.replace("Add(a, b)", "Mul(a, b)") + "y = Add(m, s)", []),
        ("a = MatMul(x, w) s = Add(a, a) y = MatMul(s, v)", []),
    ],
)
def test_which_tensors_get_factors(body: str, names: list[str]) -> None:
    assert sorted(factors(calibrated(body))) == names


def test_targets_with_float_layer_norm_get_none() -> None:
    assert not factors(calibrated(STREAM + "y = Add(m, s)", ORT_CPU))


def test_nothing_for_no_factors_and_for_a_second_run() -> None:
    assert not factors(calibrated(STREAM + "y = Add(m, s)", INTEGER, PowerOfTwoFactors(largest=0)))
    state = calibrated(STREAM + "y = Add(m, s)")
    assert PowerOfTwoFactors().run(state) == 0


def test_quiet_channels_get_finer_steps_and_loud_ones_keep_their_range() -> None:
    state = calibrated(STREAM + "y = Add(m, s)")
    params = state.params["s"]
    assert params.exponents[0] == 0
    assert params.exponents[-1] == 3
    model = ir.to_proto(state.graph.copy())
    model.graph.output.add().name = "s"
    runner = session(model)
    values = np.concatenate([run(runner, feeds)[1] for feeds in INPUTS])
    error = np.abs(quant.dequantize(quant.quantize(values, params), params) - values)
    assert error.max() <= float(params.scale) * 4 * 1.001
    uniform = quant.params_from_range(float(values.min()), float(values.max()), params.spec)
    coarse = np.abs(quant.dequantize(quant.quantize(values, uniform), uniform) - values)
    assert error[..., 0].mean() < coarse[..., 0].mean() / 2


def test_sums_shift_their_multipliers() -> None:
    state = calibrated(STREAM + "t = Add(m, s) y = LayerNormalization(t, g)")
    advance(state, AlignScales(), ScaleWeights(search=False), InsertQdq())
    rescales = [n for n in state.graph.nodes if n.op == "Rescale"]
    assert [ir.array(n.inputs[2]).shape for n in rescales] == [(WIDTH,)] * 4
    quantizers = {n.outputs[0].name: n for n in state.graph.nodes if n.op == "QuantizeLinear"}
    assert all("s" not in name.split("_") for name in quantizers)
