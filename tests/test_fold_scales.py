"""fold-scales: multipliers, shifts and tables in the place of scales."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from qcompiler_passes.fold_scales import FoldScales
from qcompiler_passes.insert_qdq import InsertQdq
from qcompiler_passes.lower_integer import LowerInteger
from qcompiler_passes.targets import INTEGER, ORT_CPU

from qcompiler import ir, quant
from qcompiler.quant import dequantize, params_from_range, quantize
from qcompiler.runtime import run, session
from qcompiler.state import CompileState
from qcompiler.target import Target
from qcompiler.text import format_graph
from tests.forms import (
    TO_INTEGER,
    TO_QDQ,
    advance,
    all_forms,
    assert_bit_identical,
    compiled,
    graph_text,
    ops_between,
    weights,
)

CONSTANTS = {
    "w": weights(4, 4, 1, 1),
    "w1": weights(4, 4, 1, 1, seed=1),
    "bias": weights(4),
    "half": 0.5,
    "zero": 0.0,
    "column": np.linspace(-1, 2, 4, dtype=np.float32).reshape(4, 1, 1),
}


def model_of(body: str) -> onnx.ModelProto:
    words = body.replace("(", " ").replace(",", " ").replace(")", " ").split()
    needed = {k: v for k, v in CONSTANTS.items() if k in words}
    return graph_text(f"g (float[1,4,4,4] x) => (float[] y) {{ {body} }}", **needed)


def integer(body: str) -> CompileState:
    return compiled(model_of(body), *TO_INTEGER, target=INTEGER)


def node(state: CompileState, op: str, reader: str = "") -> ir.Node:
    return next(n for n in state.graph.nodes if n.op == op and reader in n.name)


def operands(found: ir.Node) -> list[np.ndarray]:
    return [ir.array(t) for t in found.inputs[1:]]


def test_an_accumulator_is_requantized_by_an_integer_and_a_shift() -> None:
    state = integer("y = Conv(x, w, bias)")
    found = node(state, "Requantize")
    multiplier, shift, zero_point, qmin, qmax = operands(found)
    factor = quant.rescale(*(state.params[n].scale for n in ("x", "w", "y")))
    assert multiplier.dtype == np.int32
    assert multiplier.shape == (4, 1, 1)
    np.testing.assert_array_equal(multiplier.reshape(-1) * 2.0**-16, factor)
    assert (int(shift), int(zero_point)) == (16, state.params["y"].zero_point)
    assert (int(qmin), int(qmax)) == (0, 255)
    assert [n.op for n in state.graph.nodes] == [
        "QuantizeLinear",
        "ConvInteger",
        "Add",
        "Requantize",
        "DequantizeLinear",
    ]


@pytest.mark.parametrize("operands_of_add", ["a, b", "b, a", "a, a", "column, a"])
def test_add_is_two_rescales_and_a_requantize(operands_of_add: str) -> None:
    state = integer(f"a = Conv(x, w) b = Conv(x, w1) s = Add({operands_of_add}) y = Conv(s, w)")
    rescales = [n for n in state.graph.nodes if n.op == "Rescale"]
    assert len(rescales) == 2
    names = operands_of_add.split(", ")
    for found, name in zip(rescales, names, strict=True):
        zero_point, multiplier = operands(found)
        params = state.params[name]
        assert int(zero_point) == params.zero_point
        assert int(multiplier) * 2.0**-12 == params.scale / state.params["s"].scale
    multiplier, shift, *_ = operands(node(state, "Requantize", "Add_s"))
    assert (int(multiplier), int(shift)) == (1, 12)


def test_add_and_relu_are_one_requantize() -> None:
    state = integer("a = Conv(x, w) b = Conv(x, w1) s = Add(a, b) r = Relu(s) y = Conv(r, w)")
    assert int(operands(node(state, "Requantize", "Add_s"))[2]) == 0
    assert not {"Relu", "Clip"} & {n.op for n in state.graph.nodes}


@pytest.mark.parametrize("operands_of_mul", ["a, b", "a, a", "half, a", "a, column"])
def test_mul_has_one_multiplier(operands_of_mul: str) -> None:
    state = integer(f"a = Conv(x, w) b = Conv(x, w1) s = Mul({operands_of_mul}) y = Conv(s, w)")
    left, right = operands_of_mul.split(", ")
    factor = quant.rescale(*(state.params[n].scale for n in (left, right, "s")))
    multiplier, shift, *_ = operands(node(state, "Requantize", "Mul_s"))
    assert int(multiplier) * 2.0**-16 == factor
    assert int(shift) == 16
    assert "Mul" in [n.op for n in state.graph.nodes]


def test_a_mean_is_a_sum_and_a_requantize() -> None:
    state = integer("a = Conv(x, w) g = GlobalAveragePool(a) y = Conv(g, w)")
    found = node(state, "ReduceSum")
    np.testing.assert_array_equal(ir.array(found.inputs[1]), [2, 3])
    assert found.attrs["keepdims"] == 1
    factor = state.params["a"].scale / (state.params["g"].scale * np.float32(16))
    assert int(operands(node(state, "Requantize", "GlobalAveragePool"))[0]) * 2.0**-16 == factor


def test_a_relu_of_its_own_is_an_integer_clip() -> None:
    state = integer("a = Conv(x, w) r = Relu(a) s = Add(r, a) y = Conv(s, w)")
    found = node(state, "Clip")
    zero_point = state.params["a"].zero_point
    assert zero_point > 0
    assert [int(v) for v in operands(found)] == [zero_point, 255]


def test_a_clip_behind_a_q() -> None:
    """A range wider than the bounds: saturation clips at 255 / 256, the integer clip at a half."""
    stages = {p.name: p for p in TO_INTEGER}
    state = compiled(model_of("a = Conv(x, w) y = Clip(a, zero, half)"), *TO_QDQ[:3], target=INTEGER)
    state.params["y"] = params_from_range(0, 255 / 256, state.params["y"].spec)
    advance(state, stages["scale-weights"], InsertQdq(), LowerInteger(), FoldScales())
    assert [n.op for n in state.graph.nodes][-3:] == ["Requantize", "Clip", "DequantizeLinear"]
    assert [int(v) for v in operands(node(state, "Clip"))] == [0, 128]


@pytest.mark.parametrize(
    "function", ["Sigmoid(a)", "HardSwish(a)", "LeakyRelu<alpha=0.3>(a)", "com.microsoft.QuickGelu(a)"]
)
def test_a_function_is_a_table_of_what_onnx_runtime_computes(function: str) -> None:
    state = integer(f"a = Conv(x, w) t = {function} y = Conv(t, w)")
    [table] = operands(node(state, "Table"))
    assert table.dtype == np.uint8
    assert table.shape == (256,)
    inputs = dequantize(np.arange(256, dtype=np.uint8), state.params["a"])
    alone = graph_text(f"g (float[1,1,16,16] a) => (float[] t) {{ t = {function} }}")
    [outputs] = run(session(alone), {"a": inputs.reshape(1, 1, 16, 16)})
    np.testing.assert_array_equal(table, quantize(outputs.reshape(-1), state.params["t"]))


def test_the_table_keeps_the_model_that_filled_it() -> None:
    state = integer("a = Conv(x, w) t = Tanh(a) y = Conv(t, w)")
    [(name, model)] = state.tables.items()
    assert name == node(state, "Table").name
    ops = [n.op_type for n in onnx.ModelProto.FromString(model).graph.node]
    assert ops == ["DequantizeLinear", "Tanh", "QuantizeLinear"]


def test_concat_rescales_by_tables_only_where_scales_differ() -> None:
    body = """a = Conv(x, w) b = Mul(a, half) c = Conv(b, w) s = Concat<axis=1>(a, b, a) t = Slice(s, zero4, four4, one4)
              y = Conv(t, w) z = Add(y, c)"""
    CONSTANTS.update(zero4=np.int64([0]), four4=np.int64([4]), one4=np.int64([1]))
    state = integer(body)
    assert state.leader("a") == "s"
    tables = [n for n in state.graph.nodes if n.op == "Table"]
    assert len(tables) == 1
    assert [t.name for t in node(state, "Concat").inputs] == ["a_raw_q", tables[0].outputs[0].name, "a_raw_q"]
    [entries] = operands(tables[0])
    expected = quantize(dequantize(np.arange(256, dtype=np.uint8), state.params["b"]), state.params["s"])
    np.testing.assert_array_equal(entries, expected)


@pytest.mark.parametrize("target", [ORT_CPU, INTEGER], ids=lambda t: t.name)
def test_concat_of_a_constant_as_of_a_class_token(target: Target) -> None:
    token = np.linspace(-0.2, 0.1, 64, dtype=np.float32).reshape(1, 4, 4, 4)
    text = (
        """g (float[1,4,4,4] x) => (float[1,4,8,4] y) { a = Conv(x, w) s = Concat<axis=2>(a, token) y = Conv(s, w1) }"""
    )
    forms = all_forms(graph_text(text, token=token, w=CONSTANTS["w"], w1=CONSTANTS["w1"]), target)
    assert not ops_between(forms.integer)
    assert not [n for n in forms.integer.graph.node if n.op_type == "Table"]
    assert_bit_identical(forms)


def test_no_float_is_left_inside() -> None:
    body = """a = Conv(x, w) h = HardSwish(a) b = Conv(h, w1) s = Add(h, b) r = Relu(s) g = GlobalAveragePool(r)
              e = Conv(g, w) q = Sigmoid(e) m = Mul(r, q) y = Conv(m, w)"""
    state = integer(body)
    assert not ops_between(ir.to_proto(state.graph))
    assert [n.op for n in state.graph.nodes].count("QuantizeLinear") == 1


@pytest.mark.parametrize(
    "body", ["a = Conv(x, w) s = Add(a, a) y = Conv(s, w)", "a = Conv(x, w) t = Tanh(a) y = Conv(t, w)"]
)
def test_a_second_run_returns_zero(body: str) -> None:
    state = integer(body)
    before = format_graph(state.graph)
    assert FoldScales().run(state) == 0
    assert format_graph(state.graph) == before


def test_scales_that_are_not_dyadic_are_refused() -> None:
    """Without align-scales an Add stays between DQ and Q; the graph still runs."""
    body = "a = Conv(x, w) b = Conv(x, w1) s = Add(a, b) y = Conv(s, w)"
    passes = [p for p in TO_INTEGER if p.name != "align-scales"]
    state = compiled(model_of(body), *passes, target=INTEGER)
    assert ops_between(ir.to_proto(state.graph)) == {"Add"}
