"""LayerNorm, Softmax and attention in integers: close to the float operators, and the same bits as functions in ONNX."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from qcompiler import functions, integer_layers, quant
from qcompiler.quant import QuantParams, QuantSpec
from qcompiler.runtime import run, session
from tests.test_functions import call

SPEC = QuantSpec("uint8", 0, 255)


def random_integers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def assert_equals_reference(
    name: str, inputs: dict[str, Any], expected: np.ndarray, opset: int = functions.OPSET
) -> None:
    arrays = {key: np.asarray(value) for key, value in inputs.items()}
    model = call(name, arrays, onnx.helper.np_dtype_to_tensor_dtype(expected.dtype), opset)
    np.testing.assert_array_equal(run(session(model), arrays)[0], expected)
    np.testing.assert_array_equal(ReferenceEvaluator(model).run(None, arrays)[0], expected)


def test_square_root_is_exact() -> None:
    roots = np.concatenate([np.arange(1, 3000), 2 ** np.arange(31), np.random.default_rng(0).integers(1, 2**31, 20000)])
    squares = roots.astype(np.int64) ** 2
    for offset in (-1, 0, 1):
        values = np.maximum(squares + offset, 1)
        assert integer_layers.square_root(values).tolist() == [math.isqrt(v) for v in values.tolist()]
    assert integer_layers.square_root(2**62) == 2**31
    large = 2**62 + np.random.default_rng(1).integers(0, 2**61, 1000)
    assert integer_layers.square_root(large).tolist() == [math.isqrt(v) for v in large.tolist()]


def norm(scale: float, channels: int = 24) -> tuple[np.ndarray, QuantParams, QuantParams, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = QuantParams(SPEC, np.float32(scale), 120, tuple(rng.integers(0, 4, channels).tolist()))
    q = random_integers(3, 5, channels)
    q[0, 0] = 120  # a row without variance
    return q, x, QuantParams(SPEC, np.float32(0.03), 126), rng.normal(0, 1, channels), rng.normal(0, 1, channels)


def inputs_of_norm(
    q: np.ndarray, x: quant.QuantParams, constants: integer_layers.NormConstants
) -> dict[str, np.ndarray]:
    """What the functions of the norms take."""
    return {
        "q": q,
        "zero_point": np.asarray(x.zero_point, np.uint8),
        "factors": constants.factors,
        "epsilon": np.asarray(constants.epsilon, np.int64),
        "multiplier": constants.multiplier,
        "bias": constants.bias,
    }


@pytest.mark.parametrize("scale", [1e-4, 0.01, 3.0])
@pytest.mark.parametrize("factors", [True, False])
def test_layer_norm(scale: float, factors: bool) -> None:
    q, x, y, gamma, beta = norm(scale)
    x = x if factors else replace(x, exponents=())
    constants = integer_layers.NormConstants.of(x, y, gamma, beta, 1e-5)
    acc = integer_layers.layer_norm(q, x.zero_point, constants)
    values = quant.dequantize(q, x).astype(np.float64)
    centred = values - values.mean(axis=-1, keepdims=True)
    wanted = centred / np.sqrt(values.var(axis=-1, keepdims=True) + 1e-5) * gamma + beta
    assert np.abs(acc * 2.0 ** -(2 * integer_layers.NORM_BITS) * float(y.scale) - wanted).max() < 2e-4
    assert_equals_reference("IntLayerNorm", inputs_of_norm(q, x, constants), acc)


def probabilities(q: np.ndarray, scale: float) -> np.ndarray:
    x = q * float(scale)
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def test_layer_norm_gives_power_of_two_factors() -> None:
    q, x, y, gamma, beta = norm(0.01)
    factors = tuple(np.random.default_rng(4).integers(0, 4, gamma.size).tolist())
    acc = integer_layers.layer_norm(q, x.zero_point, integer_layers.NormConstants.of(x, y, gamma, beta, 1e-5))
    fine = integer_layers.NormConstants.of(x, replace(y, exponents=factors), gamma, beta, 1e-5)
    np.testing.assert_allclose(
        integer_layers.layer_norm(q, x.zero_point, fine) * 2.0 ** np.array(factors), acc, atol=2.0**24
    )


SCALES = [1e-5, 0.01, 0.1, 2.0, 1e4]


@pytest.mark.parametrize("scale", SCALES)
def test_exponential(scale: float) -> None:
    q = random_integers(4, 33)
    e = integer_layers.exponential(q, integer_layers.exponent_rate(scale))
    assert 0 <= e.min() <= e.max() < 2**31
    wanted = probabilities(q, scale)
    seen = wanted > 1e-6
    assert np.abs((e / e.sum(axis=-1, keepdims=True))[seen] / wanted[seen] - 1).max() < 0.006


@pytest.mark.parametrize("largest", [15, integer_layers.LARGEST_CODE])
@pytest.mark.parametrize("scale", SCALES)
def test_log_softmax_codes(scale: float, largest: int) -> None:
    q, rate = random_integers(2, 4, 33), integer_layers.exponent_rate(scale)
    codes = integer_layers.log_softmax_codes(q, rate, largest)
    inner = codes < largest
    ratio = 2.0 ** -codes[inner].astype(np.float64) / probabilities(q, scale)[inner]
    assert codes.max() <= largest
    assert ratio.min() > 0.74
    assert ratio.max() < 1.52
    assert_equals_reference("LogIntSoftmax", {"q": q, "rate": np.int32(rate), "largest": np.uint8(largest)}, codes)


@pytest.mark.parametrize("largest", [15, 255])
@pytest.mark.parametrize("scale", SCALES)
def test_softmax(scale: float, largest: int) -> None:
    q, rate = random_integers(2, 4, 33), integer_layers.exponent_rate(scale)
    wanted = probabilities(q, scale)
    step = wanted.max() / largest
    unit = integer_layers.softmax_rate(step)
    y = integer_layers.softmax(q, rate, unit, largest)
    assert np.abs(y - wanted / step).max() < 0.6 + 0.006 * largest
    inputs = {"q": q, "rate": np.int32(rate), "unit": np.int64(unit), "largest": np.uint8(largest)}
    assert_equals_reference("IntSoftmax", inputs, y)


def test_functions_hold_in_every_opset() -> None:
    q = random_integers(2, 9)
    for opset in (17, 18, 21, 24):
        codes = integer_layers.log_softmax_codes(q, 900, 24)
        inputs = {"q": q, "rate": np.int32(900), "largest": np.uint8(24)}
        assert_equals_reference("LogIntSoftmax", inputs, codes, opset)


@pytest.mark.parametrize("zero_point", [0, 130, 254])
def test_shift_matmul(zero_point: int) -> None:
    v = random_integers(2, 33, 8, seed=1)
    codes = np.random.default_rng(2).integers(0, integer_layers.LARGEST_CODE + 1, (2, 7, 33)).astype(np.uint8)
    codes[..., 3] = 2
    acc = integer_layers.shift_matmul(codes, v, zero_point)
    weights = np.where(codes > integer_layers.LOG_BITS, 0, 2.0 ** -codes.astype(np.float64))
    wanted = weights / weights.sum(axis=-1, keepdims=True) @ (v - float(zero_point))
    np.testing.assert_allclose(acc * 2.0**-integer_layers.LOG_BITS, wanted, atol=1e-5)
    assert_equals_reference("ShiftMatMul", {"codes": codes, "v": v, "zero_point": np.uint8(zero_point)}, acc)


@pytest.mark.parametrize("ratio", [1e-6, 0.37, 1.0, 5.5, 70000.0])
def test_shift_multiplier(ratio: float) -> None:
    m, shift = integer_layers.shift_multiplier(ratio, 1.0)
    assert 1 <= m < 2**31
    assert m * 2.0**-shift == pytest.approx(ratio * 2.0**-integer_layers.LOG_BITS, rel=2**-16)


def test_codes_of_attention_stand_for_powers_of_two() -> None:
    params = QuantParams(QuantSpec("uint8", 0, 15, log2=True), np.ones((), np.float32))
    q = quant.quantize(np.array([1, 0.7, 0.6, 0.5, 0.34, 0.33, 0, 2.0**-20]), params)
    assert q.tolist() == [0, 0, 1, 1, 1, 2, 15, 15]
    assert quant.dequantize(q, params)[:3].tolist() == [1, 1, 0.5]


def test_power_of_two_factors_scale_channels() -> None:
    params = QuantParams(SPEC, np.float32(0.5), 128, (0, 3, 1))
    assert params.scales.tolist() == [0.5, 4, 1]
    q = quant.quantize(np.array([[3.2, 3.2, 3.2]]), params)
    assert q.tolist() == [[134, 129, 131]]
    assert quant.dequantize(q, params).tolist() == [[3, 4, 3]]
    assert params.range == (-512, 508)


def masked(mask: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores uint8 [2, 4, 33], the integer mask, and what float64 gives for both."""
    q = random_integers(2, 4, 33)
    bias = integer_layers.exponent_bias(mask)
    finite = np.maximum(mask, np.finfo(np.float32).min).astype(np.float64)
    shifted = finite - finite.max(axis=-1, keepdims=True)
    return q, bias, probabilities(q + shifted / scale, scale)


