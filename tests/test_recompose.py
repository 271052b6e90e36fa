from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from qcompiler_passes.recompose import RULES, Recompose

from qcompiler.rewrite import Rewriter, apply_rules
from qcompiler.state import CompileState
from tests.support import TEST_TARGET, assert_same_function, model_from_text, ops_of, run_passes, state_of

ALL = replace(TEST_TARGET, rewrites=frozenset({"QuickGelu", "channel-shuffle"}))


def _model(body: str, shape: str = "2,3,4,8", opset: int = 17, **arrays: np.ndarray | float) -> onnx.ModelProto:
    """A graph of x; numbers and arrays are float32 initializers, integer arrays int64."""
    constants = {
        k: np.asarray(v, np.int64 if np.asarray(v).dtype.kind == "i" else np.float32) for k, v in arrays.items()
    }
    model = model_from_text(f"g (float[{shape}] x) => (float y) {{ {body} }}", constants, opset)
    for i, node in enumerate(model.graph.node):
        node.name = f"n{i}"
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model)


def _check(model: onnx.ModelProto, ops: list[str], target=ALL) -> tuple[onnx.ModelProto, CompileState]:
    after, state = run_passes(model, Recompose(), target=target)
    assert ops_of(after) == ops
    assert_same_function(model, after)
    assert Recompose().run(state) == 0
    return after, state


def _refusals(model: onnx.ModelProto, target=ALL) -> dict[str, str]:
    """Refusals with a culprit, after checking that nothing changes."""
    after, _ = run_passes(model, Recompose(), target=target)
    assert ops_of(after) == ops_of(model)
    rewriter = Rewriter(state_of(model, target))
    assert apply_rules(rewriter, RULES) == 0
    return {name: f"{r.reason}: {r.culprit}" for name, r in rewriter.refusals.items() if r.culprit}


def _attributes(model: onnx.ModelProto) -> dict[str, object]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in model.graph.node[0].attribute}


