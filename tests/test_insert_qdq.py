"""insert-qdq: Q and DQ between blocks, integers for constants; the text of the graph says where."""

from __future__ import annotations

import numpy as np
import pytest
from qcompiler_passes.insert_qdq import InsertQdq, integer_bounds

from qcompiler import ir
from qcompiler.quant import QuantSpec, params_from_range
from qcompiler.runtime import run, session
from qcompiler.state import CompileState
from qcompiler.text import format_graph
from tests.forms import TO_QDQ, all_forms, assert_bit_identical, compiled, graph_text, weights
from tests.support import random_feeds

CONSTANTS = {
    "w": weights(4, 4, 1, 1),
    "b": weights(4),
    "zero": 0.0,
    "one": 1.0,
    "half": 0.5,
    "column": weights(1, 4, 1, 1),
    "wm": weights(16, 4),
}


def quantized(body: str, outputs: str = "float[] y") -> CompileState:
    words = body.replace("(", " ").replace(",", " ").replace(")", " ").split()
    needed = {k: v for k, v in CONSTANTS.items() if k in words}
    return compiled(graph_text(f"g (float[1,4,2,2] x) => ({outputs}) {{ {body} }}", **needed), *TO_QDQ)


def lines(state: CompileState) -> list[str]:
    """One line per node, without attributes, scales and zero points."""
    found = []
    for node in state.graph.nodes:
        count = 1 if node.op in ("QuantizeLinear", "DequantizeLinear") else len(node.inputs)
        inputs = ", ".join(t.name for t in node.inputs[:count])
        found.append(f"{', '.join(t.name for t in node.outputs)} = {node.op}({inputs})")
    return found


def test_a_conv_between_q_and_dq() -> None:
    state = quantized("y = Conv(x, w, b)")
    assert lines(state) == [
        "w_q_dq = DequantizeLinear(w_q)",
        "b_q_dq = DequantizeLinear(b_q)",
        "x_q = QuantizeLinear(x)",
        "x_q_dq = DequantizeLinear(x_q)",
        "y_raw = Conv(x_q_dq, w_q_dq, b_q_dq)",
        "y_raw_q = QuantizeLinear(y_raw)",
        "y = DequantizeLinear(y_raw_q)",
    ]
    assert [o.name for o in state.graph.outputs] == ["y"]
    known = {t.name: t for t in ir.tensors(state.graph)}
    assert ir.array(known["w_q"]).dtype == np.int8
    assert ir.array(known["b_q"]).dtype == np.int32
    s_x, s_w = (state.params[n].scale for n in ("x_q", "w_q"))
    np.testing.assert_array_equal(state.params["b_q"].scale, s_x * s_w)
    np.testing.assert_allclose(ir.array(known["b_q"]) * (s_x * s_w), CONSTANTS["b"], atol=float((s_x * s_w).max()))


def test_saturation_takes_the_place_of_relu() -> None:
    state = quantized("a = Conv(x, w) y = Relu(a)")
    assert "Relu" not in [n.op for n in state.graph.nodes]
    assert lines(state)[-3:] == [
        "y_raw = Conv(x_q_dq, w_q_dq)",
        "y_raw_q = QuantizeLinear(y_raw)",
        "y = DequantizeLinear(y_raw_q)",
    ]
    assert state.params["y"].zero_point == 0
    assert state.origin["Conv_a"] == ("Conv_a", "Relu_y")


def test_relu_of_a_tensor_that_others_read_stays() -> None:
    """The Conv keeps its own range; the Relu runs on the dequantized value."""
    state = quantized("a = Conv(x, w) r = Relu(a) c = Conv(r, w) y = Add(c, a) z = Conv(y, w)", "float[] y, float[] z")
    assert state.params["a"].zero_point > 0
    assert "r_raw = Relu(a)" in lines(state)


def test_a_conv_output_that_is_a_graph_output_is_dequantized_for_everybody() -> None:
    state = quantized("a = Conv(x, w) y = Relu(a)", "float[] a, float[] y")
    assert "a = DequantizeLinear(a_raw_q)" in lines(state)
    assert sum(n.op == "QuantizeLinear" and n.inputs[0].name == "a_raw" for n in state.graph.nodes) == 1
    assert [o.name for o in state.graph.outputs] == ["a", "y"]


