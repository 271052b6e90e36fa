from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import onnx
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qcompiler import functions, quant
from qcompiler.quant import QuantParams, QuantSpec
from tests.support import run

U8 = QuantSpec("uint8", 0, 255)
I8 = QuantSpec("int8", -128, 127)
S8 = QuantSpec("int8", -128, 127, symmetric=True)
S7 = QuantSpec("int8", -64, 63, symmetric=True)
I32 = np.iinfo(np.int32)

scales = st.floats(2.0**-20, 2.0**10, width=32)
bounds = st.floats(-(2.0**60), 2.0**60)


def params(scale: float | np.ndarray, zero_point: int, spec: QuantSpec = U8) -> QuantParams:
    return QuantParams(spec, np.asarray(scale, np.float32), zero_point)


def exact(acc: int, m: int, zero_point: int, spec: QuantSpec, shift: int = quant.SHIFT) -> int:
    """Requantize in rational numbers; `round` of a Fraction is half to even."""
    return min(max(round(Fraction(acc * m, 2**shift)) + zero_point, spec.qmin), spec.qmax)


def hard_accumulators(m: int, rng: np.random.Generator, count: int) -> np.ndarray:
    """Accumulators at and next to ties, at the ends of int32, and at random, for the multiplier m."""
    half = 2 ** (quant.SHIFT - 1)
    odd = 2 * rng.integers(-300, 300, count) + 1
    ties = (odd * half // m + rng.integers(-1, 2, count)).tolist()
    ends = [I32.min, I32.min + 1, -1, 0, 1, I32.max - 1, I32.max]
    spread = rng.integers(-(2**31), 2**31, count) >> rng.integers(0, 31, count)
    return np.clip(np.array([*ends, *ties, *spread.tolist()]), I32.min, I32.max).astype(np.int32)


def ort_model(
    nodes: list[onnx.NodeProto], constants: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]
) -> onnx.ModelProto:
    """A model that computes y; `inputs` give types and shapes."""
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in inputs.items()
        ],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(np.asarray(c), n) for n, c in constants.items()],
    )
    domains = [helper.make_opsetid(d, v) for d, v in (("", 17), ("com.microsoft", 1), (functions.DOMAIN, 1))]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    called = {n.op_type for n in nodes if n.domain == functions.DOMAIN}
    model.functions.extend(functions.proto(name) for name in sorted(called))
    return model


def ort(op: str, names: list[str], values: Mapping[str, np.ndarray], feed: tuple[str, ...], domain: str = "", **attrs):
    """The result of one operator in ONNX Runtime, optimized; `feed` are inputs, the other values are constants."""
    inputs = {n: np.asarray(values[n]) for n in feed}
    constants = {n: v for n, v in values.items() if n not in feed}
    model = ort_model([helper.make_node(op, names, ["y"], domain=domain, **attrs)], constants, inputs)
    return run(model, inputs, optimize=True)[0]


# --- requantize


@settings(max_examples=300, deadline=None)
@given(
    acc=st.integers(I32.min, I32.max),
    m=st.integers(1, 2**31 - 1),
    zero_point=st.sampled_from([0, 2, 128, 254, 255]),
    shift=st.integers(0, 16),
)
@example(I32.min, 2**31 - 1, 128, 16)
@example(I32.max, 2**31 - 1, 128, 0)
def test_requantize_is_the_rational_formula(acc, m, zero_point, shift):
    got = quant.requantize(np.array(acc, np.int32), m, zero_point, U8, shift)
    assert got.dtype == np.uint8
    assert int(got) == exact(acc, m, zero_point, U8, shift)


@pytest.mark.parametrize("spec", [U8, I8, S7], ids=["u8", "i8", "7 bits"])
@pytest.mark.parametrize("m", [1, 2, 3, 127, 128, 1000, 32767, 65536, 2**20 + 1])
def test_requantize_hard_accumulators(m, spec):
    acc = hard_accumulators(m, np.random.default_rng(m), 500)
    for zero_point in (spec.qmin, 0, spec.qmax - 1):
        got = quant.requantize(acc, m, zero_point, spec)
        assert got.tolist() == [exact(int(a), m, zero_point, spec) for a in acc]


