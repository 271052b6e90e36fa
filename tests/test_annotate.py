"""annotate: integer or float, with the reason; which tensors get a spec; which share their params."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from qcompiler_passes.annotate import Annotate
from qcompiler_passes.form_blocks import FormBlocks
from qcompiler_passes.targets import INTEGER, ORT_CPU

from qcompiler import ir
from qcompiler.state import CompileState
from qcompiler.target import Target
from tests.forms import compiled, graph_text, weights

CONSTANTS = {
    "w": weights(4, 4, 1, 1),
    "w2": weights(16, 4),
    "w3": weights(2, 16, 4),
    "inf": np.float32(np.inf),
    "half": 0.5,
    "pads": [0, 0, 1, 1, 0, 0, 1, 1],
    "scales": np.float32([1, 1, 2, 2]),
    "matrix": weights(1, 4),
    "rows": weights(3, 4),
    "rows22": weights(2, 2),
    "flat": [1, 16],
    "three": [3, 16],
    "much": [64, 1, 16, 4],
    "long": [1, 65536],
    "ones": np.ones((65536, 1), np.float32),
}


def annotated(
    body: str, outputs: str = "float[] y", target: Target = ORT_CPU, keep: Sequence[str] = (), shape: str = "1,4,2,2"
) -> CompileState:
    words = body.replace("(", " ").replace(",", " ").replace(")", " ").split()
    needed = {k: v for k, v in CONSTANTS.items() if k in words}
    model = graph_text(f"g (float[{shape}] x) => ({outputs}) {{ {body} }}", **needed)
    return compiled(model, FormBlocks(), Annotate(), target=target, keep_float=keep)


def reasons(state: CompileState) -> dict[str, str]:
    return {root: block.reason for root, block in state.blocks.items() if not block.quantized}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("v = Abs(x) y = MatMul(v, x)", "both factors are activations"),
        (
            "f = Reshape(x, flat) e = Unsqueeze(f, one) y = MatMul(e, w3)",
            "the weight has 3 dimensions; integer kernels take 2",
        ),
        ("v = Shape(x) s = ConstantOfShape(v) y = Conv(x, s)", "the weight is not a constant"),
        ("f = Flatten(x) y = Gemm<alpha=0.5>(f, w2)", "alpha, beta, transA or transB are not folded away"),
        ("f = Flatten(x) y = Gemm<transA=1>(f, matrix)", "alpha, beta, transA or transB are not folded away"),
        ("f = Tile(x, much) g = Reshape(f, long) y = MatMul(g, ones)", "its sums of 65536 products may overflow int32"),
        ("c = Conv(x, w) y = Softmax(c)", "its uint8 kernel is slower than float, or there is none"),
        ("c = Conv(x, w) y = Sigmoid(c)", "nothing quantized reads its result"),
        ("s = Sigmoid(x) y = Conv(s, w)", "its input 'x' is a float tensor"),
        ("c = Conv(x, w) p = Pad(c, pads, inf) y = Conv(p, w)", "the padding value is not a finite constant"),
        ('c = Conv(x, w) p = Resize<mode="linear">(c, , scales) y = Conv(p, w)', "Resize mode linear interpolates"),
        ("c = Conv(x, w) p = CumSum(c, axis) y = Conv(p, w)", "CumSum has no row in the operator table"),
        ("c = Conv(x, w) p = GlobalMaxPool(c) y = Conv(p, w)", "GlobalMaxPool has no integer kernel on ort-cpu"),
        (
            "c = Conv(x, w) p = LayerNormalization(c, two) y = Conv(p, w)",
            "LayerNormalization has no integer kernel on ort-cpu",
        ),
        ("c = Conv(x, w) p = Add(c, inf) y = Conv(p, w)", "constant 'inf' is not finite"),
        ("a = Add(half, half) p = Mul(a, x) y = Conv(p, w)", "none of its inputs is an activation"),
    ],
)
def test_each_refusal_names_its_reason(body: str, reason: str) -> None:
    extra = {"one": [1], "axis": np.int64(1), "two": np.ones(2, np.float32)}
    CONSTANTS.update(extra)
    assert reason in reasons(annotated(body)).values()


def test_integer_arithmetic_of_the_model_stays_as_it_is() -> None:
    state = annotated("i = Cast<to=6>(x) j = Mul(i, i) f = Cast<to=1>(j) y = Conv(f, w)")
    assert reasons(state)["Mul_j"] == "it computes in int32"


def test_a_dynamic_bias_or_bound_stays_float() -> None:
    state = annotated("m = ReduceMax<keepdims=0>(x) c = Conv(x, w) s = Concat<axis=1>(c, c) k = Clip(s, m) y = Tanh(k)")
    assert reasons(state)["Clip_k"] == "the bounds are not constants"


def test_maxpool_with_indices_stays_float() -> None:
    state = annotated("c = Conv(x, w) p, i = MaxPool<kernel_shape=[1,1]>(c) y = Conv(p, w)", "float[] y, int64[] i")
    assert reasons(state) == {"MaxPool_p": "the indices output is used"}


def test_a_mean_needs_a_static_size() -> None:
    state = annotated("c = Conv(x, w) p = GlobalAveragePool(c) y = Conv(p, w)", shape="1,4,H,2")
    assert reasons(state) == {"GlobalAveragePool_p": "the spatial size is not static"}


@pytest.mark.parametrize("pattern", ["Conv_c", "Conv_?", "c", "r", "Relu*"])
def test_keep_float_knows_node_and_output_names(pattern: str) -> None:
    state = annotated("c = Conv(x, w) r = Relu(c) d = Conv(r, w) y = Tanh(d)", keep=[pattern])
    assert reasons(state)["Conv_c"] == f"kept in float as {pattern!r} asks"


def test_isolation_spreads_until_it_settles() -> None:
    """A chain of movers and adds between a float operator and a Conv is float as far as float values reach."""
    state = annotated("s = Sigmoid(x) t = Tanh(s) u = Add(t, t) y = Conv(u, w)")
    assert list(reasons(state)) == ["Sigmoid_s", "Add_u"]
    state = annotated("c = Conv(x, w) s = Sigmoid(c) t = Add(s, s) y = Abs(t)")
    assert list(reasons(state)) == ["Sigmoid_s", "Add_t", "Abs_y"]


def test_a_mover_may_read_the_graph_input() -> None:
    state = annotated("p = Pad(x, pads) y = Conv(p, w)")
    assert reasons(state) == {}
    assert state.leader("p") == "x"


def test_movers_and_clips_share_params_with_their_input() -> None:
    state = annotated(
        "c = Conv(x, w) t = Transpose<perm=[0,1,3,2]>(c) u = Split<axis=1>(t) k = Clip(u, , half) q = Add(c, k) y = Conv(q, w)"
    )
    assert {name: state.leader(name) for name in ("t", "u", "k")} == {"t": "c", "u": "c", "k": "c"}
    assert "q" not in state.ties


def test_specs_of_a_block() -> None:
    state = annotated("c = Conv(x, w) r = Relu(c) a = Add(r, half) y = Conv(a, w)")
    assert list(state.specs) == ["x", "r", "half", "a", "y"]
    assert set(state.specs.values()) == {ORT_CPU.activation}


def test_gemm_has_a_float_result_unless_integers_read_it() -> None:
    body = "f = Reshape(x, flat) g = MatMul(f, w2) h = MatMul(g, matrix4) y = Softmax(h)"
    CONSTANTS["matrix4"] = weights(4, 4)
    assert "h" not in annotated(body).specs
    assert "g" in annotated(body).specs
    assert "h" in annotated(body, target=INTEGER).specs


def test_no_table_behind_a_float_result() -> None:
    body = "f = Reshape(x, flat) g = MatMul(f, w2) t = Tanh(g) y = MatMul(t, matrix4)"
    CONSTANTS["matrix4"] = weights(4, 4)
    assert reasons(annotated(body)) == {"Tanh_t": "its input 'g' is a float tensor"}
    assert reasons(annotated(body, target=INTEGER)) == {}


def test_shared_constants_become_one_per_reader() -> None:
    state = annotated("c = Conv(x, w) d = Conv(c, w) a = Add(d, half) b = Mul(a, half) y = Conv(b, w)")
    names = [t.name for n in state.graph.nodes for t in n.inputs if ir.is_constant(t)]
    assert len(names) == len(set(names)) == 5


def test_indices_are_not_activations() -> None:
    CONSTANTS["order"] = [1, 0, 3, 2]
    state = annotated("c = Conv(x, w) g = Gather<axis=1>(c, order) y = Conv(g, w)")
    assert "order" not in state.specs


def test_a_target_without_an_add_keeps_it_float() -> None:
    target = replace(ORT_CPU, stays_float={"Add": "too slow"})
    assert reasons(annotated("c = Conv(x, w) a = Add(c, c) y = Conv(a, w)", target=target)) == {"Add_a": "too slow"}


def test_a_second_run_returns_zero() -> None:
    state = annotated("c = Conv(x, w) y = Conv(c, w)")
    assert Annotate().run(state) == 0


@pytest.mark.parametrize(
    ("readers", "bounds"),
    [
        ("t = HardSwish(c) y = Conv(t, w)", (-3, math.inf)),
        ("t = HardSigmoid<alpha=0.25, beta=0.5>(c) y = Conv(t, w)", (-2, 2)),
        ("t = HardSigmoid<alpha=0.25>(c) u = HardSwish(c) s = Add(t, u) y = Conv(s, w)", (-3, math.inf)),
        ("t = HardSwish(c) s = Add(c, t) y = Conv(s, w)", (-math.inf, math.inf)),
        ("t = Abs(c) y = Conv(t, w)", (-math.inf, math.inf)),
        ("p = Transpose<perm=[0,1,3,2]>(c) t = HardSwish(p) y = Conv(t, w)", (-math.inf, math.inf)),
    ],
)
def test_bounds_are_those_beyond_which_all_readers_saturate(readers: str, bounds: tuple[float, float]) -> None:
    block = annotated(f"c = Conv(x, w) {readers}").blocks["Conv_c"]
    assert (block.low, block.high) == bounds


def test_a_graph_output_has_no_bounds() -> None:
    state = annotated("c = Conv(x, w) t = HardSwish(c) y = Conv(t, w)", "float[] y, float[] c")
    assert (state.blocks["Conv_c"].low, state.blocks["Conv_c"].high) == (-math.inf, math.inf)


ROTATED = "c = Cos(rows22) a = Conv(x, w) m = Mul(a, c) b = Conv(m, w) n = Mul(b, c) y = Conv(n, w)"


def test_what_depends_on_no_layer_is_quantized_for_each_of_its_readers() -> None:
    state = annotated(ROTATED, target=INTEGER)
    muls = [n for n in state.graph.nodes if n.op == "Mul"]
    assert all(state.blocks[n.name].quantized for n in muls)
    copies = [n.inputs[1].name for n in muls]
    assert len(set(copies)) == 2
    assert all(name in state.specs for name in copies)
    assert "c" not in state.specs
    makers = [ir.producer(n.inputs[1]) for n in muls]
    assert [m.op for m in makers if m is not None] == ["Identity", "Identity"]


def test_targets_with_kernels_quantize_no_tensor_for_its_readers_sake() -> None:
    state = annotated(ROTATED)
    assert [state.blocks[n.name].reason for n in state.graph.nodes if n.op == "Mul"] == [
        "its input 'c' is a float tensor"
    ] * 2
