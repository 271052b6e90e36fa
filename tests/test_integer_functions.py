"""Means and PRelu: the reference on plain integers, the functions, and all forms give the same bits."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from qcompiler_passes.targets import INTEGER

from qcompiler import functions, integer_functions, quant
from qcompiler.quant import QuantParams, QuantSpec
from qcompiler.runtime import run, session
from tests.forms import Forms, all_forms, assert_bit_identical, graph_text, ops_between, weights
from tests.support import model_from_text, random_feeds

UINT8 = QuantSpec("uint8", 0, 255)


def params(scale: float, zero_point: int) -> QuantParams:
    return QuantParams(UINT8, np.asarray(scale, np.float32), zero_point)


def call(text: str, inputs: dict[str, np.ndarray], function: str) -> tuple[np.ndarray, np.ndarray]:
    """The result of a model that calls a function, in ONNX Runtime and in the reference evaluator."""
    model = model_from_text(text, {})
    model.opset_import.append(onnx.helper.make_opsetid(functions.DOMAIN, 1))
    model.functions.append(functions.proto(function))
    [got], [wanted] = run(session(model), inputs), ReferenceEvaluator(model).run(None, inputs)
    return got, np.asarray(wanted)


@pytest.mark.parametrize("bits", [0, 1, 3, integer_functions.MOST_HALVINGS])
def test_division_rounds_as_fractions_do(bits: int) -> None:
    rng = np.random.default_rng(bits)
    n = rng.integers(1, 4000, 3000)
    acc = np.concatenate([rng.integers(-255 * n, 255 * n + 1), np.arange(-300, 300)]).astype(np.int32)
    for size in (1, 2, 6, 49, 4095):
        text = """g (int32[N] acc, int64 n, int64 factor, uint8 z, uint8 low, uint8 high) => (uint8[N] y) {
            y = qcompiler.Divide(acc, n, factor, z, low, high) }"""
        acc_in = np.clip(acc, -255 * size, 255 * size).astype(np.int32)
        feeds: dict[str, Any] = {"acc": acc_in, "n": np.int64(size), "factor": np.int64(2**bits)}
        feeds |= {"z": np.uint8(128), "low": np.uint8(3), "high": np.uint8(251)}
        got, reference = call(text, {k: np.asarray(v) for k, v in feeds.items()}, "Divide")
        exact = [min(max(round(Fraction(int(a) * 2**bits, size)) + 128, 3), 251) for a in acc_in]
        np.testing.assert_array_equal(got, exact)
        np.testing.assert_array_equal(reference, exact)


def test_slopes_function() -> None:
    q = np.arange(256, dtype=np.uint8).reshape(1, 2, 128)
    feeds = {"q": q, "z": np.uint8(100), "above": np.int32(4095), "below": np.array([[-7], [4096]], np.int32)}
    text = """g (uint8[1,2,128] q, uint8 z, int32 above, int32[2,1] below) => (int32[1,2,128] y) {
        y = qcompiler.Slopes(q, z, above, below) }"""
    got, reference = call(text, {k: np.asarray(v) for k, v in feeds.items()}, "Slopes")
    k = q.astype(np.int64) - 100
    np.testing.assert_array_equal(got, np.where(k > 0, k * 4095, k * feeds["below"]))
    np.testing.assert_array_equal(reference, got)


def test_factors_without_ties_are_near_and_have_none() -> None:
    wanted = np.concatenate(
        [np.arange(-5000.0, 5000.0), np.random.default_rng(0).uniform(-9000, 9000, 2000), [2.0**16, 3 * 2**14]]
    )
    m = integer_functions.without_ties(wanted)
    assert np.abs(m - wanted).max() <= 1
    products = np.arange(-255, 256)[:, None] * m
    assert not np.any(products % 4096 == 2048)


@pytest.mark.parametrize("seed", range(6))
def test_prelu_in_float32_gives_the_integers_of_the_reference(seed: int) -> None:
    """All 256 integers, slopes of any sign and size, scales that are snapped as align-scales does."""
    rng = np.random.default_rng(seed)
    slope = np.concatenate([rng.normal(0, 0.5, 60), [0, 1, -1, 0.25, 0.5, 2]]).astype(np.float32).reshape(-1, 1)
    p_y = params(10 ** rng.uniform(-4, 1), int(rng.integers(1, 120)) * 2)
    ratio = integer_functions.snap_slope(10 ** rng.uniform(-0.7, 0.7), 1.0)
    p_x = params(float(np.float32(ratio * float(p_y.scale))), int(rng.integers(1, 120)) * 2)
    q = np.broadcast_to(np.arange(256, dtype=np.uint8), (len(slope), 256))
    x = quant.dequantize(q, p_x)
    rounded = integer_functions.rounded_slope(slope, float(p_x.scale), float(p_y.scale))
    assert np.abs((rounded - slope) * ratio).max() <= 2**-12 * 1.01
    y = quant.quantize(np.where(x > 0, x, x * rounded).astype(np.float32), p_y)
    np.testing.assert_array_equal(y, integer_functions.prelu(q, rounded, p_x, p_y))


def test_scales_of_means() -> None:
    assert integer_functions.halved(0.8, 0.11) == np.float32(0.2)
    assert integer_functions.doubled(0.11, 0.8) == np.float32(0.11) * 8
    assert integer_functions.halvings(0.75, 0.1875) == 2
    assert integer_functions.halvings(0.75, 0.75) == 0
    assert integer_functions.halvings(0.75, 0.19) is None
    assert integer_functions.halvings(0.75, 1.5) is None


MIDDLES = {
    "PRelu": "m = PRelu(a, slopes)",
    "ReduceMean over space": "m = ReduceMean<keepdims=1>(a, space)",
    "ReduceMean over channels": "c = ReduceMean<keepdims=1>(a, channels) m = Mul(a, c)",
    "ReduceMean, fewer axes": "r = ReduceMean<keepdims=0>(a, space) m = Unsqueeze(r, space)",
    "ReduceMax": "c = ReduceMax<keepdims=1>(a, channels) m = Mul(a, c)",
    "Pad with a value": "m = Pad(a, pads, value)",
    "squeeze and excitation": "p = ReduceMean<keepdims=1>(a, space) e = Conv(p, w_e) s = HardSigmoid(e) m = Mul(a, s)",
}


def compiled(name: str, size: str = "8") -> Forms:
    given = {
        "slopes": np.linspace(-0.5, 1.5, 8, dtype=np.float32).reshape(8, 1, 1),
        "space": np.array([2, 3]),
        "channels": np.array([1]),
        "pads": np.array([0, 0, 1, 0, 0, 0, 1, 2]),
        "value": np.float32(1.7),
        "w_e": weights(8, 8, 1, 1, seed=3),
    }
    text = f"g (float[1,3,{size},{size}] x) => (float[] y) {{ a = Conv(x, w_i) {MIDDLES[name]} y = Conv(m, w_o) }}"
    used = {k: v for k, v in given.items() if k in text.replace(")", " ").replace(",", " ").split()}
    return all_forms(graph_text(text, 18, w_i=weights(8, 3, 1, 1), w_o=weights(4, 8, 1, 1), **used), INTEGER)


@pytest.mark.parametrize("name", MIDDLES)
def test_integers_in_every_form(name: str) -> None:
    forms = compiled(name)
    assert not [b.reason for b in forms.state.blocks.values() if b.reason]
    assert not ops_between(forms.integer)
    assert_bit_identical(forms, seeds=range(6))


def test_means_of_any_size() -> None:
    forms = compiled("squeeze and excitation", "N")
    assert not ops_between(forms.integer)
    for size in (1, 3, 7, 33, 250):
        feeds = {"x": np.random.default_rng(size).standard_normal((1, 3, size, size)).astype(np.float32)}
        [wanted] = run(session(forms.qdq), feeds)
        for model in (forms.integer, forms.kernels):
            np.testing.assert_array_equal(run(session(model), feeds)[0], wanted)


@pytest.mark.parametrize(("name", "node"), [("PRelu", "PRelu"), ("ReduceMean over space", "ReduceMean")])
def test_numpy_integers_give_the_same_bits(name: str, node: str) -> None:
    """The layer alone, from the integers before it and the params table."""
    forms = compiled(name)
    table, q_x, q_y = forms.state.params, "a_raw_q", "m_raw_q"
    model = onnx.ModelProto()
    model.CopyFrom(forms.integer)
    model.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UINT8, None) for n in (q_x, q_y))
    runner = session(model)
    for seed in range(4):
        _, before, behind = run(runner, random_feeds(forms.integer, seed))
        p_x, p_y = table[q_x], table[q_y]
        if node == "PRelu":
            slope = np.linspace(-0.5, 1.5, 8, dtype=np.float32).reshape(8, 1, 1)
            expected = integer_functions.prelu(before, slope, p_x, p_y)
        else:
            expected = integer_functions.mean(before, (2, 3), p_x, p_y)
        np.testing.assert_array_equal(behind, expected)