def test_requantize_broadcasts_a_multiplier_per_channel():
    acc = np.arange(-3000, 3000, dtype=np.int32).reshape(2, 3, -1)
    m = np.array([700, 65536, 32768]).reshape(3, 1)
    got = quant.requantize(acc, m, 128, U8)
    for c in range(3):
        np.testing.assert_array_equal(got[:, c], quant.requantize(acc[:, c], int(m[c, 0]), 128, U8))


@given(value=st.integers(-(2**62) + 1, 2**62 - 1), shift=st.integers(0, 40))
@example(2**62 - 1, 1)
@example(-(2**62) + 1, 40)
def test_round_shift_rounds_half_to_even(value, shift):
    assert int(quant.round_shift(np.array(value, np.int64), shift)) == round(Fraction(value, 2**shift))


# --- quantize, dequantize


def tricky_values(scale: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ties, their float32 neighbours, zeros, huge and tiny numbers for each scale; shape (len(scale), n)."""
    rows = []
    for s in np.atleast_1d(scale):
        ties = (np.arange(-300, 300) + 0.5).astype(np.float32) * s
        near = [np.nextafter(ties, np.float32(b)) for b in (-np.inf, np.inf)]
        odd = np.array([0, -0.0, 1e-45, -1e-45, 1e30, -1e30, 3e38, -3e38], np.float32)
        rows.append(np.concatenate([ties, *near, odd, (rng.standard_normal(500) * 100 * s).astype(np.float32)]))
    return np.stack(rows)


@pytest.mark.parametrize(
    ("spec", "zero_point"), [(U8, 0), (U8, 128), (U8, 255), (I8, -128), (I8, 0), (I8, 127), (I8, 6)]
)
@pytest.mark.parametrize("scale", [1.0, 0.1, 0.0078125, 3.3e-5, 77.7])
def test_quantize_and_dequantize_equal_onnx_runtime(scale, spec, zero_point):
    p = params(scale, zero_point, spec)
    x = tricky_values(p.scale, np.random.default_rng(0))
    values = {"x": x, "s": p.scale, "z": np.array(zero_point, spec.dtype)}
    np.testing.assert_array_equal(quant.quantize(x, p), ort("QuantizeLinear", ["x", "s", "z"], values, ("x",)))
    q = np.arange(spec.qmin, spec.qmax + 1).astype(spec.dtype)
    got = ort("DequantizeLinear", ["x", "s", "z"], {**values, "x": q}, ("x",))
    np.testing.assert_array_equal(quant.dequantize(q, p).view(np.uint32), got.view(np.uint32))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_per_channel_quantize_and_dequantize_equal_onnx_runtime(axis):
    scale = np.array([0.1, 0.033, 2.0, 1e-4], np.float32)
    p = params(scale, 0, S8.per_channel(axis))
    x = np.moveaxis(tricky_values(scale, np.random.default_rng(1))[:, :1800].reshape(4, 30, -1), 0, axis)
    values = {"x": np.ascontiguousarray(x), "s": scale, "z": np.zeros(4, np.int8)}
    q = ort("QuantizeLinear", ["x", "s", "z"], values, ("x",), axis=axis)
    np.testing.assert_array_equal(quant.quantize(x, p), q)
    got = ort("DequantizeLinear", ["x", "s", "z"], {**values, "x": q}, ("x",), axis=axis)
    np.testing.assert_array_equal(quant.dequantize(q, p), got)


def test_quantize_saturates_at_the_integers_in_use():
    q = quant.quantize(np.array([-1e9, -64.4, 63.6, 1e9], np.float32), params(1.0, 0, S7))
    assert q.tolist() == [-64, -64, 63, 63]
    assert q.dtype == np.int8


# --- params from ranges


@pytest.mark.parametrize("spec", [U8, I8, S8], ids=["u8", "i8", "s8"])
@settings(max_examples=200, deadline=None)
@given(a=bounds, b=bounds)
@example(0.0, 0.0)
@example(-1.0, -1.0)
@example(-1e-30, 1e30)
@example(-1e30, 1e-30)
def test_params_from_range(spec, a, b):
    low, high = min(a, b), max(a, b)
    p = quant.params_from_range(low, high, spec)
    assert p.scale.dtype == np.float32
    assert p.scale.shape == ()
    assert p.zero_point % 2 == 0
    assert spec.qmin <= p.zero_point <= spec.qmax
    assert quant.dequantize(quant.quantize(np.zeros(1, np.float32), p), p)[0] == 0
    low, high = min(low, 0.0), max(high, 0.0)
    slack = 1e-6 * max(-low, high)
    assert p.range[0] <= low + slack
    assert p.range[1] >= high - slack
    if spec.symmetric:
        assert p.zero_point == 0
    elif low == 0:
        assert p.zero_point == spec.qmin
    if high - low > 1e-20:
        least = max(-low / 128, high / 127) if spec.symmetric else (high - low) / spec.steps
        limit = 1.02 if not spec.symmetric else 1 + 1 / 126
        assert float(p.scale) <= limit * least


@pytest.mark.parametrize("low, high", [(np.nan, 1), (0, np.nan), (-np.inf, 1), (0, np.inf)])
def test_params_from_range_refuses_what_is_not_finite(low, high):
    with pytest.raises(ValueError, match="not finite"):
        quant.params_from_range(low, high, U8)


def test_same_as_compares_meaning():
    p = params(0.5, 128)
    assert p.same_as(params(0.5, 128))
    assert not p.same_as(params(0.5, 126))
    assert not p.same_as(params(0.25, 128))
    assert not p.same_as(params(0.5, 0, I8))
    assert p.with_scale(0.25).same_as(params(0.25, 128))


# --- dyadic scales


@settings(max_examples=300, deadline=None)
@given(wanted=st.lists(scales, min_size=1, max_size=20), s_x=scales, s_y=scales)
def test_snap_weight_scale_is_exactly_dyadic_and_never_smaller(wanted, s_x, s_y):
    wanted = np.array(wanted)
    s_x, s_y = np.float32(s_x), np.float32(s_y)
    exact_m = wanted * float(s_x) / float(s_y) * 2.0**quant.SHIFT
    assume(exact_m.max() < 2**30)
    got = quant.snap_weight_scale(wanted, float(s_x), float(s_y))
    assert got.dtype == np.float32
    m = quant.multiplier(quant.rescale(s_x, got, s_y))
    assert np.all(m >= 1)
    assert np.all(got >= wanted * (1 - 1e-6))


@pytest.mark.parametrize("excess", [1e-4, 1e-5, 2e-6])
@pytest.mark.parametrize("m", [1, 2, 100, 30_000])
def test_snap_weight_scale_does_not_round_down_a_small_excess(m, excess):
    wanted = m * (1 + excess) * 2.0**-quant.SHIFT
    assert quant.snap_weight_scale([wanted], 1.0, 1.0)[0] >= wanted * (1 - 1e-6)


def test_snap_weight_scale_mostly_takes_the_next_multiplier():
    rng = np.random.default_rng(0)
    s_x, s_y = 0.0213, 0.0777
    wanted = 2.0 ** rng.uniform(-10, 0, 4000) * s_y / s_x
    m = quant.multiplier(quant.rescale(s_x, quant.snap_weight_scale(wanted, s_x, s_y), s_y))
    bumps = m - np.ceil(wanted * float(np.float32(s_x)) / float(np.float32(s_y)) * 2.0**quant.SHIFT)
    assert np.mean(bumps <= 0) > 0.5
    assert np.mean(bumps <= 2) > 0.95


def test_a_factor_beyond_int32_is_refused():
    with pytest.raises(ValueError, match="too large"):
        quant.snap_weight_scale([1e6], 1e3, 1e-3)


@settings(max_examples=300, deadline=None)
@given(ratio=st.floats(2.0**-12, 16), s_c=scales)
def test_snap_ratio_is_exactly_dyadic_and_near(ratio, s_c):
    s_c = np.float32(s_c)
    wanted = ratio * float(s_c)
    got = quant.snap_ratio(wanted, float(s_c))
    assert quant.is_dyadic(got / s_c, quant.RATIO_SHIFT)
    assert abs(float(got) / wanted - 1) < 0.25 or ratio < 2.0**-9


def test_snap_ratio_is_nearly_always_within_one_in_512():
    rng = np.random.default_rng(0)
    wanted, s_c = 2.0 ** rng.uniform(-4, 1, 2000), (2.0 ** rng.uniform(-10, 2, 2000)).astype(np.float32)
    got = np.array([quant.snap_ratio(r * float(c), float(c)) / c for r, c in zip(wanted, s_c, strict=True)])
    assert np.mean(np.abs(got / wanted - 1) <= 2.0**-9) > 0.95


@pytest.mark.parametrize(("ratio", "s_c"), [(7.0, 73.5002670288086), (1.906386, 0.016967796)])
def test_snap_ratio_finds_a_scale_where_the_nearest_64_do_not_fit(ratio, s_c):
    s_c = np.float32(s_c)
    got = quant.snap_ratio(ratio * float(s_c), float(s_c))
    assert quant.is_dyadic(got / s_c, quant.RATIO_SHIFT)
    assert abs(float(got / s_c) / ratio - 1) < 0.1


def test_snap_ratio_refuses_a_limit_below_the_least_ratio():
    with pytest.raises(ValueError, match="no float32 scale up to"):
        quant.snap_ratio(1.0, 1.0, limit=2.0**-13)


@settings(max_examples=100, deadline=None)
@given(ratio=st.floats(0.01, 4), s_c=scales)
def test_snap_ratio_obeys_its_limit(ratio, s_c):
    limit = float(np.float32(ratio * s_c))
    got = quant.snap_ratio(ratio * s_c, s_c, limit=limit)
    assert float(got) <= limit
    assert quant.is_dyadic(got / np.float32(s_c), quant.RATIO_SHIFT)


@settings(max_examples=200, deadline=None)
@given(s_a=scales, s_b=scales, ratio=st.floats(2.0**-8, 8), at_least=st.booleans())
def test_snap_scale_falls_with_the_output_scale_and_rises_with_the_input_scale(s_a, s_b, ratio, at_least):
    s_a, s_b = np.float32(s_a), np.float32(s_b)
    output = float(s_a) * float(s_b) / ratio
    assume(2.0**-60 < output < 2.0**60)
    for factor, wanted in (
        (lambda s: quant.rescale(s_a, s_b, s), output),
        (lambda s: quant.rescale(s, s_b, np.float32(output)), float(s_a)),
    ):
        got = quant.snap_scale(factor, wanted, at_least)
        assert got is not None
        assert quant.is_dyadic(factor(got))
        assert abs(float(got) / wanted - 1) < 0.13


@settings(max_examples=200, deadline=None)
@given(scale=scales, ratio=st.floats(2.0**-8, 8), at_least=st.booleans())
def test_snap_scale_of_both_factors_of_a_product(scale, ratio, at_least):
    output = np.float32(float(scale) ** 2 / ratio)
    assume(2.0**-60 < output < 2.0**60)
    got = quant.snap_scale(lambda s: quant.rescale(s, s, output), float(scale), at_least)
    assert got is not None
    assert quant.is_dyadic(quant.rescale(got, got, output))
    assert abs(float(got) / scale - 1) < 0.13


@pytest.mark.parametrize("at_least", [True, False])
def test_snap_scale_keeps_to_its_side(at_least):
    s_a, s_b = np.float32(0.0371), np.float32(0.0093)
    wanted = np.float32(s_a * s_b) * 2.0 ** np.random.default_rng(0).uniform(0, 8, 500)
    got = np.array([quant.snap_scale(lambda s: quant.rescale(s_a, s_b, s), float(w), at_least) for w in wanted])
    right = got >= wanted * (1 - 1e-6) if at_least else got <= wanted * (1 + 1e-6)
    assert right.mean() > 0.99, "the other side is for want of a fitting float32 only"


def test_snap_pair_finds_scales_for_the_gate_of_a_hard_swish():
    rng = np.random.default_rng(0)
    gate = np.sqrt(6) / 255
    for top in rng.uniform(0.1, 30, 500):
        s_x, s_y = (top + 3) / np.sqrt(6) / 255, (top + 0.375) / 255 * rng.uniform(0.9, 1.1)
        found = quant.snap_pair(s_x, gate, s_y)
        assert found is not None
        x, h = found
        assert quant.is_dyadic(x / h, quant.RATIO_SHIFT)
        assert quant.is_dyadic(quant.rescale(x, h, np.float32(s_y)))
        assert s_x * (1 - 1e-6) < x < s_x * 1.05
        assert gate * 0.99 < h < gate * (1 + 1e-6)


def test_multiplier_refuses_what_is_not_dyadic():
    assert quant.multiplier([0.5, 2.0**-16]).tolist() == [32768, 1]
    for factor in (0.1, 2.0**-17, 0.0):
        with pytest.raises(ValueError, match="not a multiple"):
            quant.multiplier(factor)


# --- ONNX Runtime's integer kernels


def channels_for(
    rng: np.random.Generator, p_x: QuantParams, p_y: QuantParams, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Snapped weight scales and, for each, one hard accumulator; shapes (count,)."""
    s_x, s_y = float(p_x.scale), float(p_y.scale)
    wanted = s_y / s_x * 2.0 ** rng.uniform(-16, 2, count)
    s_w = quant.snap_weight_scale(wanted, s_x, s_y)
    m = quant.multiplier(quant.rescale(p_x.scale, s_w, p_y.scale))
    acc = [rng.choice(hard_accumulators(int(k), rng, 7)) for k in m]
    return s_w, np.array(acc, np.int32)


KERNEL_PARAMS = pytest.mark.parametrize(
    ("p_x", "p_y"),
    [
        (params(0.0213, 128), params(0.0777, 128)),
        (params(0.5, 0), params(1.3, 0)),
        (params(3e-3, 254), params(0.11, 2)),
        (params(0.02, 0), params(0.03, 254)),
    ],
    ids=["128-128", "0-0", "254-2", "0-254"],
)


@KERNEL_PARAMS
@pytest.mark.parametrize("group", [1, 2])
def test_qlinearconv_is_requantize(p_x, p_y, group):
    rng = np.random.default_rng(3)
    count, width = 4096, 4
    s_w, bias = channels_for(rng, p_x, p_y, count)
    x = rng.integers(0, 256, (1, width * group, 2, 2)).astype(np.uint8)
    x[..., 0] = p_x.zero_point  # half of the positions see the bias alone
    w = rng.integers(-128, 128, (count, width, 1, 1)).astype(np.int8)
    acc = np.concatenate(
        [
            np.einsum("nchw,oc->nohw", x_g.astype(np.int64) - p_x.zero_point, w_g[..., 0, 0].astype(np.int64))
            for x_g, w_g in zip(np.split(x, group, 1), np.split(w, group), strict=True)
        ],
        axis=1,
    )
    reach = int(np.abs(acc).max())
    bias = np.clip(bias, I32.min + reach, I32.max - reach) if reach else bias
    acc = acc + bias[:, None, None]
    m = quant.multiplier(quant.rescale(p_x.scale, s_w, p_y.scale))[:, None, None]
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"]
    values = {
        "x": x, "xs": p_x.scale, "xz": np.uint8(p_x.zero_point), "w": w, "ws": s_w, "wz": np.zeros(count, np.int8),
        "ys": p_y.scale, "yz": np.uint8(p_y.zero_point), "b": bias,
    }  # fmt: skip
    got = ort("QLinearConv", names, values, ("x",), group=group)
    np.testing.assert_array_equal(got, quant.requantize(acc, m, p_y.zero_point, U8))


@KERNEL_PARAMS
def test_qlinearconv_at_the_ends_of_int32(p_x, p_y):
    """With x at its zero point the accumulator is the bias, untouched by a clip."""
    count = 4096
    s_w, bias = channels_for(np.random.default_rng(4), p_x, p_y, count)
    m = quant.multiplier(quant.rescale(p_x.scale, s_w, p_y.scale))
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"]
    values = {
        "x": np.full((1, 1, 1, 1), p_x.zero_point, np.uint8), "xs": p_x.scale, "xz": np.uint8(p_x.zero_point),
        "w": np.ones((count, 1, 1, 1), np.int8), "ws": s_w, "wz": np.zeros(count, np.int8),
        "ys": p_y.scale, "yz": np.uint8(p_y.zero_point), "b": bias,
    }  # fmt: skip
    assert I32.min in bias
    assert I32.max in bias
    got = ort("QLinearConv", names, values, ("x",))
    np.testing.assert_array_equal(got.reshape(-1), quant.requantize(bias, m, p_y.zero_point, U8))


@KERNEL_PARAMS
@pytest.mark.parametrize("rows", [1, 5])
def test_qgemm_is_requantize(p_x, p_y, rows):
    rng = np.random.default_rng(5)
    count, depth = 4096, 6
    s_w, bias = channels_for(rng, p_x, p_y, count)
    x = rng.integers(0, 256, (rows, depth)).astype(np.uint8)
    x[0] = p_x.zero_point
    w = rng.integers(-128, 128, (depth, count)).astype(np.int8)
    product = (x.astype(np.int64) - p_x.zero_point) @ w.astype(np.int64)
    reach = int(np.abs(product).max())
    bias = np.clip(bias, I32.min + reach, I32.max - reach) if rows > 1 else bias
    m = quant.multiplier(quant.rescale(p_x.scale, s_w, p_y.scale))
    names = ["x", "xs", "xz", "w", "ws", "wz", "b", "ys", "yz"]
    values = {
        "x": x, "xs": p_x.scale, "xz": np.uint8(p_x.zero_point), "w": w, "ws": s_w, "wz": np.zeros(count, np.int8),
        "b": bias, "ys": p_y.scale, "yz": np.uint8(p_y.zero_point),
    }  # fmt: skip
    got = ort("QGemm", names, values, ("x",), domain="com.microsoft")
    np.testing.assert_array_equal(got, quant.requantize(product + bias, m, p_y.zero_point, U8))


@KERNEL_PARAMS
def test_qlinearmatmul_is_requantize(p_x, p_y):
    rng = np.random.default_rng(6)
    count, depth = 512, 64
    s_w, _ = channels_for(rng, p_x, p_y, count)
    x = rng.integers(0, 256, (40, depth)).astype(np.uint8)
    x[:20] = p_x.zero_point + rng.integers(-1, 2, (20, depth)) if 0 < p_x.zero_point < 255 else x[:20] % 2
    w = rng.integers(-128, 128, (depth, count)).astype(np.int8)
    acc = (x.astype(np.int64) - p_x.zero_point) @ w.astype(np.int64)
    m = quant.multiplier(quant.rescale(p_x.scale, s_w, p_y.scale))
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
    values = {
        "x": x, "xs": p_x.scale, "xz": np.uint8(p_x.zero_point), "w": w, "ws": s_w, "wz": np.zeros(count, np.int8),
        "ys": p_y.scale, "yz": np.uint8(p_y.zero_point),
    }  # fmt: skip
    got = ort("QLinearMatMul", names, values, ("x",))
    np.testing.assert_array_equal(got, quant.requantize(acc, m, p_y.zero_point, U8))


def binary(op: str, p_a: QuantParams, p_b: QuantParams, p_c: QuantParams) -> tuple[np.ndarray, ...]:
    """All 65,536 pairs and what ONNX Runtime makes of them."""
    a, b = (g.reshape(-1).astype(np.uint8) for g in np.meshgrid(np.arange(256), np.arange(256)))
    names, values = [], {}
    for letter, q, p in (("a", a, p_a), ("b", b, p_b), ("c", None, p_c)):
        if q is not None:
            values[letter] = q
            names.append(letter)
        values |= {f"{letter}s": p.scale, f"{letter}z": np.uint8(p.zero_point)}
        names += [f"{letter}s", f"{letter}z"]
    return a, b, ort(op, names, values, ("a", "b"), domain="com.microsoft")


@pytest.mark.parametrize("zero_points", [(128, 128, 128), (0, 0, 0), (2, 254, 100), (0, 128, 126)])
@pytest.mark.parametrize("ratios", [(1, 1), (0.5, 0.25), (0.77, 0.31), (0.0635, 1.9), (1.5, 0.001)])
def test_qlinearadd_is_add(ratios, zero_points):
    s_c = 0.0371
    p_a, p_b = (params(quant.snap_ratio(r * s_c, s_c), z) for r, z in zip(ratios, zero_points[:2], strict=True))
    p_c = params(s_c, zero_points[2])
    a, b, got = binary("QLinearAdd", p_a, p_b, p_c)
    np.testing.assert_array_equal(got, quant.add(a, b, p_a, p_b, p_c))


@pytest.mark.parametrize("zero_points", [(128, 128, 128), (0, 0, 0), (2, 254, 100), (0, 128, 126)])
@pytest.mark.parametrize("factor", [1.0, 2.0**-8, 0.0123, 0.2, 2.0**-16])
def test_qlinearmul_is_mul(factor, zero_points):
    p_a, p_b = params(0.0371, zero_points[0]), params(0.00911, zero_points[1])
    s_c = quant.snap_scale(lambda s: quant.rescale(p_a.scale, p_b.scale, s), 0.0371 * 0.00911 / factor, True)
    assert s_c is not None
    p_c = params(s_c, zero_points[2])
    a, b, got = binary("QLinearMul", p_a, p_b, p_c)
    np.testing.assert_array_equal(got, quant.mul(a, b, p_a, p_b, p_c))


# --- the functions of the integer form


def both(op: str, names: list[str], values: Mapping[str, np.ndarray], feed: str) -> list[np.ndarray]:
    """What the function gives in ONNX Runtime, optimized and not, and in the reference evaluator."""
    inputs = {feed: values[feed]}
    constants = {n: v for n, v in values.items() if n != feed}
    model = ort_model([helper.make_node(op, names, ["y"], domain=functions.DOMAIN)], constants, inputs)
    return [
        run(model, inputs, optimize=True)[0],
        run(model, inputs)[0],
        np.asarray(ReferenceEvaluator(model).run(None, inputs)[0]),
    ]


@pytest.mark.parametrize(("spec", "zero_point"), [(U8, 0), (U8, 128), (U8, 254), (I8, -128), (I8, 6), (S7, 0)])
@pytest.mark.parametrize("shift", [1, 12, 16])
def test_requantize_function_is_requantize(shift, spec, zero_point):
    rng = np.random.default_rng(7)
    m = np.array([1, 3, 127, 4096, 65536, 2**31 - 1]).reshape(-1, 1)
    acc = np.stack([hard_accumulators(int(k), rng, 300) for k in m[:, 0]])
    values = {
        "acc": acc, "m": m.astype(np.int32), "n": np.array(shift, np.uint64), "z": np.array(zero_point, spec.dtype),
        "low": np.array(spec.qmin, spec.dtype), "high": np.array(spec.qmax, spec.dtype),
    }  # fmt: skip
    wanted = quant.requantize(acc, m, zero_point, spec, shift)
    for got in both("Requantize", ["acc", "m", "n", "z", "low", "high"], values, "acc"):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(("dtype", "zero_point"), [("uint8", 128), ("uint8", 0), ("int8", -128)])
def test_rescale_function(dtype, zero_point):
    info = np.iinfo(dtype)
    q = np.arange(info.min, info.max + 1).astype(dtype).reshape(16, 16)
    values = {"q": q, "z": np.array(zero_point, dtype), "m": np.array(4095, np.int32)}
    for got in both("Rescale", ["q", "z", "m"], values, "q"):
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, (q.astype(np.int64) - zero_point) * 4095)