@pytest.mark.parametrize(
    "body",
    [
        "a = Max(x, lo) y = Min(a, hi)",
        "a = Max(lo, x) y = Min(hi, a)",
        "a = Min(x, hi) y = Max(a, lo)",
        "a = Clip(x, lo) y = Min(a, hi)",
        "a = Clip(x, , hi) y = Clip(a, lo)",
        "a = Clip(x, lo, hi) y = Clip(a, wide_lo, wide_hi)",
    ],
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_clip(body: str, shape: tuple[int, ...]) -> None:
    def full(number: float) -> np.ndarray:
        return np.full(shape if "Clip" not in body else (), number)

    model = _model(body, lo=full(-0.5), hi=full(0.75), wide_lo=full(-2.0), wide_hi=full(2.0))
    _check(model, ["Clip"])


@pytest.mark.parametrize(
    "body",
    ["y = Max(x, zero)", "y = Max(zero, x)", "y = Clip(x, zero)", "y = Clip(x, zero, inf)", "a = Relu(x) y = Relu(a)"],
)
def test_relu(body: str) -> None:
    _check(_model(body, zero=0.0, inf=np.inf), ["Relu"])


@pytest.mark.parametrize(
    "body", ["a = Relu(x) y = Min(a, six)", "a = Relu(x) y = Clip(a, , six)", "a = Min(x, six) y = Relu(a)"]
)
def test_relu6(body: str) -> None:
    after, state = _check(_model(body, six=0.6), ["Clip"])
    assert sorted(state.origin[after.graph.node[0].name]) == ["n0", "n1"]


@pytest.mark.parametrize("body", ["a = Max(x, lo) y = Min(a, below)", "a = Min(x, below) y = Max(a, lo)"])
def test_crossed_bounds(body: str) -> None:
    _check(_model(body, lo=0.5, below=-0.5), ["Clip"])


@pytest.mark.parametrize(
    "body",
    [
        "y = Clip(x, lo, hi)",
        "y = Relu(x)",
        "y = Max(x, many)",
        "y = Clip(x, hi, lo)",
        "y = Max(x, x, lo)",
        "y = Min(x, wide)",
    ],
)
def test_clamps_that_stay(body: str) -> None:
    model = _model(body, lo=0.0, hi=1.0, many=np.arange(8.0), wide=np.zeros((1, 1, 1, 1, 1)))
    assert _refusals(model) == {}


def test_shared_clamp_stays() -> None:
    _check(_model("a = Relu(x) b = Clip(a, , six) y = Sub(a, b)", six=0.5), ["Relu", "Clip", "Sub"])


@pytest.mark.parametrize(
    "body", ["a = Mul(x, k) y = Max(x, a)", "a = Mul(k, x) y = Max(a, x)", "a = Div(x, inverse) y = Max(x, a)"]
)
def test_leaky_relu(body: str) -> None:
    after, _ = _check(_model(body, k=0.1, inverse=10.0), ["LeakyRelu"])
    assert _attributes(after)["alpha"] == pytest.approx(0.1)


@pytest.mark.parametrize("slope", [1.5, -0.25])
def test_not_leaky_relu(slope: float) -> None:
    assert _refusals(_model("a = Mul(x, k) y = Max(x, a)", k=slope)) == {}


@pytest.mark.parametrize("slope", [np.full((3, 1, 1), 0.25), np.array([0.3]), np.full((3, 1, 1), -0.5)])
def test_prelu_with_one_slope(slope: np.ndarray) -> None:
    _check(_model("y = PRelu(x, slope)", slope=slope), ["LeakyRelu"])


def test_prelu_with_many_slopes_stays() -> None:
    model = _model("y = PRelu(x, slope)", slope=np.arange(3.0).reshape(3, 1, 1))
    assert _refusals(model) == {"n0": "the channels have slopes of their own: slope"}


HARD_SIGMOID = [
    "a = Add(x, b3) c = Clip(a, b0, b6) y = Div(c, b6)",
    "a = Add(b3, x) c = Clip(a, b0, b6) y = Mul(c, sixth)",
    "a = Sub(x, minus3) c = Clip(a, b0, b6) y = Mul(sixth, c)",
    "a = Add(x, b3) r = Relu(a) c = Min(r, b6) y = Div(c, b6)",
    "a = Add(x, b3) r = Max(b0, a) c = Min(b6, r) y = Div(c, b6)",
    "a = Mul(x, sixth) b = Add(a, half) y = Clip(b, b0, b1)",
    "a = Div(x, b6) b = Add(half, a) y = Clip(b, b0, b1)",
    "a = Add(x, b3) b = Div(a, b6) y = Clip(b, b0, b1)",
]
NUMBERS = {"b0": 0.0, "b1": 1.0, "b3": 3.0, "b6": 6.0, "minus3": -3.0, "sixth": 0.1666667, "half": 0.5}


@pytest.mark.parametrize("body", HARD_SIGMOID)
def test_hard_sigmoid(body: str) -> None:
    model = _model(body, **NUMBERS)
    after, state = _check(model, ["HardSigmoid"])
    assert _attributes(after) == pytest.approx({"alpha": 1 / 6, "beta": 0.5}, rel=1e-4)
    assert sorted(state.origin[after.graph.node[0].name]) == [n.name for n in model.graph.node]


def test_falling_hard_sigmoid() -> None:
    after, _ = _check(_model("a = Sub(half, x) y = Clip(a, b0, b1)", **NUMBERS), ["HardSigmoid"])
    assert _attributes(after) == {"alpha": -1.0, "beta": 0.5}


@pytest.mark.parametrize(
    "body",
    [
        "y = Clip(x, b0, b1)",
        "a = Add(x, b3) c = Clip(a, b0, b6) y = Mul(c, half)",
        "a = Add(x, b3) c = Clip(a, half, b6) y = Div(c, b6)",
        "a = Add(x, b3) r = Mul(a, a) y = Clip(r, b0, b1)",
    ],
)
def test_not_hard_sigmoid(body: str) -> None:
    assert _refusals(_model(body, **NUMBERS)) == {}


def test_shared_inner_result_stays() -> None:
    model = _model("a = Add(x, b3) c = Clip(a, b0, b6) d = Div(c, b6) y = Add(d, c)", **NUMBERS)
    assert _refusals(model) == {"n2": "something else reads a result inside the pattern: c"}


def test_graph_output_inside_stays() -> None:
    model = _model("a = Add(x, b3) c = Clip(a, b0, b6) y = Div(c, b6)", **NUMBERS)
    model.graph.output.append(onnx.helper.make_tensor_value_info("c", 1, [2, 3, 4, 8]))
    assert _refusals(model) == {"n2": "something else reads a result inside the pattern: c"}


def test_doubles_stay() -> None:
    text = "g (double[4] x) => (double[4] y) { y = Max(x, zero) }"
    model = model_from_text(text, {"zero": np.zeros((), np.float64)})
    after, _ = run_passes(model, Recompose(), target=ALL)
    assert ops_of(after) == ["Max"]


GATE = "a = Add(x, b3) c = Clip(a, b0, b6) "


@pytest.mark.parametrize(
    "body",
    [
        GATE + "d = Div(c, b6) y = Mul(x, d)",
        GATE + "d = Mul(c, sixth) y = Mul(d, x)",
        GATE + "d = Mul(x, c) y = Div(d, b6)",
        GATE + "d = Mul(c, x) y = Mul(sixth, d)",
        GATE + "d = Div(x, b6) y = Mul(d, c)",
        GATE + "d = Mul(sixth, x) y = Mul(c, d)",
        "a = Add(x, b3) r = Relu(a) c = Min(r, b6) d = Mul(x, c) y = Div(d, b6)",
        "h = HardSigmoid<alpha = 0.1666667, beta = 0.5>(x) y = Mul(x, h)",
        "h = HardSigmoid<alpha = 0.16666667>(x) y = Mul(h, x)",
        "a = Div(x, b6) h = HardSigmoid<alpha = 1.0>(a) y = Mul(h, x)",
        "a = Div(x, b6) b = Add(a, half) c = Clip(b, b0, b1) y = Mul(c, x)",
    ],
)
def test_hard_swish(body: str) -> None:
    model = _model(body, **NUMBERS)
    after, state = _check(model, ["HardSwish"])
    assert sorted(state.origin[after.graph.node[0].name]) == [n.name for n in model.graph.node]


def test_hard_swish_of_a_product() -> None:
    body = "z = Mul(x, half) " + (GATE + "d = Mul(x, c) y = Div(d, b6)").replace("x", "z")
    _check(_model(body, **NUMBERS), ["Mul", "HardSwish"])


def test_trailing_factor_stays_outside() -> None:
    _check(_model(GATE + "d = Mul(x, c) e = Div(d, b6) y = Mul(e, half)", **NUMBERS), ["HardSwish", "Mul"])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("h = HardSigmoid<alpha = 0.2, beta = 0.5>(x) y = Mul(x, h)", "alpha=0.2, beta=0.5"),
        ("h = HardSigmoid<alpha = 0.1666667, beta = 0.4>(x) y = Mul(x, h)", "beta=0.4"),
        ("h = HardSigmoid<alpha = 0.1666667>(x) g = Mul(h, half) y = Mul(x, g)", "goes to 0.5"),
        ("a = Add(x, b3) c = Clip(a, half, b6) d = Div(c, b6) y = Mul(x, d)", "does not start at 0"),
    ],
)
def test_not_hard_swish(body: str, reason: str) -> None:
    (found,) = _refusals(_model(body, **NUMBERS)).values()
    assert reason in found