def test_a_clip_narrower_than_the_integers_goes_behind_a_q() -> None:
    """Where the range is wider than the bounds, Clip(0, 0.5) does what saturation cannot."""
    text = "g (float[1,4,2,2] x) => (float[] y) { a = Conv(x, w) y = Clip(a, zero, half) }"
    state = compiled(graph_text(text, **{n: CONSTANTS[n] for n in ("w", "zero", "half")}), *TO_QDQ[:-1])
    state.params["y"] = params_from_range(0, 0.7, state.params["y"].spec)
    InsertQdq().run(state)
    assert lines(state)[-6:] == [
        "a_raw = Conv(x_q_dq, w_q_dq)",
        "a_raw_q = QuantizeLinear(a_raw)",
        "a = DequantizeLinear(a_raw_q)",
        "y_raw = Clip(a, zero, half)",
        "y_raw_q = QuantizeLinear(y_raw)",
        "y = DequantizeLinear(y_raw_q)",
    ]
    assert state.params["a_raw_q"].same_as(state.params["y_raw_q"])


def test_a_clip_that_calibration_made_saturation_is_gone() -> None:
    assert "Clip" not in [n.op for n in quantized("a = Conv(x, w) y = Clip(a, zero, half)").graph.nodes]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 6, (0, 192)), (0, np.inf, (0, 255)), (-np.inf, np.inf, (0, 255)), (1, 2, (32, 64)), (0.016, 7.98, (1, 255))],
)
def test_integer_bounds(low: float, high: float, expected: tuple[int, int]) -> None:
    params = params_from_range(0, 255 / 32, QuantSpec("uint8", 0, 255))
    assert integer_bounds(params, low, high) == expected


def test_float_readers_of_the_graph_input_keep_its_exact_value() -> None:
    state = quantized("a = Conv(x, w) c = Conv(x, w) y = Add(a, c) z = Tanh(x)", "float[] y, float[] z")
    assert "z = Tanh(x)" in lines(state)
    assert [line for line in lines(state) if line.startswith("x_q")] == [
        "x_q = QuantizeLinear(x)",
        "x_q_dq = DequantizeLinear(x_q)",
    ]
    assert "a_raw = Conv(x_q_dq, w_1_q_dq)" in lines(state)


def test_constants_of_an_add_are_integers() -> None:
    state = quantized("a = Conv(x, w) s = Add(column, a) y = Conv(s, w)")
    assert "s_raw = Add(column_q_dq, a)" in lines(state)
    assert "column_q_dq = DequantizeLinear(column_q)" in lines(state)


def test_a_sum_that_only_moves_the_zero_point_passes_integers_on() -> None:
    state = quantized("a = Conv(x, w) s = Add(half, a) y = Conv(s, w)")
    assert lines(state)[4:-3] == [
        "a_raw = Conv(x_q_dq, w_1_q_dq)",
        "a_raw_q = QuantizeLinear(a_raw)",
        "s_raw_q = Identity(a_raw_q)",
        "s = DequantizeLinear(s_raw_q)",
    ]


def test_a_float_result_needs_no_q() -> None:
    state = quantized("f = Flatten(x) g = MatMul(f, wm) y = Softmax(g)")
    assert "g = MatMul(f, wm_q_dq)" in lines(state)
    assert "y = Softmax(g)" in lines(state)


def test_an_activation_behind_a_float_result_says_why_it_is_float() -> None:
    state = quantized("f = Flatten(x) g = MatMul(f, wm) y = Relu(g)")
    assert lines(state)[-2:] == ["g = MatMul(f, wm_q_dq)", "y = Relu(g)"]
    assert state.blocks["Relu_y"].reason == "the layer before it gives a float result"


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("y = Conv(x, w)", "float[] y"),
        ("a = Conv(x, w) c = Conv(x, w) y = Add(a, c)", "float[] y"),
        ("a = Conv(x, w) y = MaxPool<kernel_shape=[2,2]>(a)", "float[] y"),
        ("a = Conv(x, w) y = Relu(a)", "float[] y, float[] a"),
        ("a = Conv(x, w) y = Identity(x)", "float[] y, float[] a"),
        ("a = Conv(x, w) y = Clip(a, zero, one) z = Conv(a, w)", "float[] a, float[] y, float[] z"),
        ("y = Conv(x, w) z = Add(y, y) u = Conv(z, w)", "float[] y, float[] z, float[] u"),
    ],
)
def test_models_end_where_they_ended(body: str, outputs: str) -> None:
    words = body.replace("(", " ").replace(",", " ").replace(")", " ").split()
    model = graph_text(
        f"g (float[1,4,2,2] x) => ({outputs}) {{ {body} }}", **{k: v for k, v in CONSTANTS.items() if k in words}
    )
    forms = all_forms(model)
    assert_bit_identical(forms)
    feeds = random_feeds(model, 1000)  # one of the calibration samples
    for got, wanted in zip(run(session(forms.kernels), feeds), run(session(model), feeds), strict=True):
        np.testing.assert_allclose(got, wanted, atol=0.03 * np.abs(wanted).max())


def test_a_second_run_returns_zero() -> None:
    state = quantized("a = Conv(x, w) y = Relu(a)")
    before = format_graph(state.graph)
    assert InsertQdq().run(state) == 0
    assert format_graph(state.graph) == before
