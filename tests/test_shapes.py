"""Shape inference on graphs."""

from __future__ import annotations

import numpy as np
import onnx

from qcompiler import ir
from qcompiler.ir import Graph
from qcompiler.shapes import infer_shapes
from tests.support import model_from_text


def inferred(
    model: onnx.ModelProto, trust: bool = True
) -> tuple[Graph, dict[str, tuple[int | str | None, ...] | None]]:
    graph = ir.from_proto(model)
    infer_shapes(graph, trust)
    return graph, {t.name: ir.shape(t) for t in ir.tensors(graph)}


def test_types_and_symbols_spread() -> None:
    model = model_from_text(
        "g (float[N,3,8,8] x) => (float[M,4,6,6] y) { c = Conv (x, w) y = Relu (c) }",
        {"w": np.zeros((4, 3, 3, 3), np.float32)},
    )
    graph, shapes = inferred(model)
    assert shapes["c"] == ("N", 4, 6, 6)
    assert shapes["y"] == ("M", 4, 6, 6), "an output keeps the name of its axis"
    assert graph.nodes[0].outputs[0].dtype == np.float32


def test_large_weights_stay_out_and_small_integers_go_in() -> None:
    model = model_from_text(
        "g (float[N,64] x) => (float[a,b,c] y) { m = MatMul (x, w) y = Reshape (m, s) }",
        {"w": np.zeros((64, 96), np.float32), "s": np.array([0, 12, 8], np.int64)},
    )
    assert inferred(model)[1]["y"] == ("a", 12, 8)


def test_paddle_spellings_of_unknown_sizes() -> None:
    model = model_from_text("g (float[N,3] x) => (float[N,3] y) { y = Relu (x) }")
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[0].dim_value, dims[1].dim_param = -1, "?"
    assert inferred(model)[1]["x"] == (None, None)


def test_results_of_foreign_operators_keep_what_the_file_says() -> None:
    model = model_from_text("g (float[2,3] x) => (float[2,3] z) { y = com.microsoft.FastGelu (x) z = Relu (y) }")
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 3]))
    assert inferred(model, trust=False)[1]["y"] == (2, 3)


def test_bodies_are_inferred_too() -> None:
    model = model_from_text(
        "g (float[2,3] x, bool c) => (float[2,3] y) { y = If (c) <then_branch = a () => (float[2,3] r)"
        " { t = Transpose (x) r = Transpose (t) }, else_branch = b () => (float[2,3] s) { s = Neg (x) }> }"
    )
    graph = ir.from_proto(model)
    infer_shapes(graph)
    body = graph.nodes[0].attrs["then_branch"]
    assert ir.shape(body.nodes[0].outputs[0]) == (3, 2)


def test_a_wrong_model_changes_nothing() -> None:
    model = model_from_text("g (float[2,3] x) => (float[2,3] y) { t = MatMul (x, x) y = Relu (t) }")
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, [2, 3]))
    assert inferred(model)[1]["t"] == (2, 3)


def test_attributes_of_strings_survive() -> None:
    keys = onnx.helper.make_tensor("keys", onnx.TensorProto.STRING, [2], [b"a", b"b"])
    values = onnx.helper.make_tensor("values", onnx.TensorProto.INT64, [2], [3, 4])
    node = onnx.helper.make_node(
        "LabelEncoder", ["x"], ["y"], "n", domain="ai.onnx.ml", keys_tensor=values, values_tensor=keys
    )
    model = model_from_text("g (int64[2] x) => (string[2] y) { y = Identity(x) }")
    model.graph.node[0].CopyFrom(node)
    model.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 4))
    graph = ir.from_proto(model)
    infer_shapes(graph)
    assert ir.to_proto(graph).graph.node[0].attribute == model.graph.node[0].attribute