def test_gate_of_another_tensor_stays() -> None:
    assert _refusals(_model("z = Neg(x) h = HardSigmoid<alpha = 0.1666667>(z) y = Mul(x, h)")) == {}


def test_hard_swish_needs_opset_14() -> None:
    model = _model("h = HardSigmoid<alpha = 0.1666667>(x) y = Mul(x, h)", opset=13)
    assert _refusals(model) == {"n1": "HardSwish needs opset 14: n1"}


@pytest.mark.parametrize(
    ("body", "alpha"),
    [
        ("s = Sigmoid(x) y = Mul(x, s)", 1.0),
        ("s = Sigmoid(x) y = Mul(s, x)", 1.0),
        ("a = Mul(x, k) s = Sigmoid(a) y = Mul(x, s)", 1.702),
        ("a = Mul(k, x) s = Sigmoid(a) y = Mul(s, x)", 1.702),
        ("a = Mul(x, k) t = Tanh(a) b = Add(t, one) c = Mul(b, half) y = Mul(x, c)", 3.404),
    ],
)
def test_silu(body: str, alpha: float) -> None:
    model = _model(body, k=np.array([1.702]), one=1.0, half=0.5)
    after, _ = _check(model, ["QuickGelu"])
    assert after.graph.node[0].domain == "com.microsoft"
    assert _attributes(after)["alpha"] == pytest.approx(alpha)


