"""normalize: one form for models of any exporter."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, parser
from qcompiler_passes.normalize import Normalize

from qcompiler import ir
from qcompiler.errors import UserError
from tests.support import assert_same_function, model_from_text, ops_of, random_feeds, run, run_passes, state_of


def normalized(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model after the pass; checks that it still computes the same and that a second run does nothing."""
    result, state = run_passes(model, Normalize())
    onnx.checker.check_model(result)
    assert_same_function(model, result)
    assert Normalize().run(state) == 0
    return result


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("value = float[2] {1, 2}", np.array([1, 2], np.float32)),
        ("value_float = 2.5", np.array(2.5, np.float32)),
        ("value_floats = [1.5, 2.5]", np.array([1.5, 2.5], np.float32)),
        ("value_int = 3", np.array(3, np.int64)),
        ("value_ints = [3, 4]", np.array([3, 4], np.int64)),
    ],
)
def test_constant_nodes_become_initializers(attribute: str, expected: np.ndarray) -> None:
    model = model_from_text(
        f"g (float[3,2] x) => (float[3,2] y) {{ c = Constant <{attribute}> () f = Cast <to = 1> (c) y = Add (x, f) }}"
    )
    result = normalized(model)
    assert "Constant" not in ops_of(result)
    (stored,) = result.graph.initializer
    array = onnx.numpy_helper.to_array(stored)
    assert stored.name == "c"
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)


def test_a_constant_that_is_an_output_keeps_its_node_and_its_readers_get_a_copy() -> None:
    model = model_from_text(
        "g (float[2] x) => (float[2] y, float[2] c) { c = Constant <value = float[2] {1, 2}> () y = Add (x, c) }"
    )
    assert ops_of(normalized(model)) == ["Constant", "Add"]


def test_text_constants_stay() -> None:
    model = model_from_text(
        'g (float[2] x) => (float[2] y, string[1] z) { z = Constant <value_strings = ["a"]> () y = Relu (x) }'
    )
    result, _ = run_passes(model, Normalize())
    assert run(result, {"x": np.zeros(2, np.float32)})[1].tolist() == ["a"]


def test_sparse_constants_are_refused() -> None:
    model = model_from_text("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    values = onnx.numpy_helper.from_array(np.ones(1, np.float32), "v")
    sparse = helper.make_sparse_tensor(values, onnx.numpy_helper.from_array(np.zeros(1, np.int64)), [2])
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], sparse_value=sparse))
    with pytest.raises(UserError, match="sparse"):
        run_passes(model, Normalize())


def test_names_are_unique_and_every_node_has_an_origin() -> None:
    model = model_from_text("g (float[2] x) => (float[2] y) { a = Relu (x) b = Neg (a) c = Abs (b) y = Exp (c) }")
    for node, name in zip(model.graph.node, ["", "twice", "twice", "Relu_0"], strict=True):
        node.name = name
    result, state = run_passes(model, Normalize())
    names = [n.name for n in result.graph.node]
    assert names == ["Relu_0_", "twice", "twice_2", "Relu_0"]
    assert state.origin == {name: (name,) for name in names}


def test_identity_and_inference_dropout_disappear() -> None:
    text = """g (float[2] x) => (float[2] y, float[2] z) <bool off = {0}, float r = {0.5}> {
        a = Identity (x) b, mask = Dropout (a, r, off) c = Relu (b) d = Cast <to = 1> (c) y = Identity (d)
        e = Neg (d) z = Dropout (e)
    }"""
    result = normalized(model_from_text(text))
    assert ops_of(result) == ["Relu", "Neg"]
    assert [o.name for o in result.graph.output] == ["y", "z"]


def test_dropout_in_training_or_with_a_used_mask_stays() -> None:
    text = """g (float[2] x) => (float[2] y, bool[2] mask, float[2] z) <bool on = {1}, float r = {0.5}> {
        a, mask = Dropout (x) y = Relu (a) z, unused = Dropout (x, r, on)
    }"""
    result, _ = run_passes(model_from_text(text), Normalize())
    assert ops_of(result).count("Dropout") == 2


