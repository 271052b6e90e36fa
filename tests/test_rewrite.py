"""The Rewriter and rules: links, names, provenance, subgraphs, graph outputs, fixed points."""

from __future__ import annotations

import time

import numpy as np
import onnx
import pytest

from qcompiler import ir
from qcompiler.ir import Node
from qcompiler.rewrite import Refusal, Rewriter, apply_rules
from qcompiler.state import CompileState
from qcompiler.verify import verify
from tests.support import assert_same_function, model_from_text, ops_of, run, state_of
from tests.test_ir import IF_MODEL


def rewriter_of(text: str) -> Rewriter:
    state = state_of(model_from_text(text))
    for i, node in enumerate(n for g in ir.all_graphs(state.graph) for n in g.nodes):
        node.name = f"n{i}"
    return Rewriter(state)


def model_of(rewriter: Rewriter) -> onnx.ModelProto:
    rewriter.finish()
    verify(rewriter.state)
    return ir.to_proto(rewriter.state.graph)


def node_of(rewriter: Rewriter, op: str) -> Node:
    [node] = [n for n in rewriter.graph.nodes if n.op == op]
    return node


def drop_identity(rewriter: Rewriter, node: Node) -> Refusal | None:
    return None if rewriter.bypass(node) else Refusal("graph outputs stand in the way", node.outputs[0].name)


def test_a_new_node_takes_the_place_of_an_old_one() -> None:
    rewriter = rewriter_of("g (float[2] x) => (float[2] y) { t = Neg(x) y = Relu(t) }")
    relu = node_of(rewriter, "Relu")
    y = relu.outputs[0]
    zero = rewriter.constant("t", np.float32(0))
    new = rewriter.node("Max", [relu.inputs[0], zero], origin=relu)
    rewriter.take_output(new, y)
    model = model_of(rewriter)
    assert ops_of(model) == ["Neg", "Max"]
    assert model.graph.output[0].name == "y"
    assert zero.name == "t_1"
    assert new.name == "n1_1"
    assert rewriter.state.origin[new.name] == ("n1",)
    np.testing.assert_array_equal(run(model, {"x": np.float32([-1, 2])})[0], [1, 0])


def test_provenance_follows_chains_of_rewrites() -> None:
    rewriter = rewriter_of("g (float[2] x) => (float[2] y) { t = Neg(x) y = Relu(t) }")
    neg, relu = rewriter.graph.nodes
    first = rewriter.node("Abs", [neg.inputs[0]], origin=[relu, neg], hint="fused")
    second = rewriter.node("Abs", [neg.inputs[0]], origin=[first, neg])
    assert first.name == "fused"
    assert second.name == "fused_1"
    assert rewriter.state.origin[second.name] == ("n1", "n0")
    rewriter.adopt(neg, relu)
    assert rewriter.layers([neg]) == ("n0", "n1")


def test_fresh_names_know_subgraphs() -> None:
    rewriter = rewriter_of(IF_MODEL)
    assert rewriter.fresh_tensor_name("ie") == "ie_1"
    assert rewriter.fresh_tensor_name("ie") == "ie_2"
    assert rewriter.fresh_tensor_name("new") == "new"


def test_only_user_knows_graph_outputs_and_subgraphs() -> None:
    rewriter = rewriter_of(IF_MODEL)
    relu, neg = node_of(rewriter, "Relu"), node_of(rewriter, "Neg")
    assert rewriter.only_user(rewriter.graph.inputs[0]) is relu
    assert rewriter.only_user(relu.outputs[0]) is None
    assert rewriter.only_user(neg.outputs[0]) is None, "its one reader is in a branch"
    assert len(rewriter.users(relu.outputs[0])) == 3
    plain = rewriter_of("g (float[2] x) => (float[2] y, float[2] t) { t = Neg(x) y = Add(t, t) }")
    assert plain.only_user(plain.graph.nodes[0].outputs[0]) is None
    assert len(plain.users(plain.graph.nodes[0].outputs[0])) == 1