def test_silu_needs_a_target_that_asks() -> None:
    model = _model("s = Sigmoid(x) y = Mul(x, s)")
    assert _refusals(model, TEST_TARGET) == {"n1": "target test does not ask for QuickGelu: n0"}


@pytest.mark.parametrize(
    "body", ["a = Add(x, k) s = Sigmoid(a) y = Mul(x, s)", "s = Sigmoid(x) a = Add(s, k) y = Mul(x, a)"]
)
def test_not_silu(body: str) -> None:
    (found,) = _refusals(_model(body, k=1.0)).values()
    assert "x * Sigmoid(a * x)" in found


def test_squeeze_and_excite_stays() -> None:
    body = "m = GlobalAveragePool(x) s = Sigmoid(m) y = Mul(x, s)"
    assert _refusals(_model(body)) == {}


ERF = "a = Div(x, root2) e = Erf(a) b = Add(e, one) "


@pytest.mark.parametrize(
    "body",
    [
        ERF + "c = Mul(x, b) y = Mul(c, half)",
        ERF + "c = Mul(b, x) y = Mul(half, c)",
        ERF + "c = Mul(x, b) y = Div(c, two)",
        ERF + "c = Mul(x, half) y = Mul(c, b)",
        ERF + "c = Mul(half, x) y = Mul(b, c)",
        ERF + "c = Mul(half, b) y = Mul(x, c)",
        ERF + "c = Div(b, two) y = Mul(c, x)",
        "a = Mul(x, inverse) e = Erf(a) b = Add(one, e) c = Mul(b, half) y = Mul(x, c)",
        "a = Mul(inverse, x) e = Erf(a) h = Mul(e, half) b = Add(h, half) y = Mul(x, b)",
    ],
)
@pytest.mark.parametrize("opset", [17, 20])
def test_gelu(body: str, opset: int) -> None:
    model = _model(body, opset=opset, root2=1.4142135, inverse=0.70710677, one=1.0, two=2.0, half=np.array([0.5]))
    after, state = _check(model, ["Gelu"])
    assert after.graph.node[0].domain == ("" if opset == 20 else "com.microsoft")
    assert sorted(state.origin[after.graph.node[0].name]) == ["n0", "n1", "n2", "n3", "n4"]


@pytest.mark.parametrize("name", ["root2", "one", "half"])
def test_not_gelu(name: str) -> None:
    numbers = {"root2": math.sqrt(2), "one": 1.0, "half": 0.5}
    numbers[name] *= 1.01
    found = _refusals(_model(ERF + "c = Mul(x, b) y = Mul(c, half)", **numbers))
    assert any("Erf" in reason for reason in found.values())


TANH = "t = Tanh(g) b = Add(t, one) c = Mul(x, b) y = Mul(c, half)"


@pytest.mark.parametrize(
    "body",
    [
        "p = Pow(x, three) q = Mul(p, k) r = Add(x, q) g = Mul(r, s) ",
        "p = Pow(x, int_three) q = Mul(k, p) r = Add(q, x) g = Mul(s, r) ",
        "x2 = Mul(x, x) x3 = Mul(x2, x) q = Mul(x3, k) r = Add(x, q) g = Mul(r, s) ",
        "kx = Mul(k, x) kx2 = Mul(kx, x) p = Add(kx2, one) sx = Mul(s, x) g = Mul(sx, p) ",
    ],
)
@pytest.mark.parametrize("opset", [17, 20])
def test_tanh_gelu(body: str, opset: int) -> None:
    numbers = {"k": 0.044715, "s": 0.7978846, "one": 1.0, "half": 0.5, "three": 3.0, "int_three": 3}
    after, _ = _check(_model(body + TANH, opset=opset, **numbers), ["Gelu" if opset == 20 else "FastGelu"])
    assert _attributes(after) == ({"approximate": b"tanh"} if opset == 20 else {})


def test_not_tanh_gelu() -> None:
    body = "p = Pow(x, three) q = Mul(p, k) r = Add(x, q) g = Mul(r, s) " + TANH
    found = _refusals(_model(body, k=0.05, s=0.7978846, one=1.0, half=0.5, three=3.0))
    assert "it is not the Tanh form of GELU" in found["n7"]


