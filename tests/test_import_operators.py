"""Each quantized operator equals its float operator between DequantizeLinear and QuantizeLinear."""

from __future__ import annotations

import numpy as np
import pytest
from qcompiler_passes.import_operators import FORMS, concat_to_float, to_float

from qcompiler import compile_model, ir
from qcompiler.errors import UserError
from qcompiler.rewrite import Rewriter, Rule, apply_rules
from tests.support import model_from_text, ops_of, run, state_of

ARRAYS = {
    "s": np.float32(0.02),
    "z": np.uint8(120),
    "t": np.float32(0.05),
    "u": np.uint8(132),
    "w": np.random.default_rng(0).integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
    "sw": np.linspace(0.003, 0.006, 4).astype(np.float32),
    "zw": np.zeros(4, np.int8),
    "b": np.arange(4, dtype=np.int32) * 700,
    "m": np.random.default_rng(1).integers(0, 256, (6, 4)).astype(np.uint8),
    "sm": np.float32(0.004),
    "zm": np.uint8(127),
}

CASES = {
    "QLinearConv": ("1,3,6,6", "y = QLinearConv<pads=[1,1,1,1]>(x, s, z, w, sw, zw, t, u, b)", "Conv"),
    "QLinearMatMul": ("5,6", "y = QLinearMatMul(x, s, z, m, sm, zm, t, u)", "MatMul"),
    "com.microsoft.QGemm": ("5,6", "y = com.microsoft.QGemm<alpha=0.5>(x, s, z, m, sm, zm, b, t, u)", "Gemm"),
    "com.microsoft.QLinearAdd": ("2,6", "y = com.microsoft.QLinearAdd(x, s, z, x, t, u, t, u)", "Add"),
    "com.microsoft.QLinearAveragePool": (
        "1,3,6,6",
        "y = com.microsoft.QLinearAveragePool<kernel_shape=[2,2]>(x, s, z, t, u)",
        "AveragePool",
    ),
    "com.microsoft.QLinearGlobalAveragePool": (
        "1,3,6,6",
        "y = com.microsoft.QLinearGlobalAveragePool<channels_last=0>(x, s, z, t, u)",
        "GlobalAveragePool",
    ),
    "com.microsoft.QLinearLeakyRelu": (
        "2,6",
        "y = com.microsoft.QLinearLeakyRelu<alpha=0.2>(x, s, z, t, u)",
        "LeakyRelu",
    ),
    "com.microsoft.QLinearMul": ("2,6", "y = com.microsoft.QLinearMul(x, s, z, x, t, u, t, u)", "Mul"),
    "com.microsoft.QLinearSigmoid": ("2,6", "y = com.microsoft.QLinearSigmoid(x, s, z, t, u)", "Sigmoid"),
    "com.microsoft.QLinearConcat": ("2,6", "y = com.microsoft.QLinearConcat<axis=1>(t, u, x, s, z, x, t, u)", "Concat"),
}
RULES: dict[str, Rule] = {**dict.fromkeys(FORMS, to_float), "com.microsoft.QLinearConcat": concat_to_float}


def test_there_is_a_case_for_each_rule() -> None:
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize("key", CASES)
def test_operator(key: str) -> None:
    shape, body, op = CASES[key]
    rank = shape.count(",") + 1
    model = model_from_text(f"g (uint8[{shape}] x) => (uint8[{','.join('ABCD'[:rank])}] y) {{ {body} }}", ARRAYS)
    state = state_of(model)
    assert apply_rules(Rewriter(state), RULES) == 1
    after = ir.to_proto(state.graph)
    assert [o for o in ops_of(after) if "Linear" not in o] == [op]
    feeds = {"x": np.random.default_rng(2).integers(0, 256, [int(d) for d in shape.split(",")]).astype(np.uint8)}
    before, same = run(model, feeds)[0], run(after, feeds)[0]
    difference = np.abs(before.astype(int) - same.astype(int))
    assert difference.max() <= 1  # float sums round otherwise at ties
    assert difference.mean() < 0.1


def test_a_gemm_without_output_scale_gives_floats() -> None:
    model = model_from_text(
        "g (uint8[5,6] x) => (float[5,4] y) { y = com.microsoft.QGemm<alpha=1.0>(x, s, z, m, sm, zm, b) }", ARRAYS
    )
    state = state_of(model)
    apply_rules(Rewriter(state), RULES)
    after = ir.to_proto(state.graph)
    assert ops_of(after) == ["DequantizeLinear", "Gemm"]
    feeds = {"x": np.random.default_rng(2).integers(0, 256, (5, 6)).astype(np.uint8)}
    np.testing.assert_allclose(run(after, feeds)[0], run(model, feeds)[0], rtol=1e-4, atol=1e-4)


def test_an_unknown_attribute_is_refused() -> None:
    body = "y = com.microsoft.QLinearGlobalAveragePool<channels_last=1>(x, s, z, t, u)"
    model = model_from_text(f"g (uint8[1,6,6,3] x) => (uint8[A,B,C,D] y) {{ {body} }}", ARRAYS)
    with pytest.raises(UserError, match="attribute channels_last is not understood"):
        apply_rules(Rewriter(state_of(model)), RULES)


def test_a_compiled_model_compiles_to_itself() -> None:
    """The kernels of this compiler are such a model: all scales are dyadic already."""
    rng = np.random.default_rng(3)
    body = "c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) a = Conv(r, v) y = Relu(a)"
    arrays = {k: rng.normal(0, 0.3, s).astype(np.float32) for k, s in {"w": (8, 8, 3, 3), "v": (4, 8, 1, 1)}.items()}
    model = model_from_text(f"g (float[1,8,6,6] x) => (float[1,4,6,6] y) {{ {body} }}", arrays)
    samples = [{"x": rng.standard_normal((1, 8, 6, 6)).astype(np.float32)} for _ in range(4)]
    once = compile_model(model, samples).model
    again = compile_model(once).model
    for feeds in samples:
        assert np.array_equal(run(once, feeds)[0], run(again, feeds)[0])


@pytest.mark.parametrize("key", CASES)
def test_scales_that_are_not_constants_leave_an_operator_as_it_is(key: str) -> None:
    shape, body, _ = CASES[key]
    rank = shape.count(",") + 1
    text = f"g (uint8[{shape}] x, float t) => (uint8[{','.join('ABCD'[:rank])}] y) {{ {body} }}"
    state = state_of(model_from_text(text, {name: array for name, array in ARRAYS.items() if name != "t"}))
    assert apply_rules(Rewriter(state), RULES) == 0
    assert {refusal.reason for refusal in state.refusals.values()} == {"a scale or zero point is not a constant"}