def test_replace_uses_reaches_into_branches() -> None:
    rewriter = rewriter_of(IF_MODEL)
    relu, neg = node_of(rewriter, "Relu"), node_of(rewriter, "Neg")
    rewriter.replace_uses(relu.outputs[0], neg.outputs[0], among=[n for n in relu.outputs[0].outputs if n is not neg])
    model = model_of(rewriter)
    for chosen, expected in ((True, np.exp([-1.0, 0])), (False, [-1.0, 0])):
        feeds = {"x": np.float32([1, -1]), "c": np.array(chosen)}
        np.testing.assert_allclose(run(model, feeds)[0], expected, rtol=1e-6)


def test_replace_uses_replaces_outputs_of_subgraphs() -> None:
    rewriter = rewriter_of(
        """g (float[2] x, bool c) => (float[2] y) {
            a = Relu(x)
            b = Neg(x)
            y = If (c) <then_branch = then_graph () => (float[2] a) { u = Abs(a) },
                        else_branch = else_graph () => (float[2] e) { e = Abs(b) }>
        }"""
    )
    a, b = node_of(rewriter, "Relu").outputs[0], node_of(rewriter, "Neg").outputs[0]
    then_graph = node_of(rewriter, "If").attrs["then_branch"]
    then_graph.outputs[0] = a
    rewriter.replace_uses(a, b)
    assert then_graph.outputs[0] is b


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("g (float[2] x) => (float[2] y) { t = Identity(x) y = Relu(t) }", ["Relu"]),
        ("g (float[2] x) => (float[2] y) { t = Relu(x) y = Identity(t) }", ["Relu"]),
        ("g (float[2] x) => (float[2] y, float[2] z) { t = Relu(x) y = Identity(t) z = Neg(t) }", ["Relu", "Neg"]),
        ("g (float[2] x) => (float[2] y, float[2] z) { y = Relu(x) z = Identity(y) }", ["Relu", "Identity"]),
        (
            "g (float[2] x) => (float[2] y, float[2] z) { t = Relu(x) y = Identity(t) z = Identity(t) }",
            ["Relu", "Identity"],
        ),
        ("g (float[2] x) => (float[2] y) { y = Identity(x) }", ["Identity"]),
        ("g (float[2] x) => (float[2] y) { t = Identity(x) u = Identity(t) v = Identity(u) y = Abs(v) }", ["Abs"]),
        ("g (float[4] x) => (float[2] y, float[2] b) { t, b = Split<axis = 0>(x) y = Identity(t) }", ["Split"]),
    ],
)
def test_bypass(text: str, left: list[str]) -> None:
    before = model_from_text(text)
    rewriter = rewriter_of(text)
    apply_rules(rewriter, {"Identity": drop_identity})
    after = model_of(rewriter)
    assert ops_of(after) == left
    assert_same_function(before, after)
    assert apply_rules(Rewriter(rewriter.state), {"Identity": drop_identity}) == 0


def test_bypass_of_what_a_branch_reads() -> None:
    text = IF_MODEL.replace("b = Neg(a)", "b = Identity(a)")
    rewriter = rewriter_of(text)
    assert apply_rules(rewriter, {"Identity": drop_identity}) == 1
    after = model_of(rewriter)
    assert ops_of(after) == ["Relu", "If"]
    for chosen in (True, False):
        feeds = {"x": np.float32([3, -1]), "c": np.array(chosen)}
        np.testing.assert_array_equal(run(after, feeds)[0], run(model_from_text(text), feeds)[0])