MASKS = {
    "padding": np.where(np.arange(33) < 20, 0, -1e4).astype(np.float32).reshape(1, 1, 33),
    "causal": np.triu(np.full((4, 33), -np.inf, np.float32), 5),
    "lowest": np.triu(np.full((4, 33), np.finfo(np.float32).min), 5),
    "position": np.random.default_rng(3).normal(0, 2, (2, 4, 33)).astype(np.float32),
    "whole row": np.full((2, 1, 33), -1e4, np.float32),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("scale", [0.01, 0.1, 2.0])
def test_masks(kind: str, scale: float) -> None:
    q, bias, wanted = masked(MASKS[kind], scale)
    rate = integer_layers.exponent_rate(scale)
    e = integer_layers.exponential(q, rate, bias)
    seen = wanted > 1e-6
    assert np.abs((e / e.sum(axis=-1, keepdims=True))[seen] / wanted[seen] - 1).max() < 0.007
    assert not e[wanted < 1e-20].any()
    hidden = np.broadcast_to(MASKS[kind] < MASKS[kind].max(axis=-1, keepdims=True) - 1000, q.shape)
    assert not e[hidden].any()
    mask = {"q": q, "bias": bias, "rate": np.int32(rate)}
    codes = integer_layers.log_softmax_codes(q, rate, 24, bias)
    assert (codes[hidden] == 24).all()
    assert_equals_reference("MaskedLogIntSoftmax", mask | {"largest": np.uint8(24)}, codes)
    y = integer_layers.softmax(q, rate, 256 * 255, 255, bias)
    assert not y[hidden].any()
    assert_equals_reference("MaskedIntSoftmax", mask | {"unit": np.int64(256 * 255), "largest": np.uint8(255)}, y)


def test_a_row_that_the_lowest_number_hides_is_uniform() -> None:
    """As in float32, where it drowns all scores."""
    q, rate = random_integers(3, 16), integer_layers.exponent_rate(0.1)
    bias = integer_layers.exponent_bias(np.full((3, 16), np.finfo(np.float32).min))
    assert (integer_layers.log_softmax_codes(q, rate, 24, bias) == 4).all()


def test_masks_in_integers() -> None:
    mask = np.float32(
        [0, 1, -1, math.log(2), -100, -1e4, 1e6, -1e6, np.finfo(np.float32).min, -np.inf, 3e-5, 0.5 / 2**14]
    )
    bias = integer_layers.exponent_bias(mask)
    assert bias[3] == 2**14
    assert bias[-5:-2].tolist() == [-integer_layers.DEEPEST, -integer_layers.DEEPEST, -integer_layers.DEEPEST]
    with np.errstate(over="ignore"):
        assert_equals_reference("QuantizeMask", {"mask": mask}, bias)
    lowest = -383 * integer_layers.exponent_rate(1e9) - integer_layers.DEEPEST  # int8 scores, the coarsest steps
    assert lowest >= -(2**31)
    assert integer_layers.HIGHEST_BIAS + integer_layers.DEEPEST < 2**31


@pytest.mark.parametrize("scale", [1e-4, 0.01, 3.0])
def test_rms_norm(scale: float) -> None:
    q, x, y, gamma, _ = norm(scale)
    constants = integer_layers.NormConstants.of(x, y, gamma, np.zeros(24), 1e-5)
    acc = integer_layers.layer_norm(q, x.zero_point, constants, centred=False)
    values = quant.dequantize(q, x).astype(np.float64)
    wanted = values / np.sqrt(np.square(values).mean(axis=-1, keepdims=True) + 1e-5) * gamma
    assert np.abs(acc * 2.0 ** -(2 * integer_layers.NORM_BITS) * float(y.scale) - wanted).max() < 2e-4
    assert_equals_reference("IntRMSNorm", inputs_of_norm(q, x, constants), acc)
