"""form-blocks: an activation joins the operator before it, if nothing else reads what it reads."""

from __future__ import annotations

import math

import pytest
from qcompiler_passes.form_blocks import FormBlocks

from qcompiler.state import CompileState
from qcompiler.text import format_graph
from tests.forms import compiled, graph_text, weights


def blocks_of(body: str, outputs: str = "float[] y") -> CompileState:
    constants = {"w": weights(4, 4, 1, 1), "w2": weights(16, 4), "zero": 0.0, "one": 1.0, "six": 6.0, "four": [4, 4]}
    needed = {
        k: v for k, v in constants.items() if k in body.replace("(", " ").replace(",", " ").replace(")", " ").split()
    }
    return compiled(graph_text(f"g (float[1,4,2,2] x) => ({outputs}) {{ {body} }}", **needed), FormBlocks())


def absorbed(state: CompileState) -> list[str]:
    return [name for block in state.blocks.values() for name in block.nodes[1:]]


@pytest.mark.parametrize("root", ["Conv(x, w)", "Add(x, x)", "Mul(x, x)", "GlobalAveragePool(x)"])
def test_relu_is_absorbed(root: str) -> None:
    state = blocks_of(f"a = {root} y = Relu(a)")
    [block] = state.blocks.values()
    assert block.nodes[1:] == ("Relu_y",)
    assert block.outputs == ("y",)
    assert (block.low, block.high) == (0, math.inf)


def test_products_of_matrices_absorb_too() -> None:
    for root in ("Gemm(f, w2)", "MatMul(f, w2)"):
        assert absorbed(blocks_of(f"f = Flatten(x) a = {root} y = Relu(a)")) == ["Relu_y"]


@pytest.mark.parametrize(
    ("chain", "low", "high"),
    [
        ("y = Clip(a, zero, six)", 0, 6),
        ("y = Clip(a, , six)", -math.inf, 6),
        ("y = Clip(a, one)", 1, math.inf),
        ("y = Clip(a)", -math.inf, math.inf),
        ("r = Relu(a) y = Clip(r, , six)", 0, 6),
        ("c = Clip(a, zero, six) y = Clip(c, one, )", 1, 6),
        ("c = Clip(a, , zero) y = Clip(c, one, six)", 1, 1),
    ],
)
def test_bounds_of_a_chain_are_intersected(chain: str, low: float, high: float) -> None:
    [block] = blocks_of(f"a = Conv(x, w) {chain}").blocks.values()
    assert (block.low, block.high) == (low, high)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        pytest.param("a = Conv(x, w) y = Relu(a)", "float[] y, float[] a", id="also a graph output"),
        pytest.param("a = Conv(x, w) r = Relu(a) y = Add(a, r)", "float[] y", id="two readers"),
        pytest.param("y = Relu(x)", "float[] y", id="nothing before it"),
        pytest.param("a = Softmax(x) y = Relu(a)", "float[] y", id="behind a float operator"),
        pytest.param("a = Sigmoid(x) y = Add(a, x)", "float[] y", id="an addition of two tensors"),
        pytest.param("a = Conv(x, w) y = Clip(a, six, one)", "float[] y", id="empty range"),
        pytest.param("m = ReduceMax(x) a = Conv(x, w) y = Clip(a, zero, m)", "float[] y", id="variable bound"),
        pytest.param("a = Conv(x, w) y = LeakyRelu(a)", "float[] y", id="no saturation"),
    ],
)
def test_what_stands_alone(body: str, outputs: str) -> None:
    state = blocks_of(body, outputs)
    assert absorbed(state) == []
    assert list(state.blocks) == [n.name for n in state.graph.nodes]


@pytest.mark.parametrize(
    "body",
    [
        "a = Sigmoid(x) b = Tanh(a) y = Neg(b)",
        "a = HardSwish(x) b = Mul(a, six) y = Add(one, b)",
        "a = Elu(x) b = Relu(a) y = Clip(b, zero, six)",
    ],
)
def test_functions_in_a_row_are_one_block(body: str) -> None:
    state = blocks_of(body)
    (block,) = state.blocks.values()
    assert block.nodes == tuple(n.name for n in state.graph.nodes)
    assert (block.outputs, block.low, block.high) == (("y",), -math.inf, math.inf)


def test_the_graph_does_not_change_and_a_second_run_finds_nothing() -> None:
    state = blocks_of("a = Conv(x, w) y = Relu(a)")
    before = format_graph(state.graph)
    assert FormBlocks().run(state) == 0
    assert format_graph(state.graph) == before
    assert before.splitlines()[2] == "y = Relu(a)"


def test_the_limit_of_bisection_leaves_activations_alone() -> None:
    state = blocks_of("a = Conv(x, w) r = Relu(a) b = Conv(r, w) y = Relu(b)")
    state.blocks.clear()
    state.rewrite_limit = 1
    assert FormBlocks().run(state) == 1
    assert absorbed(state) == ["Relu_r"]


def test_without_fusion_each_node_is_a_block() -> None:
    text = graph_text("g (float[1,4,2,2] x) => (float[] y) { a = Conv(x, w) y = Relu(a) }", w=weights(4, 4, 1, 1))
    state = compiled(text, FormBlocks(fuse=False))
    assert [block.nodes for block in state.blocks.values()] == [("Conv_a",), ("Relu_y",)]
