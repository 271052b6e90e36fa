"""The graph helpers: import and export, order, links, captures."""

from __future__ import annotations

import time

import numpy as np
import onnx
import pytest

from qcompiler import functions, ir
from qcompiler.ir import Constant, Graph, Node, Variable
from tests.support import model_from_text, ops_of, random_feeds, run

IF_MODEL = """
g (float[2] x, bool c) => (float[2] y) {
    a = Relu(x)
    b = Neg(a)
    y = If (c) <
        then_branch = then_graph () => (float[2] t) { t = Exp(a) },
        else_branch = else_graph () => (float[2] e) {
            e = If (c) <
                then_branch = inner_then () => (float[2] it) { it = Abs(b) },
                else_branch = inner_else () => (float[2] ie) { ie = Identity(a) }
            >
        }
    >
}"""


def graph_of(text: str) -> Graph:
    return ir.from_proto(model_from_text(text))


def node_of(graph: Graph, op: str) -> Node:
    [node] = [n for n in graph.nodes if n.op == op]
    return node


def chain(length: int) -> Graph:
    """Relu nodes, each reading the one before it, listed last first."""
    tensors = [Variable(f"t{i}", np.float32, [1]) for i in range(length + 1)]
    nodes = [Node("Relu", f"n{i}", {}, [tensors[i]], [tensors[i + 1]]) for i in range(length)]
    return Graph(nodes[::-1], [tensors[0]], [tensors[-1]], opset=17)


def test_round_trip_keeps_opset_functions_and_metadata() -> None:
    model = model_from_text("g (float[2] x) => (float[2] y) { y = com.microsoft.QuickGelu(x) }", opset=19)
    model.opset_import.append(onnx.helper.make_opsetid("unused", 3))
    again = ir.to_proto(ir.from_proto(model), {"b": "2", "a": "1"})
    assert {d.domain: d.version for d in again.opset_import} == {"": 19, "com.microsoft": 1}
    assert [(p.key, p.value) for p in again.metadata_props] == [("a", "1"), ("b", "2")]
    assert again.ir_version == ir.IR_VERSION