def test_rules_reach_a_fixed_point_and_keep_refusals() -> None:
    def halve(rewriter: Rewriter, node: Node) -> Refusal | None:
        count = int(ir.array(node.inputs[1]))
        if count % 2:
            return Refusal("odd", node.inputs[1].name)
        rewriter.set_input(node, 1, rewriter.constant("k", np.float32(count // 2)))
        return None

    state = state_of(model_from_text("g (float[1] x) => (float[1] y) { y = Mul(x, k) }", {"k": np.float32(12)}))
    state.graph.nodes[0].name = "n0"
    rewriter = Rewriter(state)
    assert apply_rules(rewriter, {"Mul": halve}) == 2
    assert rewriter.refusals == {"n0": Refusal("odd", "k_2")}


def test_rules_that_never_settle_are_named() -> None:
    rewriter = rewriter_of("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    with pytest.raises(RuntimeError, match="do not reach a fixed point in 100 rounds; the last to fire rewrote 'n0'"):
        apply_rules(rewriter, {"Relu": lambda rewriter, node: None})


def test_the_first_rule_that_fires_wins_for_a_node() -> None:
    fired: list[str] = []

    def refuse(rewriter: Rewriter, node: Node) -> Refusal | None:
        fired.append("refuse")
        return Refusal("no")

    def rename(rewriter: Rewriter, node: Node) -> Refusal | None:
        fired.append("rename")
        node.op = "Abs"
        return None

    rewriter = rewriter_of("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    assert apply_rules(rewriter, {"Relu": [refuse, rename, refuse]}) == 1
    assert fired == ["refuse", "rename"]


def test_rules_are_chosen_by_domain() -> None:
    rewriter = rewriter_of("g (float[2] x) => (float[2] y) { t = com.microsoft.Gelu(x) y = Relu(t) }")
    seen: list[str] = []

    def note(rewriter: Rewriter, node: Node) -> Refusal | None:
        seen.append(node.op)
        return Refusal("noted")

    apply_rules(rewriter, {"com.microsoft.Gelu": note, "Gelu": note})
    assert seen == ["Gelu"]


def test_the_limit_of_bisection_stops_between_rewrites() -> None:
    text = "g (float[2] x) => (float[2] y) { a = Identity(x) b = Identity(a) c = Identity(b) y = Neg(c) }"
    for limit in range(5):
        rewriter = rewriter_of(text)
        rewriter.state.rewrite_limit = limit
        assert apply_rules(rewriter, {"Identity": drop_identity}) == min(limit, 3)
        assert ops_of(model_of(rewriter)).count("Identity") == max(3 - limit, 0)


def long_chain(length: int) -> CompileState:
    body = "\n".join(f"t{i + 1} = Identity(t{i})" for i in range(length))
    text = f"g (float[1] t0) => (float[1] y) {{ {body} y = Abs(t{length}) }}"
    state = state_of(model_from_text(text))
    for i, node in enumerate(state.graph.nodes):
        node.name = f"n{i}"
    return state


def test_thousands_of_rewrites_take_linear_time() -> None:
    state = long_chain(4_000)
    start = time.perf_counter()
    assert apply_rules(Rewriter(state), {"Identity": drop_identity}) == 4_000
    assert time.perf_counter() - start < 2
    assert [n.op for n in state.graph.nodes] == ["Abs"]


def test_a_constant_with_thousands_of_readers_is_replaced_in_linear_time() -> None:
    body = "\n".join(f"t{i} = Add(x, k)" for i in range(3_000))
    model = model_from_text(f"g (float[1] x) => (float[1] t0) {{ {body} }}", {"k": np.float32([1])})
    state = state_of(model)
    for i, node in enumerate(state.graph.nodes):
        node.name = f"n{i}"
    rewriter = Rewriter(state)
    old = state.graph.nodes[0].inputs[1]
    start = time.perf_counter()
    rewriter.replace_uses(old, rewriter.constant("two", np.float32([2])))
    assert time.perf_counter() - start < 2
    assert len(old.outputs) == 0


def test_a_tensor_whose_values_change_loses_its_name() -> None:
    rewriter = rewriter_of("g (float[2] x) => (float[2] y) { a = Abs(x) y = Neg(a) }")
    tensor = node_of(rewriter, "Abs").outputs[0]
    rewriter.change_values(tensor, factor=[2, 3], offset=1)
    assert tensor.name == "a_scaled"
    rewriter.change_values(tensor, factor=10)
    [(name, found)] = rewriter.state.counterparts.items()
    assert (name, found.source) == (tensor.name, "a")
    assert found.factor.tolist() == [20, 30]
    assert found.offset.tolist() == [10, 10]


def test_an_array_over_another_shape_is_not_recorded() -> None:
    rewriter = rewriter_of("g (float[2,3] x) => (float[6] y) { a = Abs(x) b = Flatten(a) y = Neg(b) }")
    b = node_of(rewriter, "Flatten").outputs[0]
    rewriter.relate(b, "a", reshaped=True)
    assert rewriter.state.counterparts["b"].source == "a"
    rewriter.change_values(b, factor=np.arange(6))
    assert rewriter.state.counterparts == {}
    assert b.name == "b_scaled"