GAMMA, BETA = np.linspace(0.5, 1.5, 8), np.linspace(-1.0, 1.0, 8)
CENTRED = "m = ReduceMean<axes = [-1]>(x) d = Sub(x, m) "
SQUARE = "p = Pow(d, two) "
VARIANCE = "v = ReduceMean<axes = [-1]>(p) e = Add(v, eps) "


@pytest.mark.parametrize(
    "body",
    [
        CENTRED + SQUARE + VARIANCE + "s = Sqrt(e) y = Div(d, s)",
        CENTRED + "p = Mul(d, d) v = ReduceMean<axes = [3]>(p) e = Add(eps, v) s = Sqrt(e) y = Div(d, s)",
        CENTRED + "d2 = Sub(x, m) p = Pow(d2, two) " + VARIANCE + "s = Sqrt(e) y = Div(d, s)",
        CENTRED
        + "m2 = ReduceMean<axes = [3]>(x) d2 = Sub(x, m2) p = Pow(d2, two) "
        + VARIANCE
        + "s = Sqrt(e) y = Div(d, s)",
        CENTRED + SQUARE + VARIANCE + "s = Pow(e, half) y = Div(d, s)",
        CENTRED + SQUARE + VARIANCE + "s = Sqrt(e) r = Reciprocal(s) y = Mul(d, r)",
        CENTRED + SQUARE + VARIANCE + "s = Sqrt(e) r = Div(one, s) y = Mul(r, d)",
    ],
)
def test_layer_normalization_core(body: str) -> None:
    model = _model(body, two=2.0, half=0.5, one=1.0, eps=np.array([1e-3]))
    after, state = _check(model, ["LayerNormalization"])
    assert _attributes(after) == pytest.approx({"axis": -1, "epsilon": 1e-3})
    assert sorted(state.origin[after.graph.node[0].name]) == [n.name for n in model.graph.node]


LAYER_NORM = CENTRED + SQUARE + VARIANCE + "s = Sqrt(e) z = Div(d, s) "


@pytest.mark.parametrize(
    ("tail", "inputs"),
    [
        ("w = Mul(z, gamma) y = Add(w, beta)", 3),
        ("w = Mul(gamma, z) y = Add(beta, w)", 3),
        ("y = Mul(z, gamma)", 2),
        ("y = Add(z, beta)", 3),
        ("w = Mul(z, deep) y = Add(w, one)", 3),
        ("w = Add(z, beta) y = Mul(w, gamma)", 3),
    ],
)
def test_layer_normalization_affine(tail: str, inputs: int) -> None:
    model = _model(LAYER_NORM + tail, two=2.0, eps=1e-5, one=1.0, gamma=GAMMA, beta=BETA, deep=GAMMA.reshape(1, 1, 8))
    after, _ = _check(model, ["LayerNormalization"])
    assert len(after.graph.node[0].input) == inputs


def test_layer_normalization_with_axes_as_input() -> None:
    body = (CENTRED + SQUARE + VARIANCE + "s = Sqrt(e) y = Div(d, s)").replace("<axes = [-1]>", "")
    body = body.replace("ReduceMean(x)", "ReduceMean(x, last)").replace("ReduceMean(p)", "ReduceMean(p, last)")
    _check(_model(body, "N,S,8", opset=18, two=2.0, eps=1e-5, last=np.array([-1])), ["LayerNormalization"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("axes = [-1]", "axes = [2]"),
        ("axes = [-1]", "axes = [2, 3]"),
        ("two", "three"),
        ("Div(d, s)", "Div(s, d)"),
        ("Div(d, s)", "Div(x, s)"),
        ("Add(v, eps)", "Sub(v, eps)"),
    ],
)
def test_not_layer_normalization(old: str, new: str) -> None:
    body = (CENTRED + SQUARE + VARIANCE + "s = Sqrt(e) y = Div(d, s)").replace(old, new)
    assert _refusals(_model(body, two=2.0, three=3.0, eps=1e-5)) == {}


CHANNEL_NORM = (CENTRED + SQUARE + VARIANCE + "s = Sqrt(e) z = Div(d, s) ").replace("axes = [-1]", "axes = [1]")
CHANNELS = replace(ALL, rewrites=frozenset({"channel-norm-as-layer-norm"}))


