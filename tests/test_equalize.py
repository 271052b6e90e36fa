"""equalize keeps the function, brings small channels up, and knows through which operators factors may pass."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from qcompiler_passes.equalize import Equalize
from qcompiler_passes.fold_scales import FoldScales
from qcompiler_passes.lower_integer import LowerInteger

from qcompiler import ir
from qcompiler.state import CompileState
from qcompiler.text import format_graph
from tests.forms import TO_QDQ, advance, compiled, graph_text, weights
from tests.nets import random_net
from tests.support import assert_same_function, random_feeds, run

HEAD = "g (float[1,8,8,8] x) => (float[1,8,h,w] y) {"
SPREAD = np.float32(2.0) ** np.linspace(0, -5, 8, dtype=np.float32)
"""How unlike the channels of the first layer are."""


def _uneven(*shape: int, seed: int = 0) -> np.ndarray:
    """Weights that make channels of very different size."""
    spread = np.resize(SPREAD, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return weights(*shape, seed=seed) * spread


def _even(*shape: int, seed: int = 1) -> np.ndarray:
    """Weights that give channels of different size an equal part in the result."""
    return weights(*shape, seed=seed) / np.resize(SPREAD, shape[1]).reshape(-1, *[1] * (len(shape) - 2))


def _net(body: str, opset: int = 17, **constants: np.ndarray) -> onnx.ModelProto:
    given = {"u": _uneven(8, 8, 1, 1), "v": _even(8, 8, 1, 1), "b": weights(8) * SPREAD, "c": weights(8)}
    used = {name: array for name, array in {**given, **constants}.items() if f"{name}," in body or f"{name})" in body}
    return graph_text(HEAD + body + "}", opset, **used)


def _equalized(model: onnx.ModelProto, alpha: float = 0.5) -> tuple[CompileState, int]:
    state = compiled(model)
    count = Equalize(alpha).run(state)
    advance(state)
    return state, count


def _spread(state: CompileState, tensor: str) -> float:
    """The largest reach of the channels of a tensor over the smallest."""
    feeds = random_feeds(ir.to_proto(state.graph), 7)
    copy = state.clone()
    copy.graph.outputs = [t for t in ir.tensors(copy.graph) if t.name == tensor]
    reach = np.abs(run(ir.to_proto(copy.graph), feeds)[0]).max(axis=(0, 2, 3))
    return float(reach.max() / reach.min())


IDENTITY = np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1)

PATTERNS = {
    "relu": "a = Conv(x, u, b) r = Relu(a) y = Conv(r, v, c)",
    "nothing": "a = Conv(x, u) y = Conv(a, v, c)",
    "leaky relu": "a = Conv(x, u, b) r = LeakyRelu(a) y = Conv(r, v)",
    "prelu": "a = Conv(x, u, b) r = PRelu(a, slope) y = Conv(r, v)",
    "max pool": "a = Conv(x, u, b) r = MaxPool<kernel_shape=[2,2]>(a) y = Conv(r, v)",
    "average pool": "a = Conv(x, u, b) r = AveragePool<kernel_shape=[2,2], pads=[1,1,1,1]>(a) y = Conv(r, v)",
    "global average": "a = Conv(x, u, b) r = GlobalAveragePool(a) y = Conv(r, v)",
    "two readers": "a = Conv(x, u, b) r = Relu(a) s = Conv(r, v) t = Conv(r, v) y = Add(s, t)",
    "residual": "a = Conv(x, u) d = Conv(a, v) e = Conv(d, u) f = Add(a, e) y = Conv(f, v)",
    "constant": "a = Conv(x, u) d = Add(a, plane) y = Conv(d, v)",
    "gate": "a = Conv(x, u) p = GlobalAveragePool(x) s = Sigmoid(p) d = Mul(a, s) y = Conv(d, v)",
    "concat": "a = Conv(x, u, b) d = Conv(x, u) e = Concat<axis=1>(a, d) y = Conv(e, vv)",
    "split": "a = Conv(x, u, b) d, e = Split<axis=1>(a) f = Concat<axis=-3>(e, d) y = Conv(f, v)",
    "slice": "a = Conv(x, u, b) d = Slice(a, four, eight, axis) y = Conv(d, half)",
    "depthwise": "a = Conv(x, u, b) r = Relu(a) d = Conv<group=8, pads=[1,1,1,1]>(r, dw, c) y = Conv(d, v)",
    "grouped": "a = Conv(x, u, b) d = Conv<group=2>(a, grouped, c) y = Conv(d, v)",
    "transposed": "a = ConvTranspose(x, tr, b) y = Conv(a, v)",
    "pad": "a = Conv(x, u, b) d = Pad(a, around) y = Conv(d, v)",
    "padded channels": "a = Conv(x, u, b) d = Pad(a, more) y = Conv(d, vv)",
    "resize": "a = Conv(x, u, b) d = Resize(a, , twice) y = Conv(d, v)",
    "shuffle": "a = Conv(x, u, b) d = Reshape(a, five) e = Transpose<perm=[0,2,1,3,4]>(d) f = Reshape(e, square) y = Conv(f, v)",
    "gather": "a = Conv(x, u, b) d = Gather<axis=1>(a, order) y = Conv(d, v)",
    "flatten": "a = Conv(x, u, b) f = Flatten(a) d = Gemm(f, dense, c) y = Reshape(d, square)",
}
CONSTANTS = {
    "slope": np.abs(weights(8, 1, 1)),
    "plane": weights(1, 8, 8, 8) * SPREAD.reshape(8, 1, 1),
    "vv": _even(8, 16, 1, 1),
    "half": _even(8, 4, 1, 1),
    "four": np.array([4]),
    "eight": np.array([8]),
    "axis": np.array([1]),
    "dw": weights(8, 1, 3, 3),
    "grouped": _even(8, 4, 1, 1),
    "tr": _uneven(8, 8, 2, 2).swapaxes(0, 1).copy(),
    "around": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "more": np.array([0, 4, 0, 0, 0, 4, 0, 0]),
    "twice": np.array([1, 1, 2, 2], np.float32),
    "five": np.array([1, 2, 4, 8, 8]),
    "square": np.array([1, 8, 8, 8]),
    "order": np.array([3, 1, 2, 0, 7, 5, 6, 4]),
    "dense": weights(8, 512).T.copy(),
}


def _pattern(name: str) -> onnx.ModelProto:
    constants = dict(CONSTANTS)
    if name == "flatten":
        constants["square"] = np.array([1, 8, 1, 1])
    return _net(PATTERNS[name], 17, **constants)


@pytest.mark.parametrize("name", PATTERNS)
def test_factors_pass_and_the_function_stays(name: str) -> None:
    model = _pattern(name)
    state, count = _equalized(model)
    assert count >= 1
    assert_same_function(model, ir.to_proto(state.graph))


@pytest.mark.parametrize("name", PATTERNS)
def test_a_second_run_changes_nothing(name: str) -> None:
    state, _ = _equalized(_pattern(name))
    before = format_graph(state.graph)
    assert Equalize().run(state) == 0
    assert format_graph(state.graph) == before


@pytest.mark.parametrize("opset", [13, 17, 18])
def test_brings_small_channels_up(opset: int) -> None:
    model = _net(PATTERNS["nothing"], opset)
    state, count = _equalized(model, alpha=1.0)
    assert count == 1
    (scaled,) = [name for name, counterpart in state.counterparts.items() if counterpart.source == "a"]
    assert _spread(compiled(model), "a") > 16
    assert _spread(state, scaled) < 4
    assert state.counterparts[scaled].factor.shape == (8, 1, 1)


def _wide(opset: int) -> onnx.ModelProto:
    """Maps of which only some rows are looked at."""
    head = "g (float[1,8,32,32] x) => (float[1,8,h,w] y) {"
    return graph_text(head + PATTERNS["nothing"] + "}", opset, u=_uneven(8, 8, 1, 1), v=_even(8, 8, 1, 1), c=weights(8))


@pytest.mark.parametrize("opset", [13, 17, 18])
def test_large_maps_are_observed_by_some_of_their_rows(opset: int) -> None:
    state, count = _equalized(_wide(opset), alpha=1.0)
    assert count == 1
    assert_same_function(_wide(opset), ir.to_proto(state.graph))


def test_quantization_loses_less() -> None:
    model = _net(PATTERNS["relu"])
    samples = [random_feeds(model, seed) for seed in range(4)]

    def error(state: CompileState) -> float:
        quantized = ir.to_proto(advance(state, *TO_QDQ, LowerInteger(), FoldScales()).graph)
        return sum(float(np.square(run(quantized, s)[0] - run(model, s)[0]).sum()) for s in samples)

    assert error(_equalized(model)[0]) < 0.75 * error(compiled(model))


REFUSED = {
    "HardSwish": "a = Conv(x, u) r = HardSwish(a) y = Conv(r, v)",
    "Sigmoid": "a = Conv(x, u) r = Sigmoid(a) y = Conv(r, v)",
    "Clip": "a = Conv(x, u) r = Clip(a, zero, six) y = Conv(r, v)",
    "Pad": "a = Conv(x, u) r = Pad(a, around, six) y = Conv(r, v)",
}


@pytest.mark.parametrize("op", REFUSED)
def test_says_what_stands_in_the_way(op: str) -> None:
    bounds = {"zero": np.zeros((), np.float32), "six": np.full((), 6, np.float32)}
    model = _net(REFUSED[op], 17, **CONSTANTS, **bounds)
    state, count = _equalized(model)
    assert count == 0
    assert state.refusals["Conv_a"].reason == f"{op} does not pass a factor on"
    assert state.refusals["Conv_a"].culprit == f"{op}_r"
    assert state.refusals["Conv_y"].reason == "the result is a graph output"
    assert_same_function(model, ir.to_proto(state.graph))


def test_a_reader_that_takes_no_factors_fixes_the_whole_residual_group() -> None:
    model = _net("a = Conv(x, u) d = Conv(x, v) e = Add(a, d) f = Sigmoid(d) h = Conv(e, v) y = Add(h, f)")
    assert _equalized(model)[1] == 0


@pytest.mark.parametrize(
    "body",
    [
        "n, m = Split<axis=1>(r, cut) t = Concat<axis=1>(m, n, m)",
        "n = Slice(r, zero, zero, one) t = Concat<axis=1>(n, r)",
    ],
)
def test_tensors_without_elements_have_no_channels(body: str) -> None:
    indices = {"cut": np.array([0, 8]), "zero": np.array([0]), "one": np.array([1])}
    wide = _even(8, 16 if "cut" in body else 8, 1, 1)
    model = _net(f"a = Conv(x, u, b) r = Relu(a) {body} y = Conv(t, wide)", 17, wide=wide, **indices)
    state, count = _equalized(model)
    assert count == 0
    assert_same_function(model, ir.to_proto(state.graph))


@pytest.mark.filterwarnings("error")
def test_ends_where_the_power_of_channels_overflows() -> None:
    sparse = _even(8, 8, 1, 1)
    sparse[2] = 0
    huge = _uneven(8, 8, 1, 1) * np.float32(1e25)
    assert _equalized(_net("a = Conv(x, u) r = Relu(a) y = Conv(r, v)", u=huge, v=sparse))[1] == 0


def test_leaves_even_channels_alone() -> None:
    even = weights(8, 8, 1, 1, seed=3)
    model = _net("s = Sigmoid(x) a = Conv(s, same) r = Relu(a) y = Conv(r, even)", same=IDENTITY, even=even)
    state, count = _equalized(model)
    assert count == 0
    assert "1.5 decibels" in state.refusals["Relu_r"].reason


def test_dead_channels_keep_their_weights() -> None:
    dead = _uneven(8, 8, 1, 1)
    dead[3] = 0
    state, count = _equalized(_net("a = Conv(x, u) r = Relu(a) y = Conv(r, v)", u=dead))
    assert count == 1
    first = next(n for n in state.graph.nodes if n.name == "Conv_a")
    assert not ir.array(first.inputs[1])[3].any()
    reader = next(n for n in state.graph.nodes if n.name == "Conv_y")
    np.testing.assert_array_equal(ir.array(reader.inputs[1])[:, 3], _even(8, 8, 1, 1)[:, 3])


def test_needs_samples_and_a_float_graph() -> None:
    state = compiled(_pattern("relu"))
    assert Equalize(samples=0).run(state) == 0
    state.calibration = None
    assert Equalize().run(state) == 0
    assert Equalize().run(compiled(_pattern("relu"), *TO_QDQ[:1])) == 0


def test_stops_at_the_limit_of_rewrites() -> None:
    model = _net(
        "a = Conv(x, u) r = Relu(a) d = Conv(r, uu) s = Relu(d) y = Conv(s, v)", uu=_uneven(8, 8, 1, 1, seed=4)
    )
    assert _equalized(model)[1] == 2
    state = compiled(model)
    state.rewrite_limit = 1
    assert Equalize().run(state) == 1
    assert_same_function(model, ir.to_proto(state.graph))


def test_is_deterministic() -> None:
    assert len({format_graph(_equalized(_pattern("residual"))[0].graph) for _ in range(2)}) == 1


@pytest.mark.parametrize("seed", range(12))
def test_random_nets_keep_their_function(seed: int) -> None:
    model = random_net(seed)
    state, count = _equalized(model, alpha=1.0)
    assert count >= 1
    assert_same_function(model, ir.to_proto(state.graph))
    assert Equalize(alpha=1.0).run(state) == 0
