"""Constant Add, Sub, Mul and Div fold into weights, or become as few Add and Mul as possible."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
import pytest
from qcompiler_passes import fold_bias
from qcompiler_passes.fold_bias import FoldBias

from qcompiler.rewrite import Rewriter
from qcompiler.text import format_graph
from tests.support import TEST_TARGET, assert_same_function, model_from_text, ops_of, run_passes, state_of

RNG = np.random.default_rng(11)
IMAGE = "float[1,3,5,5]"


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CONSTANTS = {
    "w": normal(4, 3, 1, 1),
    "w3": normal(4, 3, 3, 3),
    "wd": normal(3, 1, 3, 3),
    "wt": normal(3, 4, 2, 2),
    "bias": normal(4),
    "c4": normal(4, 1, 1) + 3,
    "d4": normal(1, 4, 1, 1) - 3,
    "c3": normal(3, 1, 1) + 3,
    "k": np.float32(2.5),
    "zero": np.float32(0),
    "one": np.ones((1, 1, 1), np.float32),
    "big": normal(5, 5),
    "zeros4": np.array([1, 0, 2, 3], np.float32).reshape(4, 1, 1),
    "m": normal(3, 6),
    "row": normal(6) + 3,
    "row3": normal(3) + 3,
    "inf": np.float32(np.inf),
}


def folded(
    text: str, constants: Mapping[str, np.ndarray] = CONSTANTS, shapes: bool = True, rtol: float = 1e-4
) -> onnx.ModelProto:
    """The model after the pass, which keeps the function and has nothing left to do; `shapes`: inner shapes are known."""
    model = model_from_text(text, {k: v for k, v in constants.items() if f"{k}" in text})
    model = onnx.shape_inference.infer_shapes(model) if shapes else model
    after, state = run_passes(model, FoldBias())
    assert_same_function(model, after, rtol=rtol)
    assert FoldBias().run(state) == 0
    return after


def image(body: str, channels: int = 4, size: int = 5) -> str:
    return f"g ({IMAGE} x) => (float[1,{channels},{size},{size}] y) {{\n{body}\n}}"


@pytest.mark.parametrize("conv", ["Conv(x, w)", "Conv(x, w, bias)", "Conv<pads=[1,1,1,1]>(x, w3)"])
@pytest.mark.parametrize(
    "step",
    [
        "Add(a, c4)",
        "Add(c4, a)",
        "Sub(a, d4)",
        "Sub(d4, a)",
        "Mul(a, c4)",
        "Mul(zeros4, a)",
        "Div(a, d4)",
        "Add(a, k)",
        "Mul(k, a)",
        "Mul(a, zero)",
    ],
)
@pytest.mark.parametrize("shapes", [False, True])
def test_into_conv_before(conv: str, step: str, shapes: bool) -> None:
    assert ops_of(folded(image(f"a = {conv}\n y = {step}"), shapes=shapes)) == ["Conv"]


@pytest.mark.parametrize("step", ["Add(a, c4)", "Sub(d4, a)", "Mul(a, c4)", "Div(a, k)"])
def test_into_conv_transpose_before(step: str) -> None:
    assert ops_of(folded(image(f"a = ConvTranspose(x, wt)\n y = {step}", size=6))) == ["ConvTranspose"]


@pytest.mark.parametrize("step", ["Add(a, row)", "Sub(row, a)", "Mul(a, row)", "Div(a, k)", "Sub(a, k)"])
@pytest.mark.parametrize("attrs", ["", "<alpha=2.0, beta=0.5>"])
def test_into_gemm_before(step: str, attrs: str) -> None:
    text = f"g (float[2,3] x) => (float[2,6] y) {{\n a = Gemm{attrs}(x, m, row)\n y = {step}\n}}"
    assert ops_of(folded(text)) == ["Gemm"]


@pytest.mark.parametrize("dims", ["3", "2,3", "4,2,3"])
@pytest.mark.parametrize(
    ("steps", "ops"),
    [
        ("y = Mul(a, row)", ["MatMul"]),
        ("y = Div(a, k)", ["MatMul"]),
        ("y = Add(a, row)", ["MatMul", "Add"]),
        ("y = Sub(a, row)", ["MatMul", "Add"]),
        ("y = Sub(row, a)", ["MatMul", "Add"]),
        ("s = Add(a, row)\n y = Mul(s, k)", ["MatMul", "Add"]),
        ("s = Mul(a, row)\n t = Add(s, row)\n y = Div(t, k)", ["MatMul", "Add"]),
    ],
)
def test_matmul_takes_scales_and_keeps_an_add(dims: str, steps: str, ops: list[str]) -> None:
    result = ",".join([*dims.split(",")[:-1], "6"])
    assert ops_of(folded(f"g (float[{dims}] x) => (float[{result}] y) {{\n a = MatMul(x, m)\n {steps}\n}}")) == ops


@pytest.mark.parametrize(
    ("steps", "conv", "ops"),
    [
        ("s = Sub(x, c3)\n a = Div(s, c3)", "Conv(a, w3)", ["Conv"]),
        ("a = Mul(x, c3)", "Conv<pads=[1,1,1,1]>(a, w3, bias)", ["Conv"]),
        ("a = Div(x, k)", 'Conv<auto_pad="SAME_UPPER">(a, w3)', ["Conv"]),
        ("a = Add(x, c3)", 'Conv<auto_pad="VALID">(a, w3)', ["Conv"]),
        ("a = Add(x, c3)", "Conv<group=3>(a, wd)", ["Conv"]),
        ("a = Add(x, c3)", "Conv<pads=[0,0,1,0]>(a, w3)", ["Add", "Conv"]),
        ("s = Sub(x, big)\n a = Div(s, c3)", "Conv<pads=[0,0,1,0]>(a, w3)", ["Add", "Conv"]),
        ("s = Sub(x, c3)\n a = Div(s, c3)", "Conv<pads=[0,0,1,0]>(a, w3)", ["Add", "Conv"]),
        ("s = Div(x, k)\n a = Sub(s, one)", "Conv<pads=[0,0,1,0]>(a, w3)", ["Add", "Conv"]),
    ],
)
def test_into_conv_after(steps: str, conv: str, ops: list[str]) -> None:
    text = f"g ({IMAGE} x) => (float[1,n,h,v] y) {{\n {steps}\n y = {conv}\n}}"
    assert ops_of(folded(text)) == ops


def test_scales_that_differ_much_stay_behind_a_shift() -> None:
    text = image("s = Mul(x, spread)\n a = Add(s, c3)\n y = Conv<pads=[1,1,1,1]>(a, w3)")
    constants = CONSTANTS | {"spread": np.array([1, 1, 9], np.float32).reshape(3, 1, 1)}
    assert ops_of(folded(text, constants)) == ["Mul", "Add", "Conv"]


def test_into_all_matrix_products_after() -> None:
    text = """g (float[2,3] x) => (float[2,6] y, float[2,6] z) {
        s = Mul(x, row3)
        a = Add(s, row3)
        y = Gemm<alpha=2.0>(a, m)
        z = MatMul(a, m)
    }"""
    assert sorted(ops_of(folded(text))) == ["Add", "Gemm", "MatMul"]


def test_a_shift_before_a_matmul_of_rank_three() -> None:
    text = "g (float[2,4,3] x) => (float[2,4,6] y) {\n a = Add(x, row3)\n y = MatMul(a, m)\n}"
    assert ops_of(folded(text)) == ["MatMul", "Add"]


@pytest.mark.parametrize("step", ["Mul(a, k)", "Div(a, k)", "Sub(k, a)"])
def test_one_number_folds_through_what_only_moves(step: str) -> None:
    text = f"""g (float[2,5,3] x) => (float[2,2,5,3] y) {{
        p = MatMul(x, m)
        s = Add(p, row)
        r = Reshape(s, heads)
        a = Transpose<perm=[0,2,1,3]>(r)
        y = {step}
    }}"""
    after = folded(text, CONSTANTS | {"heads": np.array([2, 5, 2, 3])})
    assert ops_of(after) == ["MatMul", "Add", "Reshape", "Transpose"]


def test_a_vector_does_not_fold_through_a_transpose() -> None:
    text = "g (float[2,3] x) => (float[6,2] y) {\n a = Gemm(x, m)\n t = Transpose<perm=[1,0]>(a)\n y = Mul(t, pair)\n}"
    assert ops_of(folded(text, CONSTANTS | {"pair": normal(2)})) == ["Gemm", "Transpose", "Mul"]


def test_a_matmul_bias_does_not_move_into_the_next_matmul() -> None:
    text = """g (float[2,3] x) => (float[2,6] y) {
        a = MatMul(x, m)
        s = Add(a, row)
        y = MatMul(s, square)
    }"""
    assert ops_of(folded(text, CONSTANTS | {"square": normal(6, 6)})) == ["MatMul", "Add", "MatMul"]


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("y = Sub(r, c3)", ["Relu", "Add"]),
        ("y = Div(r, k)", ["Relu", "Mul"]),
        ("a = Mul(r, c3)\n y = Mul(k, a)", ["Relu", "Mul"]),
        ("a = Add(r, c3)\n y = Sub(a, big)", ["Relu", "Add", "Add"]),
        ("a = Add(r, c3)\n y = Sub(a, k)", ["Relu", "Add"]),
        ("a = Mul(r, k)\n b = Add(a, c3)\n y = Div(b, c3)", ["Relu", "Mul", "Add"]),
        ("a = Add(r, k)\n y = Sub(a, k)", ["Relu"]),
        ("a = Mul(r, one)\n b = Add(a, zero)\n y = Pow(b, one)", ["Relu"]),
        ("y = Sub(k, r)", ["Relu", "Sub"]),
        ("a = Sub(k, r)\n y = Div(a, c3)", ["Relu", "Mul", "Add"]),
        ("y = Pow(r, k)", ["Relu", "Pow"]),
        ("y = Div(k, r)", ["Relu", "Div"]),
        ("y = Mul(r, r)", ["Relu", "Mul"]),
    ],
)
def test_what_cannot_fold_becomes_simple(body: str, ops: list[str]) -> None:
    text = image(f"n = Abs(x)\n p = Add(n, k)\n r = Relu(p)\n{body}", channels=3)
    assert ops_of(folded(text)) == ["Abs", "Add", *ops]


def test_shapes_that_constants_widen_stay() -> None:
    text = "g (float[1,3] x) => (float[2,3] y, float[1,1,3] z) {\n r = Relu(x)\n y = Mul(r, tall)\n z = Add(r, thin)\n}"
    constants = {"tall": np.ones((2, 1), np.float32), "thin": np.zeros((1, 1, 1), np.float32)}
    assert ops_of(folded(text, constants)) == ["Relu", "Mul", "Add"]
    wide = "g (float[1,1,5,5] x) => (float[1,4,5,5] y) {\n a = Mul(x, c3)\n y = Conv(a, w)\n}"
    assert ops_of(folded(wide)) == ["Mul", "Conv"]
    single = "g (float[1,3,5,5] x) => (float[1,4,5,5] y) {\n a = Conv(x, u)\n y = Add(a, c4)\n}"
    assert ops_of(folded(single, {"u": normal(1, 3, 1, 1), "c4": normal(4, 1, 1)})) == ["Conv", "Add"]


def test_integers_stay() -> None:
    text = "g (int64[2,3] x) => (int64[2,3] y) {\n a = Sub(x, i)\n y = Div(a, i)\n}"
    assert ops_of(folded(text, {"i": np.array([2, 3, 4])})) == ["Sub", "Div"]


def test_shared_weights_are_copied() -> None:
    text = f"g ({IMAGE} x) => (float[1,4,5,5] y, float[1,4,5,5] z) {{\n a = Conv(x, w)\n y = Mul(a, c4)\n z = Conv(x, w)\n}}"
    assert ops_of(folded(text)) == ["Conv", "Conv"]


@pytest.mark.parametrize(
    ("body", "reason", "culprit"),
    [
        ("a = Conv(x, w)\n s = Add(a, c4)\n y = Mul(a, s)", "the result of Conv is also read elsewhere", "a"),
        ("r = Relu(x)\n a = Conv(r, w)\n y = Add(a, big)", "not one value per channel of Conv", ""),
        ("a = Conv(x, w)\n y = Div(a, zero)", "divides by zero", ""),
        ("a = Conv(x, w)\n y = Add(a, inf)", "not a finite float", ""),
        ("a = Conv(x, w)\n s = Relu(a)\n y = Add(s, c4)", "Relu has no weights to fold into", ""),
    ],
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, body: str, reason: str, culprit: str) -> None:
    seen: list[Rewriter] = []
    apply = fold_bias.apply_rules
    monkeypatch.setattr(fold_bias, "apply_rules", lambda rw, rules: (seen.append(rw), apply(rw, rules))[1])
    state = state_of(model_from_text(image(body), CONSTANTS))
    before = format_graph(state.graph)
    assert FoldBias().run(state) == 0
    assert format_graph(state.graph) == before
    found = next(r for r in seen[0].refusals.values() if reason in r.reason)
    assert found.culprit
    assert culprit in ("", found.culprit)


def test_refuses_a_reader_in_a_subgraph() -> None:
    text = f"""g ({IMAGE} x, bool p) => (float[1,4,5,5] y) {{
        s = Add(x, c3)
        y = If(p) <
            then_branch = t () => (float[1,4,5,5] i) {{ i = Conv(s, w) }},
            else_branch = e () => (float[1,4,5,5] j) {{ j = Conv(x, w) }}
        >
    }}"""
    state = state_of(model_from_text(text, CONSTANTS))
    assert FoldBias().run(state) == 0
    assert [n.op for n in state.graph.nodes] == ["Add", "If"]


SUB_AS_ADD = replace(TEST_TARGET, rewrites=frozenset({"sub-as-add"}))


@pytest.mark.parametrize("expression", ["Sub(x, z)", "Sub(z, x)", "Sub(c, x)", "Sub(x, x)"])
def test_sub_becomes_neg_and_add_where_the_target_asks(expression: str) -> None:
    text = f"g (float[2,3] x, float[2,3] z) => (float[2,3] y) {{\n t = Tanh(x)\n y = {expression.replace('x', 't')}\n}}"
    model = model_from_text(text, {"c": np.float32(0.5)})
    kept, _ = run_passes(onnx.shape_inference.infer_shapes(model), FoldBias())
    assert ops_of(kept) == ["Tanh", "Sub"]
    after, state = run_passes(onnx.shape_inference.infer_shapes(model), FoldBias(), target=SUB_AS_ADD)
    assert ops_of(after) == ["Tanh", "Neg", "Add"]
    assert_same_function(model, after)
    assert FoldBias().run(state) == 0


def test_integer_sub_stays() -> None:
    model = model_from_text("g (int64[3] x, int64[3] z) => (int64[3] y) { y = Sub(x, z) }")
    after, _ = run_passes(model, FoldBias(), target=SUB_AS_ADD)
    assert ops_of(after) == ["Sub"]