@pytest.mark.parametrize("tail", ["u = Mul(gamma, z) y = Add(u, beta)", "u = Mul(z, gamma) y = Add(beta, u)"])
@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 3, 1, 1)])
def test_layer_normalization_over_channels(tail: str, shape: tuple[int, ...]) -> None:
    arrays = {"gamma": np.arange(1.0, 4).reshape(shape), "beta": np.arange(3.0).reshape(shape)}
    model = _model(CHANNEL_NORM + tail, two=2.0, eps=1e-5, **arrays)
    after, _ = _check(model, ["Transpose", "LayerNormalization", "Transpose"], CHANNELS)
    assert len(after.graph.node[1].input) == 3
    refusals = _refusals(model)
    assert [r.split(":")[0] for r in refusals.values()] == ["target test does not ask for channel-norm-as-layer-norm"]


@pytest.mark.parametrize("constant", [np.arange(8.0), np.ones((3, 4, 1)), np.ones((3, 1, 8)), np.ones((4, 1))])
def test_constants_along_other_axes_stay_behind_a_norm_over_channels(constant: np.ndarray) -> None:
    model = _model(CHANNEL_NORM + "y = Mul(z, k)", two=2.0, eps=1e-5, k=constant)
    _check(model, ["Transpose", "LayerNormalization", "Transpose", "Mul"], CHANNELS)


TENSORFLOW = (
    "m = ReduceMean<axes = [-1]>(x) d = Sub(x, m) p = Mul(d, d) v = ReduceMean<axes = [-1]>(p) e = Add(v, eps) "
    "s = Sqrt(e) r = Reciprocal(s) g = Mul(r, gamma) a = Mul(x, g) b = Mul(m, g) c = Sub(beta, b) y = Add(a, c)"
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("Add(a, c)", "Add(c, a)"),
        ("Mul(r, gamma) a = Mul(x, g) b = Mul(m, g)", "Mul(gamma, r) a = Mul(g, x) b = Mul(g, m)"),
        ("r = Reciprocal(s)", "r = Div(one, s)"),
        ("g = Mul(r, gamma) a = Mul(x, g) b = Mul(m, g)", "a = Mul(x, r) b = Mul(m, r)"),
    ],
)
def test_layer_normalization_as_tensorflow_writes_it(old: str, new: str) -> None:
    model = _model(TENSORFLOW.replace(old, new), eps=1e-3, one=1.0, gamma=GAMMA, beta=BETA)
    after, _ = _check(model, ["LayerNormalization"])
    assert len(after.graph.node[0].input) == 3


@pytest.mark.parametrize(
    ("old", "new"),
    [("Sub(beta, b)", "Sub(b, beta)"), ("Mul(m, g)", "Mul(m, r)"), ("Mul(x, g)", "Mul(d, g)")],
)
def test_not_layer_normalization_of_tensorflow(old: str, new: str) -> None:
    assert _refusals(_model(TENSORFLOW.replace(old, new), eps=1e-3, gamma=GAMMA, beta=BETA)) == {}


def test_constants_of_tensorflow_along_other_axes_stay() -> None:
    model = _model(TENSORFLOW, eps=1e-3, gamma=np.ones((4, 8)), beta=BETA)
    assert _refusals(model) == {"n11": "the scale is not one number per element of the last axis: n11"}


ROOT_MEAN_SQUARE = "p = Pow(x, two) m = ReduceMean(p, last) e = Add(m, eps) s = Sqrt(e) "


@pytest.mark.parametrize(
    "tail",
    [
        "z = Div(x, s) y = Mul(z, gamma)",
        "r = Reciprocal(s) z = Mul(x, r) y = Mul(gamma, z)",
        "r = Div(one, s) z = Mul(r, x) y = Mul(z, gamma)",
    ],
)
def test_rms_normalization(tail: str) -> None:
    constants = {"two": 2.0, "one": 1.0, "eps": 1e-3, "gamma": GAMMA, "last": np.array([-1])}
    after, _ = _check(_model(ROOT_MEAN_SQUARE + tail, opset=23, **constants), ["RMSNormalization"])
    np.testing.assert_allclose(onnx.numpy_helper.to_array(after.graph.initializer[0]), GAMMA, rtol=1e-6)
    refusals = _refusals(_model(ROOT_MEAN_SQUARE + tail, opset=22, **constants))
    assert [r.split(":")[0] for r in refusals.values()] == ["RMSNormalization needs opset 23"]

    asking = replace(ALL, rewrites=frozenset({"RMSNormalization"}))
    after, _ = _check(_model(ROOT_MEAN_SQUARE + tail, opset=18, **constants), ["RMSNormalization"], asking)
    assert after.graph.node[0].domain == "qcompiler"