def test_rescale_and_requantize_make_an_add():
    p_c = params(0.05, 126)
    p_a, p_b = params(quant.snap_ratio(0.03, 0.05), 128), params(quant.snap_ratio(0.011, 0.05), 0)
    a, b = (g.astype(np.uint8) for g in np.meshgrid(np.arange(256), np.arange(256)))
    m_a, m_b = (quant.multiplier(p.scale / p_c.scale, quant.RATIO_SHIFT).astype(np.int32) for p in (p_a, p_b))
    made = helper.make_node
    nodes = [
        made("Rescale", ["a", "az", "ma"], ["left"], domain=functions.DOMAIN),
        made("Rescale", ["b", "bz", "mb"], ["right"], domain=functions.DOMAIN),
        made("Add", ["left", "right"], ["acc"]),
        made("Requantize", ["acc", "one", "n", "cz", "low", "high"], ["y"], domain=functions.DOMAIN),
    ]
    constants = {
        "az": np.uint8(128), "bz": np.uint8(0), "ma": m_a, "mb": m_b, "one": np.int32(1), "cz": np.uint8(126),
        "n": np.uint64(quant.RATIO_SHIFT), "low": np.uint8(0), "high": np.uint8(255),
    }  # fmt: skip
    model = ort_model(nodes, constants, {"a": a, "b": b})
    [got] = run(model, {"a": a, "b": b}, optimize=True)
    np.testing.assert_array_equal(got, quant.add(a, b, p_a, p_b, p_c))


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("result", ["uint8", "int8"])
def test_table_function_is_indexed_by_the_bit_pattern(dtype, result):
    rng = np.random.default_rng(8)
    table = rng.permutation(256).astype(np.uint8).view(result)
    q = np.arange(256, dtype=np.uint8).view(dtype).reshape(2, 8, 16)
    for got in both("Table", ["q", "t"], {"q": q, "t": table}, "q"):
        assert got.dtype == table.dtype
        np.testing.assert_array_equal(got, table[q.view(np.uint8)])


def test_unknown_functions_are_refused():
    with pytest.raises(KeyError):
        functions.proto("Sort")


def test_function_protos_are_copies():
    functions.proto("Table").name = "Changed"
    assert functions.proto("Table").name == "Table"
    assert functions.proto("Table").doc_string
    assert functions.proto("Table").domain == functions.DOMAIN
