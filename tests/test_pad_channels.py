"""Channels are added where kernels want them; the function stays the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from qcompiler_passes.pad_channels import PadChannels

from qcompiler.target import Alignment
from tests.support import TEST_TARGET, assert_same_function, model_from_text, ops_of, run_passes

RNG = np.random.default_rng(2)
ALIGNED = replace(TEST_TARGET, alignment=Alignment(inputs=4, outputs=4, least=16, depthwise=16))
NARROW = {
    "w0": (24, 4, 1, 1),
    "w1": (8, 24, 1, 1),
    "d": (24, 1, 3, 3),
    "b": (24,),
    "s0": (6, 24, 1, 1),
    "s1": (24, 6, 1, 1),
    "channels": (24, 1, 1),
    "rows": (1, 1, 12, 1),
    "one": (),
}
ODD = {"w0": (18, 4, 1, 1), "w1": (8, 18, 1, 1), "w2": (18, 18, 3, 3), "b": (18,)}


def net(body: str, shapes: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    """Nodes from the image x, float[1,4,12,12], to y, with random constants of the shapes."""
    words = body.replace("(", " ").replace(",", " ").replace(")", " ").split()
    arrays = {name: np.asarray(RNG.standard_normal(s), np.float32) for name, s in shapes.items() if name in words}
    model = model_from_text(f"g (float[1,4,12,12] x) => (float[1,?,?,?] y) {{ {body} }}", arrays)
    return onnx.shape_inference.infer_shapes(model)


def padded(body: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the constants after the pass, which keeps the function, the operators and the outputs."""
    model = net(body, shapes)
    after, state = run_passes(model, PadChannels(), target=ALIGNED)
    assert_same_function(model, after)
    assert ops_of(after) == ops_of(model)
    assert PadChannels().run(state) == 0
    arrays = {i.name: tuple(i.dims) for i in after.graph.initializer}
    return {
        old: arrays[new]
        for a, b in zip(model.graph.node, after.graph.node, strict=True)
        for old, new in zip(a.input, b.input, strict=True)
        if new in arrays
    }


def dims(model: onnx.ModelProto) -> dict[str, list[int]]:
    return {i.name: list(i.dims) for i in model.graph.initializer}


DEPTHWISE = "c = Conv<pads=[1,1,1,1], group=24>({}, d, b)"


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        ("", "y = Conv(c, w1)"),
        ("r = Relu(a)", "s = HardSwish(c) y = Conv(s, w1)"),
        ("r = Add(a, channels)", "s = Mul(c, rows) t = Mul(one, s) y = Conv(t, w1)"),
        ("", "s = Add(c, a) y = Conv(s, w1)"),
        ("", "s = Sigmoid(c) p = GlobalAveragePool(s) t = Mul(s, p) y = Conv(t, w1)"),
        ("", "p = GlobalAveragePool(c) q = Conv(p, s0) u = Conv(q, s1) t = Mul(c, u) y = Conv(t, w1)"),
        ("", "s = Conv(c, w1) t = Conv(c, w1) y = Add(s, t)"),
    ],
)
def test_what_is_around_a_depthwise_conv(before: str, behind: str) -> None:
    shapes = padded(f"a = Conv(x, w0, b) {before} {DEPTHWISE.format('r' if before else 'a')} {behind}", NARROW)
    wanted = {"w0": (32, 4, 1, 1), "d": (32, 1, 3, 3), "b": (32,), "w1": (8, 32, 1, 1), "s0": (6, 32, 1, 1)}
    wanted |= {"s1": (32, 6, 1, 1), "channels": (32, 1, 1), "rows": (1, 1, 12, 1), "one": ()}
    assert shapes == {name: wanted[name] for name in shapes}


@pytest.mark.parametrize(
    ("behind", "reason"),
    [
        ("y = Identity(c)", "Identity cannot be padded"),
        ("s = Conv(c, w1) t = Softmax<axis=1>(c) u = Conv(t, w1) y = Add(s, u)", "Softmax cannot be padded"),
        ("y = Relu(c)", "an input, an output or a subgraph has these channels"),
        ("s = Concat<axis=1>(c, a) y = Relu(s)", "Concat cannot be padded"),
        ("k = Abs(w1) y = Conv(c, k)", "Conv cannot be padded"),
        ("m = ReduceMax<axes=[1]>(c) t = Mul(c, m) y = Conv(t, w1)", "Mul cannot be padded"),
    ],
)
def test_obstacles(behind: str, reason: str) -> None:
    model = net(f"a = Conv(x, w0, b) {DEPTHWISE.format('a')} {behind}", NARROW)
    after, state = run_passes(model, PadChannels(), target=ALIGNED)
    assert dims(after) == dims(model)
    assert reason in {r.reason for r in state.refusals.values()}


def test_dense_convs_get_channels_that_kernels_take() -> None:
    shapes = padded("a = Conv(x, w0, b) r = Relu(a) c = Conv<pads=[1,1,1,1]>(r, w2, b) y = Conv(c, w1)", ODD)
    assert shapes["w0"] == (20, 4, 1, 1)
    assert shapes["w2"] == (20, 20, 3, 3)
    assert shapes["w1"] == (8, 20, 1, 1)


@pytest.mark.parametrize(
    "body",
    [
        "a = Conv(x, w0) p = GlobalAveragePool(a) y = Conv(p, w1)",
        "p = GlobalAveragePool(x) a = Conv(p, w0, b) y = Conv(a, w1)",
        f"a = Conv(x, w0, b) {DEPTHWISE.format('a')} m = MaxPool<kernel_shape=[1,1]>(a) "
        "n = MaxPool<kernel_shape=[1,1]>(m) o = MaxPool<kernel_shape=[1,1]>(n) s = Add(c, o) y = Conv(s, w1)",
    ],
    ids=["aligned", "single pixels", "pooling costs more than the Conv saves"],
)
def test_what_does_not_pay_stays(body: str) -> None:
    sizes = {**NARROW, "w0": (18, 4, 1, 1), "b": (18,), "w1": (8, 18, 1, 1)} if body.startswith("p") else NARROW
    model = net(body, sizes)
    after, _ = run_passes(model, PadChannels(), target=ALIGNED)
    assert dims(after) == dims(model)


def test_added_channels_hold_values_that_were_there() -> None:
    """So that no range grows: here the values of Exp(x) would be 1 for channels of zeros."""
    model = net(f"a = Conv(x, w0, b) e = Exp(a) {DEPTHWISE.format('e')} y = Conv(c, w1)", NARROW)
    after, _ = run_passes(model, PadChannels(), target=ALIGNED)
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in after.graph.initializer}
    first, *_, last = [n for n in after.graph.node if n.op_type == "Conv"]
    np.testing.assert_array_equal(arrays[first.input[1]][24:], arrays[first.input[1]][:8])
    assert not arrays[last.input[1]][:, 24:].any()


def test_targets_without_alignment_keep_their_channels() -> None:
    model = net("a = Conv(x, w0, b) r = Relu(a) y = Conv(r, w1)", ODD)
    assert dims(run_passes(model, PadChannels())[0]) == dims(model)