@pytest.mark.parametrize("tail", ["z = Div(s, x) y = Add(z, gamma)", "z = Div(p, s) y = Mul(z, gamma)"])
def test_not_rms_normalization(tail: str) -> None:
    constants = {"two": 2.0, "eps": 1e-3, "gamma": GAMMA, "last": np.array([-1])}
    assert _refusals(_model(ROOT_MEAN_SQUARE + tail, opset=23, **constants)) == {}


def test_layer_normalization_needs_opset_and_width() -> None:
    body = CENTRED + SQUARE + VARIANCE + "s = Sqrt(e) y = Div(d, s)"
    assert "needs opset 17" in _refusals(_model(body, opset=16, two=2.0, eps=1e-5))["n6"]
    assert _refusals(_model(body, "2,C", two=2.0, eps=1e-5)) == {"n6": "the length of the last axis is not static: x"}


@pytest.mark.parametrize("constant", [np.arange(3.0).reshape(3, 1, 1), np.ones((4, 8)), np.ones((1, 8, 1))])
def test_affine_along_other_axes_stays(constant: np.ndarray) -> None:
    model = _model("n = LayerNormalization<axis = -1>(x, scale) y = Mul(n, k)", "2,3,8,8", scale=GAMMA, k=constant)
    if constant.shape == (4, 8):
        model = _model("n = LayerNormalization<axis = -1>(x, scale) y = Mul(n, k)", "2,3,4,8", scale=GAMMA, k=constant)
    assert list(_refusals(model)) == ["n1"]


SOFTMAX = "m = ReduceMax<axes = [{0}]>(x) d = Sub(x, m) e = Exp(d) s = ReduceSum(e, axes) y = Div(e, s)"


@pytest.mark.parametrize(("axis", "other"), [(-1, 3), (1, 1), (2, -2)])
def test_softmax(axis: int, other: int) -> None:
    _check(_model(SOFTMAX.format(axis), axes=np.array([other])), ["Softmax"])


def test_not_softmax() -> None:
    found = _refusals(_model(SOFTMAX.format(1), axes=np.array([2])))
    assert found == {"n4": "it does not reduce one known axis: n3"}
    found = _refusals(_model("e = Exp(x) s = ReduceSum(e, axes) y = Div(e, s)", axes=np.array([2])))
    assert "large inputs overflow" in found["n2"]


def test_infinite_masks_of_softmax_become_finite() -> None:
    mask = np.triu(np.full((4, 8), -np.inf), 1)
    model = _model("s = Add(x, mask) y = Softmax(s)", mask=mask)
    after, _ = _check(model, ["Add", "Softmax"])
    assert np.isfinite(onnx.numpy_helper.to_array(after.graph.initializer[0])).all()


@pytest.mark.parametrize("body", ["y = Add(x, mask)", "s = Add(x, mask) t = Neg(s) y = Softmax(t)"])
def test_infinite_constants_elsewhere_stay(body: str) -> None:
    assert _refusals(_model(body, mask=np.triu(np.full((4, 8), -np.inf), 1))) == {}


@pytest.mark.parametrize(
    ("shape", "first", "perm", "last"),
    [
        ("2,6,4,5", [2, 2, 3, 4, 5], [0, 2, 1, 3, 4], [2, 6, 4, 5]),
        ("N,6,4,5", [0, 3, 2, 4, 5], [0, 2, 1, 3, 4], [0, 6, 4, 5]),
        ("N,6,4,5", [-1, 3, 2, 4, 5], [0, 2, 1, 3, 4], [-1, 6, 4, 5]),
        ("N,6,4,5", [0, 2, 3, 20], [0, 2, 1, 3], [0, -1, 4, 5]),
        ("1,6,4,5", [3, 2, 20], [1, 0, 2], [1, 6, 4, 5]),
        ("2,6,7", [2, 2, 3, 7], [0, 2, 1, 3], [2, 6, 7]),
    ],
)
def test_channel_shuffle(shape: str, first: list[int], perm: list[int], last: list[int]) -> None:
    body = f"a = Reshape(x, first) b = Transpose<perm = {perm}>(a) y = Reshape(b, last)"
    model = _model(body, shape, first=np.array(first), last=np.array(last))
    after, state = _check(model, ["Gather"])
    assert sorted(state.origin[after.graph.node[0].name]) == ["n0", "n1", "n2"]
    assert list(_refusals(model, TEST_TARGET)) == ["n2"]


