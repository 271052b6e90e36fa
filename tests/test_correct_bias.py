"""correct-bias takes the mean error of quantization out of the layers, and no more than that."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from qcompiler_passes.biases import layers_with_bias, results
from qcompiler_passes.correct_bias import CorrectBias, _shift
from qcompiler_passes.insert_qdq import InsertQdq

from qcompiler import ir
from qcompiler.state import CompileState
from qcompiler.text import format_graph
from tests.forms import TO_QDQ, advance, compiled, graph_text, weights
from tests.support import run

TEXT = """g (float[1,4,8,8] x) => (float[1,6] y) {
    a = Conv<pads=[1,1,1,1]>(x, w, b)
    r = Relu(a)
    c = Conv(r, v)
    s = Clip(c, zero, one)
    p = GlobalAveragePool(s)
    f = Flatten(p)
    y = Gemm(f, u, d)
}"""


def _model() -> onnx.ModelProto:
    constants = {
        "w": weights(8, 4, 3, 3),
        "b": weights(8),
        "v": weights(8, 8, 1, 1),
        "u": weights(8, 6),
        "d": weights(6),
    }
    return graph_text(TEXT, zero=0.0, one=1.0, **constants)


def _calibrated(coarse: float = 1.0) -> CompileState:
    """A calibrated state; weight scales are `coarse` times too large, so that rounding shifts means."""
    state = compiled(_model(), *TO_QDQ[:-1])
    for node in state.graph.nodes:
        if node.op == "Conv":
            params = state.params[node.inputs[1].name]
            state.params[node.inputs[1].name] = params.with_scale(params.scale * coarse)
    return state


def _mean_error(state: CompileState) -> float:
    """How far the mean of each output of the quantized model is off, over the calibration samples."""
    assert state.calibration is not None
    samples = list(state.calibration)
    quantized, exact = ir.to_proto(state.graph), _model()
    errors = [run(quantized, sample)[0] - run(exact, sample)[0] for sample in samples]
    return float(np.abs(np.mean(errors, axis=0)).mean())


def test_removes_the_mean_error_of_coarse_weights() -> None:
    plain = advance(_calibrated(coarse=16), InsertQdq())
    corrected = advance(_calibrated(coarse=16), CorrectBias(), InsertQdq())
    assert _mean_error(corrected) < 0.3 * _mean_error(plain)


def test_counts_the_layers_and_a_second_run_does_nothing() -> None:
    state = _calibrated()
    assert CorrectBias().run(state) == 3
    assert sorted(state.corrected) == sorted(n.name for n in state.graph.nodes if n.op in ("Conv", "Gemm"))
    before = format_graph(state.graph)
    assert CorrectBias().run(state) == 0
    assert format_graph(state.graph) == before


def test_needs_no_shapes() -> None:
    state, blind = _calibrated(), _calibrated()
    for tensor in ir.tensors(blind.graph):
        if not ir.is_constant(tensor):
            tensor.shape = None
    CorrectBias().run(state)
    assert CorrectBias().run(blind) == 3
    for node, same in zip(state.graph.nodes, blind.graph.nodes, strict=True):
        if node.op in ("Conv", "Gemm"):
            np.testing.assert_array_equal(ir.array(node.inputs[2]), ir.array(same.inputs[2]))


def _biases(state: CompileState) -> list[np.ndarray]:
    assert CorrectBias().run(state) == 3
    return [ir.array(n.inputs[2]) for n in state.graph.nodes if n.op in ("Conv", "Gemm")]


def test_means_that_calibrate_noted_serve_as_those_measured_now() -> None:
    noted, measured = _calibrated(coarse=16), _calibrated(coarse=16)
    assert set(noted.means) == {"r", "s", "y"}
    measured.means = {}
    for known, own in zip(_biases(noted), _biases(measured), strict=True):
        np.testing.assert_allclose(known, own, rtol=1e-3, atol=1e-5)
    assert not noted.means


def test_means_of_too_few_samples_are_measured_again() -> None:
    wanted, state = _calibrated(coarse=16), _calibrated(coarse=16)
    wanted.means = {}
    state.means = {name: means[:1] for name, means in state.means.items()}
    for a, b in zip(_biases(wanted), _biases(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_some_positions_of_a_large_image_stand_for_all() -> None:
    body = "a = Abs(x) y = Conv<pads=[1,1,1,0], strides=[2,2]>(a, w, b)"
    text = f"g (float[1,4,70,45] x) => (float[1,8,35,22] y) {{ {body} }}"
    state = compiled(graph_text(text, w=weights(8, 4, 3, 3), b=weights(8)), *TO_QDQ[:-1])
    [layer] = layers_with_bias(state)
    assert results(state, [layer])[0].steps == (2, 1)
    params = state.params[layer.inputs[1].name]
    state.params[layer.inputs[1].name] = params.with_scale(params.scale * 16)
    plain, source = advance(state.clone(), InsertQdq()), list(state.calibration or ())
    corrected = advance(state, CorrectBias(), InsertQdq())
    exact = np.stack([run(graph_text(text, w=weights(8, 4, 3, 3), b=weights(8)), s)[0] for s in source])
    errors = [
        np.abs((np.stack([run(ir.to_proto(s.graph), x)[0] for x in source]) - exact).mean(axis=(0, 1, 3, 4))).max()
        for s in (plain, corrected)
    ]
    assert errors[1] < 0.2 * errors[0]


def test_gives_a_layer_without_bias_one() -> None:
    state = _calibrated()
    CorrectBias().run(state)
    assert all(len(n.inputs) == 3 for n in state.graph.nodes if n.op == "Conv")


def test_is_deterministic() -> None:
    texts = set()
    for _ in range(2):
        state = _calibrated(coarse=16)
        CorrectBias().run(state)
        texts.add(format_graph(state.graph))
    assert len(texts) == 1


def test_leaves_the_quantized_form_alone() -> None:
    state = advance(_calibrated(), InsertQdq())
    assert CorrectBias().run(state) == 0


@pytest.mark.parametrize("opset", [17, 18])
def test_reduces_over_all_axes_but_the_channels_at_any_opset(opset: int) -> None:
    state = compiled(
        graph_text("g (float[1,3,9] x) => (float[1,4,7] y) { y = Conv(x, w) }", opset, w=weights(4, 3, 3)), *TO_QDQ[:-1]
    )
    assert CorrectBias().run(state) == 1


def test_shift_is_the_mean_error_where_it_is_certain() -> None:
    wanted = np.array([[1.0, 5.0], [1.0, -5.0], [1.0, 5.0], [1.0, -5.0]])
    shift = _shift(wanted, np.zeros_like(wanted), np.ones_like(wanted))
    np.testing.assert_array_equal(shift, [1.0, 0.0])


def test_shift_reaches_the_mean_through_the_share_that_it_moves() -> None:
    ones = np.ones((3, 3))
    shares = ones * [0.5, 0.01, 0.0]
    np.testing.assert_allclose(_shift(ones, 0 * ones, shares), [2.0, 10.0, 0.0])


def _with_float(*names: str, coarse: float = 16) -> CompileState:
    """As `_calibrated`, with some layers in float."""
    state = compiled(_model(), *TO_QDQ[:-1], keep_float=names)
    for node in state.graph.nodes:
        if node.op == "Conv" and state.blocks[node.name].quantized:
            params = state.params[node.inputs[1].name]
            state.params[node.inputs[1].name] = params.with_scale(params.scale * coarse)
    return state


def test_corrects_float_layers_behind_quantized_ones() -> None:
    plain = advance(_with_float("Conv_c", "Gemm_y"), InsertQdq())
    state = _with_float("Conv_c", "Gemm_y")
    assert CorrectBias().run(state) == 3
    assert _mean_error(advance(state, InsertQdq())) < 0.6 * _mean_error(plain)


def test_leaves_float_layers_alone_that_rounding_does_not_reach() -> None:
    state = _with_float("Conv_a")
    biases = {n.name: ir.array(n.inputs[2]) for n in state.graph.nodes if n.op == "Conv" and len(n.inputs) > 2}
    assert CorrectBias().run(state) == 2
    assert "Conv_a" not in state.corrected
    node = next(n for n in state.graph.nodes if n.name == "Conv_a")
    assert np.array_equal(ir.array(node.inputs[2]), biases["Conv_a"])


def test_float_layers_are_measured_as_they_will_run() -> None:
    """ONNX Runtime would quantize the weights of a float Conv between DQ and Q, per tensor."""
    steep = weights(8, 8, 1, 1)
    steep[0] *= 1000  # one scale for all channels leaves the others nothing
    body = "a = Conv(x, w) c = Conv(a, s) l = Clip(c, low, high) e = Conv(l, v) y = Abs(e)"
    constants = {"w": weights(8, 4, 1, 1), "s": steep, "v": weights(8, 8, 1, 1), "low": -1.0, "high": 1.0}
    model = graph_text(f"g (float[1,4,8,8] x) => (float[] y) {{ {body} }}", **constants)
    state = compiled(model, *TO_QDQ[:-1], keep_float=["Conv_c"])
    CorrectBias().run(state)
    node = next(n for n in state.graph.nodes if n.name == "Conv_e")
    assert np.abs(ir.array(node.inputs[2])).max() < 0.002
