"""lower-integer: ConvInteger, MatMulInteger and movers on integers; what cannot be lowered says why."""

from __future__ import annotations

import numpy as np
import pytest
from qcompiler_passes.lower_integer import LowerInteger
from qcompiler_passes.targets import INTEGER

from qcompiler import ir
from qcompiler.state import CompileState
from qcompiler.text import format_graph
from tests.forms import TO_QDQ, all_forms, assert_bit_identical, compiled, graph_text, inferred, weights

CONSTANTS = {
    "w": weights(4, 4, 1, 1),
    "b": weights(4),
    "wm": weights(16, 4),
    "pads": [0, 0, 1, 0, 0, 0, 0, 2],
    "flat": [1, 16],
    "rank3": [1, 1, 16],
}


def lowered(body: str, outputs: str = "float[] y") -> CompileState:
    words = body.replace("(", " ").replace(",", " ").replace(")", " ").split()
    needed = {k: v for k, v in CONSTANTS.items() if k in words}
    model = graph_text(f"g (float[1,4,2,2] x) => ({outputs}) {{ {body} }}", **needed)
    return compiled(model, *TO_QDQ, LowerInteger(), target=INTEGER)


def line(state: CompileState, op: str) -> str:
    return next(text for text in format_graph(state.graph).splitlines() if f" = {op}" in text)


def test_conv() -> None:
    state = lowered("y = Conv<pads=[0,1,0,1], strides=[1,2]>(x, w, b)")
    text = line(state, "ConvInteger")
    assert text.startswith("Conv_y_acc = ConvInteger{pads=[0,1,0,1], strides=[1,2]}(x_q, int8[4,4,1,1]#")
    assert text.endswith(f", {state.params['x'].zero_point}, 0)")
    assert line(state, "Add").startswith("Conv_y_biased = Add(Conv_y_acc, int32[1,4,1,1]#")
    dq = next(n for n in state.graph.nodes if n.name == "Conv_y_acc_dequantize")
    np.testing.assert_array_equal(ir.array(dq.inputs[1]), state.params["x"].scale * state.params["w"].scale)
    assert dq.attrs["axis"] == -3
    assert [n.op for n in state.graph.nodes] == [
        "QuantizeLinear", "ConvInteger", "Add", "DequantizeLinear", "QuantizeLinear", "DequantizeLinear",
    ]  # fmt: skip


def test_products_of_matrices() -> None:
    for body, rank in (("f = Reshape(x, flat) y = Gemm(f, wm, b)", 2), ("f = Reshape(x, rank3) y = MatMul(f, wm)", 3)):
        state = lowered(body)
        assert line(state, "MatMulInteger").startswith(("Gemm_y_acc = ", "MatMul_y_acc = "))
        assert line(state, "MatMulInteger").split(" = ")[1].startswith("MatMulInteger(f")
        dq = next(n for n in state.graph.nodes if n.name.endswith("acc_dequantize"))
        assert dq.attrs["axis"] == -1
        assert len(ir.shape(dq.outputs[0]) or ()) == rank


@pytest.mark.parametrize(
    ("mover", "text"),
    [
        ("m = MaxPool<kernel_shape=[2,2]>(c)", "MaxPool{kernel_shape=[2,2]}(c_raw_q)"),
        ("m = Transpose<perm=[0,2,1,3]>(c)", "Transpose{perm=[0,2,1,3]}(c_raw_q)"),
    ],
)
def test_movers_run_on_integers(mover: str, text: str) -> None:
    model = graph_text(
        f"g (float[1,4,4,4] x) => (float[] y) {{ c = Conv(x, w) {mover} y = Conv(m, w) }}", w=CONSTANTS["w"]
    )
    state = compiled(model, *TO_QDQ, LowerInteger())
    assert text in format_graph(state.graph)
    assert state.params["m_raw_q"].same_as(state.params["c_raw_q"])


def test_padding_fills_with_the_zero_point() -> None:
    state = lowered("c = Conv(x, w) p = Pad(c, pads) y = Conv(p, w)")
    assert state.params["c"].zero_point > 0
    assert line(state, "Pad").endswith(f", {state.params['c'].zero_point})")


def test_a_split_has_an_integer_tensor_per_output() -> None:
    state = lowered("c = Conv(x, w) s, t = Split<axis=1>(c) m = Concat<axis=1>(t, s) y = Conv(m, w)")
    assert line(state, "Split") == "s_raw_q, t_raw_q = Split{axis=1}(c_raw_q)"


def test_a_mover_whose_result_nobody_quantizes_is_refused() -> None:
    """An unused output has no Q: the mover stays between DQ and Q, which is still right."""
    state = lowered("c = Conv(x, w) s, t = Split<axis=1>(c) m = Concat<axis=1>(s, s) y = Conv(m, w)")
    assert line(state, "Split").startswith("s_raw, t")


def test_float_blocks_stay_as_they_are() -> None:
    state = lowered("c = Conv(x, w) y = Softmax(c)")
    assert line(state, "Softmax") == "y = Softmax(c)"


def test_a_second_run_returns_zero() -> None:
    state = lowered("c = Conv(x, w, b) p = Pad(c, pads) y = Conv(p, w)")
    before = format_graph(state.graph)
    assert LowerInteger().run(state) == 0
    assert format_graph(state.graph) == before


def test_the_limit_of_bisection_lowers_only_so_many() -> None:
    model = graph_text("g (float[1,4,2,2] x) => (float[] y) { c = Conv(x, w) y = Conv(c, w) }", w=CONSTANTS["w"])
    state = compiled(model, *TO_QDQ)
    state.rewrite_limit = 1
    assert LowerInteger().run(state) == 1
    assert [n.op for n in state.graph.nodes if "Conv" in n.op] == ["ConvInteger", "Conv"]


@pytest.mark.parametrize(("dims", "kernel"), [((9,), (3,)), ((6, 6), (3, 3)), ((4, 5, 4), (2, 3, 1))])
def test_convolutions_of_one_two_and_three_dimensions(dims: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    shape = ",".join(map(str, (1, 4, *dims)))
    model = graph_text(
        f"g (float[{shape}] x) => (float[] y) {{ a = Conv(x, w, b) r = Relu(a) y = Conv(r, w2) }}",
        w=weights(8, 4, *kernel),
        b=weights(8),
        w2=weights(3, 8, *[1] * len(kernel)),
    )
    forms = all_forms(model)
    assert [n.op_type for n in forms.kernels.graph.node].count("QLinearConv") == 2
    assert_bit_identical(forms)


def test_a_tensor_of_unknown_rank_is_no_obstacle() -> None:
    model = graph_text(
        "g (float[1,4,3,3] x) => (float[] y) { a = Conv(x, w) g = com.microsoft.Gelu(a) c = Conv(g, w, b) y = Relu(c) }",
        w=CONSTANTS["w"],
        b=CONSTANTS["b"],
    )
    assert "g" not in [v.name for v in inferred(model).graph.value_info if v.type.tensor_type.HasField("shape")]
    assert_bit_identical(all_forms(model))
