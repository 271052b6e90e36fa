from __future__ import annotations

import copy
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.collectors import COLLECTORS, Entropy, MinMax, MovingAverage, Omse, Percentile
from qcompiler.quant import QuantParams, QuantSpec, dequantize, params_from_range, quantize

U8 = QuantSpec("uint8", 0, 255)
S8 = QuantSpec("int8", -128, 127, symmetric=True)

finite = hnp.arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=True)
)
kinds = pytest.mark.parametrize("kind", COLLECTORS.values(), ids=COLLECTORS)


def observed(kind, *arrays):
    collector = kind()
    for x in arrays:
        collector.observe(float(x.min()), float(x.max()), x)
    return collector


def error(x: np.ndarray, params: QuantParams) -> float:
    wide = x.astype(np.float64)
    return float(np.mean((dequantize(quantize(x, params), params) - wide) ** 2))


def same(a: QuantParams, b: QuantParams) -> bool:
    return a.same_as(b) and a.spec == b.spec


def samples(name: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    normal = rng.standard_normal(30_000)
    made = {
        "normal": normal,
        "laplace": rng.laplace(size=30_000),
        "relu": np.maximum(normal, 0),
        "silu": 3 * normal / (1 + np.exp(-3 * normal)),
        "student": rng.standard_t(2, 30_000),
        "lognormal": np.exp(2 * normal),
        "uniform": rng.random(30_000),
        "relu6": np.clip(4 * normal, 0, 6),
        "clipped at a number between two bins": np.clip(4 * normal, 0, 5.97),
        "negative": -np.abs(normal),
        "far from zero": normal + 10,
        "two outliers": np.append(normal, [30, -25]),
        "one far outlier": np.append(normal, 1000),
        "tiny": normal * 1e-20,
    }
    return made[name].astype(np.float32)


NAMES = [
    "normal", "laplace", "relu", "silu", "student", "lognormal", "uniform", "relu6", "clipped at a number between two bins",
    "negative", "far from zero", "two outliers", "one far outlier", "tiny",
]  # fmt: skip


@kinds
@settings(max_examples=25, deadline=None)
@given(parts=st.lists(finite, min_size=3, max_size=4), spec=st.sampled_from([U8, S8]))
def test_merge_is_exact_associative_and_commutative(kind, parts, spec):
    whole = observed(kind, *parts).finish(spec)
    for order in permutations(range(len(parts))):
        left = observed(kind)
        for i in order:
            left.merge(observed(kind, parts[i]))
        assert same(left.finish(spec), whole)
        right = observed(kind)
        for i in order:
            single = observed(kind, parts[i])
            single.merge(right)
            right = single
        assert same(right.finish(spec), whole)


@kinds
@settings(max_examples=50, deadline=None)
@given(x=finite, spec=st.sampled_from([U8, S8]))
def test_params_represent_zero_and_stay_in_the_observed_range(kind, x, spec):
    params = observed(kind, x).finish(spec)
    assert params.zero_point % 2 == 0
    assert params.spec.qmin <= params.zero_point <= params.spec.qmax
    assert np.isfinite(params.scale)
    assert dequantize(quantize(np.zeros(1, np.float32), params), params)[0] == 0
    assert params.scale <= observed(MinMax, x).finish(spec).scale * (1 + 1e-6)
    if x.min() >= 0 and spec is U8:
        assert params.zero_point == 0


@settings(max_examples=50, deadline=None)
@given(x=finite)
def test_minmax_covers_everything(x):
    low, high = observed(MinMax, x).finish(U8).range
    assert low * (1 + 1e-6) <= min(0.0, float(x.min())) * (1 - 1e-6)
    assert high * (1 + 1e-6) >= max(0.0, float(x.max())) * (1 - 1e-6)


@pytest.mark.parametrize("spec", [U8, S8], ids=["u8", "s8"])
@pytest.mark.parametrize("name", NAMES)
def test_omse_is_within_one_percent_of_exhaustive_search(name, spec):
    x = samples(name)
    params = observed(Omse, x).finish(spec)
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    fractions = 2.0 ** -np.r_[0:2:0.1, 2:10:1.0]
    pairs = (
        [(low * f, high * f) for f in fractions]
        if spec.symmetric
        else [(low * f, high * g) for f in (fractions if low else [1]) for g in (fractions if high else [1])]
    )
    seen = np.append(x, [x.min(), x.max()])  # the bounds count once more
    # A quarter of the values decides roughly; the best few are then measured on all.
    sketch = x[::4] if "outlier" not in name else seen
    ranked = sorted((params_from_range(a, b, spec) for a, b in pairs), key=lambda p: error(sketch, p))
    assert error(seen, params) <= 1.01 * min(error(seen, p) for p in ranked[:5])
    assert error(seen, params) <= 1.01 * error(seen, observed(MinMax, x).finish(spec))


def test_omse_keeps_a_huge_value_that_the_sample_of_values_missed():
    collector = Omse()
    x = samples("normal")
    collector.observe(float(x.min()), 1000.0, x)
    assert collector.finish(U8).range[1] > 500


def test_omse_clips_what_minmax_keeps():
    x = samples("laplace")
    assert error(x, observed(Omse, x).finish(U8)) < 0.95 * error(x, observed(MinMax, x).finish(U8))


@pytest.mark.parametrize("spec", [U8, S8], ids=["u8", "s8"])
@pytest.mark.parametrize("value", [0.0, -0.0, 3.7, -2.0, 1e-30, -1e30])
@kinds
def test_a_constant_tensor_has_valid_params(kind, value, spec):
    x = np.full(100, value, np.float32)
    params = observed(kind, x).finish(spec)
    assert params.scale > 0
    np.testing.assert_allclose(dequantize(quantize(x, params), params), x, rtol=1e-6, atol=1e-30)


@kinds
@pytest.mark.parametrize("mask", [-1e9, float(np.finfo(np.float32).min) / 2])
def test_a_mask_value_is_taken(kind, mask):
    x = np.append(samples("normal"), np.full(50, mask, np.float32)).astype(np.float32)
    params = observed(kind, x).finish(U8)
    np.testing.assert_allclose(dequantize(quantize(x[-1:], params), params), [mask], rtol=0.01)


@kinds
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(kind, bad):
    x = np.array([1, bad, 2], np.float32)
    with pytest.raises(ValueError, match="not finite"):
        kind().observe(1.0, 2.0, x)
    with pytest.raises(ValueError, match="not finite"):
        kind().observe(float(x.min()), float(x.max()), x[:1])


@kinds
def test_nothing_observed_is_refused(kind):
    with pytest.raises(ValueError, match="no value was observed"):
        kind().finish(U8)


@kinds
def test_finish_does_not_change_the_collector(kind):
    collector = observed(kind, samples("silu"))
    before = copy.deepcopy(vars(collector))
    assert same(collector.finish(U8), collector.finish(U8))
    np.testing.assert_equal(vars(collector), before)


def test_bounds_count_although_the_sample_missed_them():
    collector = MinMax()
    collector.observe(-7.0, 9.0, np.ones(1, np.float32))
    low, high = collector.finish(U8).range
    assert low <= -7
    assert high >= 9 * (1 - 1e-6)


def test_the_average_of_bounds_ignores_how_often_a_sample_reaches_them():
    collector = observed(MovingAverage, *(np.array([-k, 0, 2 * k], np.float32) for k in (1, 1, 1, 9)))
    wanted = params_from_range(-3, 6, U8)
    assert same(collector.finish(U8), wanted)


def test_percentile_cuts_the_tails_and_nothing_else():
    x = np.append(samples("normal"), [1e4, -1e4]).astype(np.float32)
    low, high = observed(Percentile, np.tile(x, 2)).finish(U8).range
    assert high == pytest.approx(np.quantile(x, 0.99995), rel=0.1)
    assert low == pytest.approx(np.quantile(x, 0.00005), rel=0.1)


def test_percentile_is_not_misled_by_exact_bounds():
    collector = Percentile()
    for _ in range(50):
        collector.observe(-100.0, 100.0, samples("normal")[:1000])
    assert collector.finish(U8).range[1] < 6


def test_entropy_clips_outliers_and_keeps_what_is_dense():
    spread = observed(Entropy, samples("uniform")).finish(U8)
    assert spread.range[1] == pytest.approx(1, rel=0.05)
    far = observed(Entropy, samples("one far outlier")).finish(U8)
    assert far.range[1] < 50


def test_entropy_searches_both_ends():
    x = np.concatenate([samples("normal"), [300.0], [-40.0]]).astype(np.float32)
    low, high = observed(Entropy, x).finish(U8).range
    assert -20 < low < -2
    assert 2 < high < 30