PARTS = """a = Reshape(x, first) b = Transpose<perm = [1, 0, 2]>(a) c = Reshape(b, last)
           l = Gather<axis = 0>(c, i0) r = Gather(c, i1) y = """


def test_split_channel_shuffle() -> None:
    shapes = {"first": np.array([3, 2, 20]), "last": np.array([2, -1, 3, 4, 5]), "i0": np.array(0), "i1": np.array(1)}
    model = _model(PARTS + "Sub(l, r)", "1,6,4,5", **shapes)
    after, _ = _check(model, ["Gather", "Gather", "Sub"])
    chosen = [onnx.numpy_helper.to_array(i).tolist() for i in after.graph.initializer]
    assert chosen == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize(
    ("shape", "first", "perm", "last"),
    [
        ("1,6,4,5", [1, 2, 3, 4, 5], [0, 2, 1, 4, 3], [1, 6, 4, 5]),
        ("1,6,4,4", [1, 6, 2, 2, 4], [0, 1, 3, 2, 4], [1, 6, 4, 4]),
        ("1,6,4,5", [1, 2, 3, 4, 5], [0, 2, 1, 3, 4], [1, 3, 8, 5]),
        ("2,6,4,5", [2, 2, 3, 4, 5], [1, 2, 0, 3, 4], [2, 6, 4, 5]),
        ("1,6,4,5", [1, 2, 3, 4, 5], [0, 2, 1, 3, 4], [6, 20]),
    ],
)
def test_not_channel_shuffle(shape: str, first: list[int], perm: list[int], last: list[int]) -> None:
    body = f"a = Reshape(x, first) b = Transpose<perm = {perm}>(a) y = Reshape(b, last)"
    found = _refusals(_model(body, shape, first=np.array(first), last=np.array(last)))
    assert found == {"n2": "it is not a choice of whole channels: n0"}


def test_split_channel_shuffle_with_another_reader_stays() -> None:
    shapes = {"first": np.array([3, 2, 20]), "last": np.array([2, -1, 3, 4, 5]), "i0": np.array(0), "i1": np.array(1)}
    found = _refusals(_model(PARTS + "Sum(l, r, c)", "1,6,4,5", **shapes))
    assert found["n3"] == "something else reads the shuffled tensor: n2"


IN_PARTS = replace(ALL, rewrites=frozenset({"attention-as-products"}))
HEADS = {"seen": np.tril(np.ones((4, 4), bool)), "bias": np.linspace(-2, 2, 16, dtype=np.float32).reshape(4, 4)}


def _attention(call: str) -> onnx.ModelProto:
    arrays = {name: array for name, array in HEADS.items() if name in call}
    model = model_from_text(
        f"g (float[2,3,4,8] x, float[2,3,4,8] k, float[2,3,4,8] v) => (float[2,3,4,8] y) {{ {call} }}", arrays, 23
    )
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize(
    ("call", "ops"),
    [
        ("y = Attention(x, k, v)", []),
        ("y = Attention<scale = 0.5>(x, k, v)", []),
        ("y = Attention<is_causal = 1>(x, k, v)", ["Add"]),
        ("y = Attention(x, k, v, bias)", ["Add"]),
        ("y = Attention(x, k, v, seen)", ["Where", "Add"]),
    ],
)
def test_attention_in_its_parts(call: str, ops: list[str]) -> None:
    model = _attention(call)
    after, _ = run_passes(model, Recompose(), target=IN_PARTS)
    assert sorted(ops_of(after)) == sorted(["Transpose", "Mul", "MatMul", "Softmax", "MatMul", *ops])
    assert_same_function(model, after)
    assert ops_of(run_passes(model, Recompose(), target=ALL)[0]) == ["Attention"]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("y = Attention<softcap = 2.0>(x, k, v)", "softcap or softmax_precision is set"),
        ("y, a, b, c = Attention(x, k, v)", "it has a cache, or gives more than attention"),
    ],
)
def test_attention_that_stays(call: str, reason: str) -> None:
    refusals = _refusals(_attention(call), IN_PARTS)
    assert [r.split(":")[0] for r in refusals.values()] == [reason]
