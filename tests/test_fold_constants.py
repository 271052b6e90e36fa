"""fold-constants: what does not depend on the data is computed once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from onnx import parser
from qcompiler_passes.fold_constants import FoldConstants
from qcompiler_passes.normalize import Normalize

from qcompiler import ir
from tests.support import assert_same_function, model_from_text, ops_of, run_passes

X = "g (float[N,3,8,8] x) => (float[a,b,c,d] y)"
X2 = "g (float[N,3,8,8] x) => (float[a,b] y)"


def folded(
    text: str, initializers: Mapping[str, np.ndarray] | None = None, opset: int = 17, stage: FoldConstants | None = None
) -> onnx.ModelProto:
    """The model after the pass; checks that it still computes the same and that a second run does nothing."""
    model = model_from_text(text, initializers, opset)
    stage = stage or FoldConstants()
    result, state = run_passes(model, Normalize(), stage)
    onnx.checker.check_model(result)
    assert_same_function(model, result)
    assert stage.run(state) == 0
    return result


def constant(model: onnx.ModelProto, op: str, index: int) -> list[float]:
    """The constant that is input `index` of the only node of that type."""
    (node,) = [n for n in model.graph.node if n.op_type == op]
    stored = {t.name: t for t in model.graph.initializer}
    return onnx.numpy_helper.to_array(stored[node.input[index]]).tolist()


def test_nodes_that_read_constants_are_evaluated_exactly() -> None:
    w = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    text = "g (float[2,3] x) => (float[2,5] y) <float s = {3}> { t = Transpose (w) u = Mul (t, s) y = MatMul (x, u) }"
    result = folded(text, {"w": w})
    assert ops_of(result) == ["MatMul"]
    np.testing.assert_array_equal(constant(result, "MatMul", 1), w.T * np.float32(3))


def test_several_outputs_and_outer_readers_are_served() -> None:
    text = """g (float[2] x, bool c) => (float[2] y) <float[4] w = {1, 2, 3, 4}> {
        p, q = Split <axis = 0> (w)
        y = If (c) <then_branch = a () => (float[2] r) { r = Add (x, p) }, else_branch = b () => (float[2] s) { s = Mul (x, q) }>
    }"""
    assert ops_of(folded(text)) == ["If"]


def test_a_constant_graph_output_stays_computable() -> None:
    text = "g (float[2] x) => (float[2] y, float[2] z) <float[2] w = {1, 2}> { y = Add (x, w) n = Neg (w) z = Exp (n) }"
    assert ops_of(folded(text)) == ["Add", "Exp"]


def test_random_nodes_are_left_alone() -> None:
    text = "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { r = RandomNormalLike (w) y = Add (x, r) }"
    result, _ = run_passes(model_from_text(text), Normalize(), FoldConstants())
    assert ops_of(result) == ["RandomNormalLike", "Add"]


@pytest.mark.parametrize(
    "bomb",
    [
        "b = ConstantOfShape (s)",
        "b = Expand (one, s)",
        "b = Tile (one2, s)",
    ],
)
def test_a_small_node_does_not_become_a_large_constant(bomb: str) -> None:
    text = f"""g (float[1] x) => (float[1,1] y)
        <int64[2] s = {{1000, 1000}}, float one = {{2}}, float[1,1] one2 = {{2}}, int64[2] axes = {{0, 1}}> {{
        {bomb} t = ReduceSum (b, axes) y = Add (x, t)
    }}"""
    assert len(folded(text).graph.node) == 3
    small = text.replace("1000, 1000", "30, 30")
    assert ops_of(folded(small)) == ["Add"]


def test_max_bytes_bounds_what_grows() -> None:
    text = "g (float[4] x) => (float[4] y) <int64[1] s = {4}, float one = {2}> { b = Expand (one, s) y = Add (x, b) }"
    assert ops_of(folded(text, stage=FoldConstants(max_bytes=4))) == ["Expand", "Add"]


def test_operators_that_onnxruntime_lacks_do_not_stop_the_others() -> None:
    text = """g (float[3] x) => (float[3] y, bool[3] z) <float[3] w = {1,2,3}, int64[3] i = {1,2,3}, uint16[3] u = {3,2,1}> {
        n = Neg (w) y = Add (x, n) d = Neg (i) e = Cast <to = 4> (d) f = Max (u, e) z = Equal (f, u)
    }"""
    state = run_passes(model_from_text(text), Normalize(), FoldConstants())[1]
    assert state.graph.nodes[0].op == "Add"
    assert ir.is_constant(state.graph.nodes[0].inputs[1])


DEQUANTIZED = """g (float[2,3] x) => (float[2,4] y)
    <int8[3,4] w = {1,-2,3,4,-5,6,7,8,9,-10,11,12}, float[4] s = {0.5,0.25,0.125,1}, int8[4] z = {0,0,0,0}> {
    d = DequantizeLinear <axis = 1> (w, s, z) y = MatMul (a, d)
"""


def test_dequantized_weights_become_float_weights() -> None:
    text = DEQUANTIZED.replace("(a, d)", "(x, d)") + "}"
    assert ops_of(folded(text)) == ["MatMul"]


def test_so_do_those_of_a_model_that_quantizes_activations() -> None:
    head = "q = QuantizeLinear (x, t) a = DequantizeLinear (q, t) "
    text = DEQUANTIZED.replace("<int8", "<float t = {0.1}, int8", 1).replace("d = Deq", head + "d = Deq") + "}"
    assert ops_of(folded(text)) == ["QuantizeLinear", "DequantizeLinear", "MatMul"]


def test_flatten_by_shape_arithmetic_is_one_reshape() -> None:
    text = f"""{X2} <int64 i = {{0}}, int64[1] ax = {{0}}, int64[1] rest = {{-1}}> {{
        s = Shape (x) n = Gather (s, i) u = Unsqueeze (n, ax) t = Concat <axis = 0> (u, rest) y = Reshape (x, t)
    }}"""
    result = folded(text)
    assert ops_of(result) == ["Reshape"]
    assert constant(result, "Reshape", 1) == [0, -1]


def test_a_batch_size_from_another_tensor_becomes_minus_one() -> None:
    text = """g (float[N,3,8,8] x, float[M,2] z) => (float[a,b] y) <int64[1] k = {192}, int64[1] o = {0}, int64[1] e = {1}> {
        s = Shape (z) n = Slice (s, o, e) t = Concat <axis = 0> (n, k) y = Reshape (x, t)
    }"""
    result = folded(text)
    assert ops_of(result) == ["Reshape"]
    assert constant(result, "Reshape", 1) == [-1, 192]


def test_attention_heads_with_a_dynamic_batch() -> None:
    text = """g (float[N,T,12] x) => (float[a,b,c,d] y)
        <int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}, int64 h = {3}, int64[1] o = {0}> {
        s = Shape (x) n = Gather (s, i0) t = Gather (s, i1) c = Gather (s, i2) d = Div (c, h)
        n1 = Unsqueeze (n, o) t1 = Unsqueeze (t, o) h1 = Unsqueeze (h, o) d1 = Unsqueeze (d, o)
        shape = Concat <axis = 0> (n1, t1, h1, d1) r = Reshape (x, shape) y = Transpose <perm = [0,2,1,3]> (r)
    }"""
    result = folded(text)
    assert ops_of(result) == ["Reshape", "Transpose"]
    assert constant(result, "Reshape", 1) == [0, 0, 3, 4]


def test_two_unknown_sizes_stay_dynamic() -> None:
    text = """g (float[N,3,T] x) => (float[a,b,c] y) <int64[1] o = {0}, int64[1] e = {1}, int64[1] p = {2}, int64[1] q = {3}> {
        s = Shape (x) n = Slice (s, o, e) t = Slice (s, p, q) c = Slice (s, e, p)
        shape = Concat <axis = 0> (t, n, c) y = Reshape (x, shape)
    }"""
    result = folded(text)
    assert "Shape" in ops_of(result)


def test_resize_to_a_multiple_of_a_known_size_gets_constant_scales() -> None:
    text = f"""{X} <int64[1] o = {{0}}, int64[1] m = {{2}}, int64[1] e = {{4}}, int64[2] k = {{2,2}}> {{
        s = Shape (x) head = Slice (s, o, m) tail = Slice (s, m, e) big = Mul (tail, k)
        size = Concat <axis = 0> (head, big) y = Resize <mode = "linear"> (x, , , size)
    }}"""
    result = folded(text)
    assert ops_of(result) == ["Resize"]
    assert constant(result, "Resize", 2) == [1, 1, 2, 2]


def test_pads_from_the_chain_that_torch_writes() -> None:
    text = f"""{X} <int64[4] p = {{0,1,0,1}}, int64[1] four = {{4}}, int64[2] two = {{-1,2}}, int64[1] flat = {{-1}},
        int64[1] start = {{-1}}, int64[1] end = {{-9223372036854775807}}, int64[1] ax = {{0}}, int64[1] step = {{-1}}> {{
        z = ConstantOfShape (four) zi = Cast <to = 7> (z) c = Concat <axis = 0> (p, zi) r = Reshape (c, two)
        v = Slice (r, start, end, ax, step) t = Transpose <perm = [1,0]> (v) pads = Reshape (t, flat) y = Pad (x, pads)
    }}"""
    result = folded(text)
    assert ops_of(result) == ["Pad"]
    assert constant(result, "Pad", 1) == [0, 0, 0, 0, 0, 0, 1, 1]


def test_an_old_softmax_of_a_tensor_with_unknown_rank_becomes_plain() -> None:
    text = """g (float[N,6] x) => (float[a,b,c] y) <int64 i = {0}, int64[2] k = {2,3}> {
        s = Shape (x) n = Gather (s, i) u = Unsqueeze <axes = [0]> (n) t = Concat <axis = 0> (u, k) r = Reshape (x, t)
        y = Softmax <axis = 2> (r)
    }"""
    result = folded(text, opset=11)
    assert ops_of(result) == ["Reshape", "Softmax"]


def test_nothing_is_assumed_about_operators_of_old_opsets() -> None:
    model = parser.parse_model("""<ir_version: 8, opset_import: ["" : 11]> g (float[2,1,3] x) => (int64[1,3] y) {
        s = Shape (x) y = Unsqueeze <axes = [0]> (s)
    }""")
    result, _ = run_passes(model, Normalize(), FoldConstants())
    assert_same_function(model, result)


def test_the_same_model_gives_the_same_bytes() -> None:
    text = DEQUANTIZED.replace("(a, d)", "(x, d)") + "}"
    assert folded(text).SerializeToString() == folded(text).SerializeToString()


IF = """g (float[2,1,3] x) => (float[a,b] y) <int64 axis = {1}, int64 one = {1}> {
    s = Shape (x) d = Gather (s, axis) c = Equal (d, one)
    t = If (c) <
        then_branch = a () => (float[2,3] r) { k = Constant <value = int64[1] {1}> () q = Squeeze (x, k) r = Neg (q) },
        else_branch = b () => (float[2,1,3] e) { e = Identity (x) }>
    y = Exp (t)
}"""


def test_an_if_with_a_known_condition_is_its_branch() -> None:
    assert ops_of(folded(IF)) == ["Squeeze", "Neg", "Exp"]
    other = IF.replace("int64 one = {1}", "int64 one = {2}").replace("float[a,b] y", "float[a,b,c] y")
    assert ops_of(folded(other)) == ["Exp"]


def test_an_inlined_branch_may_make_outputs_and_constants_and_hold_more_branches() -> None:
    text = """g (float[2] x, bool c) => (float[2] y, float[2] z, float[2] w) <bool on = {1}> {
        y, z, k = If (on) <then_branch = a () => (float[2] r, float[2] s, float[2] t) {
            t = Constant <value = float[2] {1, 2}> () s = Neg (x)
            r = If (c) <then_branch = p () => (float[2] u) { u = Add (s, t) }, else_branch = q () => (float[2] v) { v = Exp (s) }>
        }, else_branch = b () => (float[2] f, float[2] g, float[2] h) { f = Neg (x) g = Neg (x) h = Neg (x) }>
        w = Mul (k, y)
    }"""
    assert ops_of(folded(text)) == ["Neg", "If", "Mul"]


def test_types_that_numpy_lacks_pass_through() -> None:
    text = """g (bfloat16[2] x, int4[2] q) => (bfloat16[2] y, int4[2] z, float[2] w) <bfloat16[2] k = {1, 2}, int64[1] h = {2}> {
        n = Neg (k) b = Add (x, n) y = Cast <to = 16> (b) i = Identity (q) z = Reshape (i, h) w = Cast <to = 1> (b)
    }"""
    result, _ = run_passes(model_from_text(text, opset=21), Normalize(), FoldConstants())
    onnx.checker.check_model(result, full_check=True)
    assert [o.type.tensor_type.elem_type for o in result.graph.output] == [16, 22, 1]