def test_export_takes_a_new_opset() -> None:
    graph = graph_of("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    graph.opset = 21
    assert [d.version for d in ir.to_proto(graph).opset_import] == [21]


def test_export_adds_the_functions_in_use() -> None:
    graph = graph_of("g (int32[2] q) => (int32[2] y) { y = Identity(q) }")
    node = node_of(graph, "Identity")
    node.op, node.domain = "Rescale", functions.DOMAIN
    for array in (np.int32(3), np.int32(2)):
        ir.add_input(node, Constant(f"k{array}", np.asarray(array)))
    model = ir.to_proto(graph)
    assert [f.name for f in model.functions] == ["Rescale"]
    onnx.checker.check_model(model)
    [y] = run(model, {"q": np.array([5, 7], np.int32)})
    assert y.tolist() == [4, 8]
    assert ops_of(ir.to_proto(ir.from_proto(model))) == ["Rescale"]


def test_captures_see_every_depth() -> None:
    graph = graph_of(IF_MODEL)
    outer = node_of(graph, "If")
    assert {t.name for t in ir.captures(outer)} == {"a", "b", "c"}
    assert ir.has_subgraph(outer)
    assert not ir.has_subgraph(node_of(graph, "Relu"))
    assert ir.captures(node_of(graph, "Relu")) == []
    assert [len(g.nodes) for g in ir.all_graphs(graph)] == [3, 1, 1, 1, 1]


def test_subgraph_readers_count_as_consumers() -> None:
    graph = graph_of(IF_MODEL)
    assert {n.op for n in node_of(graph, "Relu").outputs[0].outputs} == {"Neg", "Exp", "Identity"}


def test_dead_nodes_go_captured_ones_stay() -> None:
    graph = graph_of(IF_MODEL)
    spare = Variable("spare", np.float32, [2])
    graph.nodes.append(Node("Sin", "dead", {}, [graph.inputs[0]], [spare]))
    assert [n.name for n in ir.drop_dead_nodes(graph)] == ["dead"]
    assert [n.op for n in graph.nodes] == ["Relu", "Neg", "If"]
    assert all(n.op != "Sin" for n in graph.inputs[0].outputs)


def test_a_submodel_of_a_node_with_subgraphs() -> None:
    graph = graph_of(IF_MODEL)
    branches = node_of(graph, "If")
    for op in ("Relu", "Neg"):
        node_of(graph, op).outputs[0].dtype = np.dtype(np.float32)
    model = ir.submodel(ir.captures(branches), branches.outputs, graph.opset)
    assert ops_of(model) == ["If"]
    feeds = {"c": np.array(False), "a": np.float32([1, 2]), "b": np.float32([3, 4])}
    assert run(model, feeds)[0].tolist() == [1, 2]


def test_toposort_gives_readers_the_order_of_a_new_import() -> None:
    graph = graph_of(IF_MODEL)
    relu = node_of(graph, "Relu")
    readers = relu.outputs[0].outputs
    before = [n.name for n in readers]
    assert len(before) > 2
    list.reverse(readers)
    ir.toposort(graph)
    assert [n.name for n in readers] == before


def test_toposort_puts_captured_tensors_first() -> None:
    graph = graph_of(IF_MODEL)
    graph.nodes.reverse()
    ir.toposort(graph)
    assert [n.op for n in graph.nodes] == ["Relu", "Neg", "If"]


def test_toposort_is_stable() -> None:
    graph = graph_of("g (float[2] x) => (float[2] a, float[2] b, float[2] c) { b = Sin(x) a = Cos(x) c = Abs(x) }")
    ir.toposort(graph)
    assert [n.op for n in graph.nodes] == ["Sin", "Cos", "Abs"]


def test_toposort_of_a_reversed_chain_is_quick_and_does_not_recurse() -> None:
    graph = chain(20_000)
    start = time.perf_counter()
    ir.toposort(graph)
    assert time.perf_counter() - start < 2
    assert [n.name for n in graph.nodes[:3]] == ["n0", "n1", "n2"]


def test_toposort_names_a_cycle() -> None:
    graph = chain(3)
    first, last = graph.nodes[-1], graph.nodes[0]
    ir.set_input(first, 0, last.outputs[0])
    with pytest.raises(ValueError, match="cycle through node"):
        ir.toposort(graph)


def test_one_tensor_with_many_readers_is_rewired_in_linear_time() -> None:
    hub = Variable("hub", np.float32, [1])
    other = Variable("other", np.float32, [1])
    nodes = [Node("Relu", f"n{i}", {}, [hub], [Variable(f"y{i}")]) for i in range(3_000)]
    start = time.perf_counter()
    for node in nodes:
        ir.set_input(node, 0, other)
    assert time.perf_counter() - start < 2
    assert len(hub.outputs) == 0
    assert len(other.outputs) == 3_000


def test_set_input_mends_one_link_of_a_node_that_reads_a_tensor_twice() -> None:
    graph = graph_of("g (float[2] x, float[2] z) => (float[2] y) { y = Add(x, x) }")
    add = node_of(graph, "Add")
    x, z = graph.inputs
    ir.set_input(add, 1, z)
    assert [t.name for t in add.inputs] == ["x", "z"]
    assert (len(x.outputs), len(z.outputs)) == (1, 1)


def test_take_output_moves_the_graph_output() -> None:
    graph = graph_of("g (float[2] x) => (float[2] y) { t = Neg(x) y = Relu(t) }")
    neg, relu = graph.nodes
    y = graph.outputs[0]
    ir.take_output(neg, 0, y)
    assert ir.producer(y) is neg
    assert relu.outputs[0].is_empty()
    ir.drop_dead_nodes(graph)
    assert ops_of(ir.to_proto(graph)) == ["Neg"]


def test_tensors_appear_once_in_order() -> None:
    graph = graph_of("g (float[2] x) => (float[2] y) { t = Neg(x) y = Add(t, t) }")
    assert [t.name for t in ir.tensors(graph)] == ["x", "t", "y"]


def test_shapes() -> None:
    graph = graph_of("g (float[N,3] x) => (float[?,3] y) { y = Relu(x) }")
    assert ir.shape(graph.inputs[0]) == ("N", 3)
    assert ir.static_shape(graph.inputs[0]) is None
    assert ir.static_shape(Variable("v", np.float32, [2, 3])) == (2, 3)
    assert ir.shape(Variable("v")) is None


def test_optional_input_and_scalars() -> None:
    model = model_from_text("g (float[2] x) => (float[2] y) { y = Clip(x, , high) }", {"high": np.float32(6)})
    clip = node_of(ir.from_proto(model), "Clip")
    assert ir.optional_input(clip, 1) is None
    assert ir.optional_input(clip, 3) is None
    assert ir.scalar(clip.inputs[2]) == 6
    assert ir.scalar(clip.inputs[0]) is None
    assert ir.scalar(Constant("pair", np.zeros(2, np.float32))) is None


def test_type_name() -> None:
    names = [ir.type_name(Variable("t", t)) for t in (None, np.float32, np.dtype(bool), onnx.TensorProto.BFLOAT16)]
    assert names == ["?", "float32", "bool", "bfloat16"]


def test_round_trip_runs_the_same() -> None:
    model = model_from_text(IF_MODEL)
    for chosen in (True, False):
        feeds = {**random_feeds(model), "c": np.array(chosen)}
        np.testing.assert_array_equal(run(model, feeds)[0], run(ir.to_proto(ir.from_proto(model)), feeds)[0])
