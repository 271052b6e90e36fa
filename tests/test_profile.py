from __future__ import annotations

import numpy as np
import onnx

from qcompiler.compile import compile_model
from qcompiler.profile import profile
from tests.support import model_from_text, random_feeds

CONVS = """
g (float[1,16,32,32] x) => (float[1,16,32,32] y) {
    a = Conv<pads=[1,1,1,1]>(x, w)
    b = Relu(a)
    c = Conv<pads=[1,1,1,1]>(b, w)
    y = Sigmoid(c)
}
"""


def convs() -> onnx.ModelProto:
    return model_from_text(
        CONVS, {"w": np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float32) / 9}
    )


def test_time_goes_to_the_nodes_that_onnxruntime_fused_and_renamed() -> None:
    model = convs()
    (result,) = profile([model], random_feeds(model), 0.05)
    assert any(result.nodes.get(i, 0) > 0 for i in (0, 1))
    assert any(result.nodes.get(i, 0) > 0 for i in (2, 3))
    assert sum(result.nodes.values()) > result.layout
    assert result.total == sum(result.nodes.values()) + result.layout


def test_a_heavy_node_takes_most_of_the_time() -> None:
    text = "g (float[1,300] x) => (float[1,300] y) { a = Neg(x)  b = MatMul(a, w)  c = MatMul(b, w)  y = Neg(c) }"
    model = model_from_text(text, {"w": np.ones((300, 300), np.float32)})
    (result,) = profile([model], random_feeds(model), 0.05)
    assert list(result.nodes) == [0, 1, 2, 3]
    assert result.nodes[1] + result.nodes[2] > result.nodes[0] + result.nodes[3]


def test_models_are_profiled_side_by_side_and_stay_as_they_are() -> None:
    models = [convs(), convs()]
    before = [m.SerializeToString() for m in models]
    assert len(profile(models, random_feeds(models[0]), 0.05)) == 2
    assert [m.SerializeToString() for m in models] == before


def test_time_inside_a_function_goes_to_its_call() -> None:
    model = convs()
    samples = [random_feeds(model, seed) for seed in range(4)]
    compiled = compile_model(model, samples, emit="integer", compare=False).model
    (result,) = profile([compiled], samples[0], 0.05)
    calls = [i for i, n in enumerate(compiled.graph.node) if n.op_type == "Requantize"]
    assert calls
    assert all(result.nodes.get(i, 0) > 0 for i in calls)


def test_time_inside_a_branch_counts_once() -> None:
    text = """
    g (float[64,64] x, bool c) => (float[64,64] y) {
        h = Neg(x)
        y = If(c) <then_branch = t () => (float[64,64] p) { p = MatMul(h, h) },
                   else_branch = e () => (float[64,64] q) { q = Identity(h) }>
    }
    """
    model = model_from_text(text)
    (result,) = profile([model], {"x": np.ones((64, 64), np.float32), "c": np.array(True)}, 0.05)
    assert list(result.nodes) == [0, 1]
    assert result.layout == 0