def test_an_identity_from_input_to_output_stays() -> None:
    model = model_from_text("g (float[2] x) => (float[2] y) { y = Identity (x) }")
    assert ops_of(normalized(model)) == ["Identity"]


def test_initializers_are_no_inputs_and_unused_ones_go() -> None:
    model = model_from_text(
        "g (float[2] x, float[2] w, float[5] unused, float[2] z) => (float[2] y) { a = Mul (x, w) y = Add (a, z) }",
        {"w": np.array([2, 3], np.float32), "unused": np.ones(5, np.float32)},
    )
    model.ir_version = 3
    result, _ = run_passes(model, Normalize())
    assert [i.name for i in result.graph.input] == ["x", "z"]
    assert [i.name for i in result.graph.initializer] == ["w"]
    feeds = random_feeds(model)
    np.testing.assert_array_equal(run(result, feeds)[0], run(model, feeds)[0])


def test_the_long_name_of_the_default_domain_becomes_short() -> None:
    model = model_from_text("g (float[2,3] x) => (float[2,3] y) { y = Softmax <axis = 0> (x) }", opset=11)
    short = onnx.ModelProto()
    short.CopyFrom(model)
    model.opset_import[0].domain = model.graph.node[0].domain = "ai.onnx"
    result, _ = run_passes(model, Normalize())
    assert {d.domain: d.version for d in result.opset_import} == {"": 17}
    assert_same_function(short, result)


def test_other_domains_keep_their_versions() -> None:
    model = parser.parse_model("""<ir_version: 7, opset_import: ["" : 11, "ai.onnx.ml" : 2, "com.microsoft" : 1]>
    g (float[2,3] x) => (float[2,3] y) {
        a = com.microsoft.Gelu (x) b = ai.onnx.ml.Scaler <offset = [0.5], scale = [2.0]> (a) y = Clip (b)
    }""")
    result = normalized(model)
    assert {d.domain: d.version for d in result.opset_import} == {"": 17, "ai.onnx.ml": 2, "com.microsoft": 1}


SUBGRAPHS = {
    "if": """g (float[2,3] x, bool c) => (float[2,3] y) {
        k = Constant <value = float[1] {2}> ()
        two = Mul (x, k)
        y = If (c) <
            then_branch = a () => (float[2,3] r) { t = Constant <value = float[1] {3}> () u = Mul (two, t) r = Add (u, k) },
            else_branch = b () => (float[2,3] s) { t = Constant <value = float[1] {4}> () u = Sub (x, t) s = Mul (u, k) }>
    }""",
    "loop": """g (float[2,3] x) => (float[2,3] y) {
        n = Constant <value = int64 {3}> () go = Constant <value = bool {1}> () half = Constant <value = float {0.5}> ()
        y = Loop (n, go, x) <body = b (int64 i, bool c, float[2,3] s) => (bool d, float[2,3] t) {
            d = Identity (c) m = Mul (s, half) e = Identity (m) t = Softmax <axis = 0> (e)
        }>
    }""",
}


@pytest.mark.parametrize("kind", SUBGRAPHS)
def test_subgraphs_stay_correct(kind: str) -> None:
    model = model_from_text(SUBGRAPHS[kind], opset=11)
    result = normalized(model)
    graphs = list(ir.all_graphs(ir.from_proto(result)))
    names = [n.name for g in graphs for n in g.nodes]
    assert len(set(names)) == len(names) and "" not in names


def test_stale_shapes_in_the_file_are_not_believed() -> None:
    model = model_from_text("g (float[N,3] x) => (float[N,3] y) { a = Relu (x) y = Neg (a) }")
    model.graph.value_info.append(helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [1, 3]))
    state = state_of(model)
    Normalize().run(state)
    assert ir.shape(state.graph.nodes[0].outputs[0]) == ("N", 3)
