"""Every tensor of a rewritten float model is what its name and shape, or `counterparts`, say that it is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest

from qcompiler import ir
from qcompiler.job import prepare
from qcompiler.plan import CompileOptions
from qcompiler.state import CompileState, Counterpart
from tests.nets import random_net
from tests.support import model_from_text, random_feeds, run

RNG = np.random.default_rng(5)
IMAGE = "float[1,3,6,6]"


def values(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What every node writes."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for n in model.graph.node for name in n.output if name)
    return dict(zip((o.name for o in copy.graph.output), run(copy, feeds), strict=True))


def optimized(model: onnx.ModelProto, stop: str = "form-blocks") -> CompileState:
    job = prepare(model, [random_feeds(model)], CompileOptions(until=stop))
    job.pipeline.run(job.state)
    return job.state


def check(model: onnx.ModelProto, state: CompileState) -> None:
    feeds = random_feeds(model, 3)
    before, after = values(model, feeds), values(ir.to_proto(state.graph), feeds)
    checked = 0
    for name, found in after.items():
        source, factor, offset, reshaped = state.counterparts.get(name, Counterpart(name, np.ones(()), np.zeros(())))
        if source in before and before[source].dtype == np.float32:
            wanted = before[source] * factor + offset
            wanted = wanted.reshape(found.shape) if reshaped else wanted
            if wanted.shape != found.shape:  # passes that fit shapes to kernels; compare sees that, too
                continue
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * max(1, np.abs(wanted).max()), err_msg=name)
            checked += 1
    assert checked > 1


@pytest.mark.parametrize("seed", range(8))
def test_random_nets(seed: int) -> None:
    model = random_net(seed)
    check(model, optimized(model))


def attention(step: str) -> onnx.ModelProto:
    text = f"""g (float[2,5,6] x) => (float[2,2,5,5] y) {{
        p = MatMul(x, w)
        s = Add(p, row)
        r = Reshape(s, heads)
        t = Transpose<perm=[0,2,1,3]>(r)
        k = {step}
        u = Transpose<perm=[0,1,3,2]>(k)
        y = MatMul(k, u)
    }}"""
    arrays = {"w": RNG.standard_normal((6, 6)), "row": RNG.standard_normal(6), "half": np.array([[0.5]])}
    floats = {name: array.astype(np.float32) for name, array in arrays.items()}
    return model_from_text(text, {**floats, "heads": np.array([2, 5, 2, 3])})


@pytest.mark.parametrize(
    ("step", "factor", "offset"), [("Div(t, half)", 2, 0), ("Add(half, t)", 1, 0.5), ("Sub(half, t)", -1, 0.5)]
)
def test_a_number_that_moves_before_movers(step: str, factor: float, offset: float) -> None:
    model = attention(step)
    state = optimized(model)
    check(model, state)
    by_source = {c.source: c for c in state.counterparts.values()}
    assert (by_source["r"].factor, by_source["r"].offset) == (factor, offset)
    assert by_source["x"].factor == 1  # the rows of a Gemm
    assert not {"r", "s"} & {t.name for t in ir.tensors(state.graph)}


def test_a_scale_that_moves_behind_a_shift() -> None:
    text = f"""g ({IMAGE} x) => (float[1,2,6,6] y) {{
        t = Tanh(x)
        a = Mul(t, scale)
        b = Add(a, shift)
        y = Conv<pads=[1,1,1,1]>(b, v)
    }}"""
    arrays = {"scale": [2, 3, 4], "shift": [1, 2, 3]}
    weights = {k: np.reshape(np.float32(v), (3, 1, 1)) for k, v in arrays.items()}
    model = model_from_text(text, {**weights, "v": RNG.standard_normal((2, 3, 3, 3)).astype(np.float32)})
    state = optimized(onnx.shape_inference.infer_shapes(model))
    check(model, state)
    [found] = state.counterparts.values()
    assert found.source == "b"
    assert np.ravel(found.factor) == pytest.approx([1 / 2, 1 / 3, 1 / 4])


@pytest.mark.parametrize("between", ["Relu(c)", "MaxPool<kernel_shape=[2,2]>(c)"])
def test_scales_that_move_before_an_activation(between: str) -> None:
    text = f"""g ({IMAGE} x) => (float[1,n,h,v] y) {{
        c = Conv(x, w)
        r = {between}
        b = BatchNormalization(r, s, t, m, q)
        y = Conv<pads=[1,1,1,1]>(b, v)
    }}"""
    weights = {"w": RNG.standard_normal((4, 3, 1, 1)), "v": RNG.standard_normal((2, 4, 3, 3))}
    stats = {"s": [0.5, 2, -3, 0], "t": [1, 2, 3, 4], "m": [0, 1, 0, 1], "q": [1, 2, 3, 4]}
    model = model_from_text(text, {k: np.asarray(v, np.float32) for k, v in (weights | stats).items()})
    state = optimized(onnx.shape_inference.infer_shapes(model))
    check(model, state)
    factor = np.ravel({c.source: c for c in state.counterparts.values()}["c"].factor)
    assert factor == pytest.approx([0.5, 2 / np.sqrt(2), 1, 1], rel=1e-4)
