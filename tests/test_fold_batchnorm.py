"""BatchNormalization folds where that is exact, and stays with a reason where it is not."""

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from qcompiler_passes import fold_batchnorm
from qcompiler_passes.fold_batchnorm import FoldBatchnorm
from qcompiler_passes.normalize_gemm import NormalizeGemm

from qcompiler.rewrite import Refusal, Rewriter
from qcompiler.text import format_graph
from tests.support import assert_same_function, model_from_text, ops_of, run_passes, state_of

RNG = np.random.default_rng(7)
BN = "BatchNormalization"


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def parameters(channels: int, prefix: str = "") -> dict[str, np.ndarray]:
    """Parameters whose epsilon, sign and shift all matter."""
    return {
        f"{prefix}g": normal(channels),
        f"{prefix}b": normal(channels),
        f"{prefix}m": normal(channels),
        f"{prefix}v": RNG.uniform(1e-3, 0.5, channels).astype(np.float32),
    }


def folded(text: str, constants: Mapping[str, np.ndarray], shapes: bool = False, **options: bool) -> onnx.ModelProto:
    """The model after the pass, which keeps the function and has nothing left to do; `shapes`: inner shapes are known."""
    model = model_from_text(text, constants)
    model = onnx.shape_inference.infer_shapes(model) if shapes else model
    after, state = run_passes(model, FoldBatchnorm(**options))
    assert_same_function(model, after)
    assert FoldBatchnorm(**options).run(state) == 0
    return after


def refusal(
    monkeypatch: pytest.MonkeyPatch, text: str, constants: Mapping[str, np.ndarray], opset: int = 17
) -> Refusal:
    """The one refusal of the pass, which leaves the model as it is."""
    seen: list[Rewriter] = []
    apply = fold_batchnorm.apply_rules
    monkeypatch.setattr(fold_batchnorm, "apply_rules", lambda rw, rules: (seen.append(rw), apply(rw, rules))[1])
    state = state_of(model_from_text(text, constants, opset))
    before = format_graph(state.graph)
    assert FoldBatchnorm().run(state) == 0
    assert format_graph(state.graph) == before
    (found,) = seen[0].refusals.values()
    assert found.culprit
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("attrs", "shape", "weight"),
    [
        ("", "1,4,9,9", (6, 4, 3, 3)),
        ("<pads=[1,0,2,1], strides=[2,1]>", "1,4,9,9", (6, 4, 3, 3)),
        ("<dilations=[2,2], kernel_shape=[3,3]>", "2,4,9,9", (6, 4, 3, 3)),
        ('<auto_pad="SAME_LOWER">', "1,4,9,9", (6, 4, 2, 2)),
        ("<group=2>", "1,4,9,9", (6, 2, 3, 3)),
        ("<group=4>", "1,4,9,9", (4, 1, 3, 3)),
        ("", "2,4,9", (6, 4, 3)),
        ("", "1,4,5,5,5", (6, 4, 2, 2, 2)),
    ],
)
def test_into_conv_before(attrs: str, shape: str, weight: tuple[int, ...], bias: bool) -> None:
    text = f"g (float[{shape}] x) => (float[N,C,{','.join('abc'[: len(weight) - 2])}] y) {{\n"
    text += f"a = Conv{attrs}(x, w{', c' if bias else ''})\n y = {BN}<epsilon=0.01>(a, g, b, m, v)\n}}"
    constants = parameters(weight[0]) | {"w": normal(*weight)} | ({"c": normal(weight[0])} if bias else {})
    assert ops_of(folded(text, constants)) == ["Conv"]


@pytest.mark.parametrize("attrs", ["", "strides=[2,2], output_padding=[1,1]", "pads=[1,1,0,1]", "output_shape=[6,7]"])
@pytest.mark.parametrize("groups", [1, 2])
def test_into_conv_transpose(attrs: str, groups: int) -> None:
    attrs = ", ".join(filter(None, [attrs, f"group={groups}"]))
    text = "g (float[1,4,5,5] x) => (float[1,6,h,w] y) {\n"
    text += f"a = ConvTranspose<{attrs}>(x, w, c)\n y = {BN}(a, g, b, m, v)\n}}"
    constants = parameters(6) | {"w": normal(4, 6 // groups, 3, 3), "c": normal(6)}
    assert ops_of(folded(text, constants)) == ["ConvTranspose"]


@pytest.mark.parametrize(
    "attrs",
    ["", "<alpha=0.5>", "<beta=2.0>", "<beta=0.0>", "<transA=1>", "<transB=1>", "<alpha=3.0, beta=0.5, transB=1>"],
)
@pytest.mark.parametrize("bias", [None, (), (1,), (6,), (1, 6), (5, 1), (5, 6)])
def test_into_gemm_before(attrs: str, bias: tuple[int, ...] | None) -> None:
    shape = "4,5" if "transA" in attrs else "5,4"
    text = f"g (float[{shape}] x) => (float[5,6] y) {{\n"
    text += f"a = Gemm{attrs}(x, w{'' if bias is None else ', c'})\n y = {BN}(a, g, b, m, v)\n}}"
    constants = parameters(6) | {"w": normal(6, 4) if "transB" in attrs else normal(4, 6)}
    if bias is not None:
        constants["c"] = normal(*bias)
    assert ops_of(folded(text, constants)) == ["Gemm"]


def test_after_matmul_leaves_the_bias_to_normalize_gemm() -> None:
    text = f"g (float[5,4] x) => (float[5,6] y) {{\n a = MatMul(x, w)\n s = Add(a, c)\n y = {BN}(s, g, b, m, v)\n}}"
    model = model_from_text(text, parameters(6) | {"w": normal(4, 6), "c": normal(6)})
    after, _ = run_passes(model, FoldBatchnorm())
    assert ops_of(after) == ["MatMul", "Add"]
    after, _ = run_passes(model, FoldBatchnorm(), NormalizeGemm())
    assert ops_of(after) == ["Gemm"]
    assert_same_function(model, after)


def test_chains_between_fold_with_it() -> None:
    text = f"""g (float[1,3,5,5] x) => (float[1,4,5,5] y) {{
        a = Conv(x, w)
        s = Add(a, c)
        t = Mul(two, s)
        u = {BN}(t, g, b, m, v)
        y = {BN}(u, hg, hb, hm, hv)
    }}"""
    constants = {"w": normal(4, 3, 1, 1), "c": normal(4, 1, 1), "two": np.float32(2)}
    assert ops_of(folded(text, constants | parameters(4) | parameters(4, "h"), shapes=True)) == ["Conv"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_into_conv_after(groups: int, bias: bool) -> None:
    text = f"""g (float[1,4,5,5] x) => (float[1,6,h,w] y) {{
        r = Relu(x)
        a = {BN}(r, g, b, m, v)
        y = Conv<group={groups}, strides=[2,1]>(a, w{", c" if bias else ""})
    }}"""
    constants = parameters(4) | {"w": normal(6, 4 // groups, 3, 2)} | ({"c": normal(6)} if bias else {})
    assert ops_of(folded(text, constants)) == ["Relu", "Conv"]


def test_into_padded_conv_after_if_nothing_shifts() -> None:
    text = f"""g (float[1,4,5,5] x) => (float[1,6,5,5] y) {{
        a = {BN}(x, g, b, m, v)
        y = Conv<pads=[1,1,1,1]>(a, w)
    }}"""
    constants = parameters(4) | {"w": normal(6, 4, 3, 3), "b": np.zeros(4, np.float32), "m": np.zeros(4, np.float32)}
    assert ops_of(folded(text, constants)) == ["Conv"]


def test_into_all_readers_after() -> None:
    text = f"""g (float[5,4] x) => (float[5,6] y, float[5,3] z) {{
        r = Relu(x)
        a = {BN}(r, g, b, m, v)
        y = Gemm<alpha=0.5, beta=2.0, transB=1>(a, w, c)
        z = MatMul(a, u)
    }}"""
    constants = parameters(4) | {"w": normal(6, 4), "c": normal(6), "u": normal(4, 3)}
    assert sorted(ops_of(folded(text, constants))) == ["Add", "Gemm", "MatMul", "Relu"]


def test_shared_weights_and_parameters_are_copied() -> None:
    text = f"""g (float[1,3,5,5] x) => (float[1,3,5,5] y, float[1,3,5,5] z) {{
        a = Conv(x, w, c)
        y = {BN}(a, g, c, m, v)
        z = Conv(x, w, c)
    }}"""
    after = folded(text, parameters(3) | {"w": normal(3, 3, 1, 1), "c": normal(3)})
    assert ops_of(after) == ["Conv", "Conv"]


def test_graph_output_keeps_its_name_and_layers_are_recorded() -> None:
    text = f"g (float[1,3,5,5] x) => (float[1,3,5,5] y) {{\n a = Conv(x, w)\n y = {BN}(a, g, b, m, v)\n}}"
    model = model_from_text(text, parameters(3) | {"w": normal(3, 3, 1, 1)})
    model.graph.node[0].name, model.graph.node[1].name = "conv", "bn"
    _, state = run_passes(model, FoldBatchnorm())
    assert state.origin["conv"] == ("conv", "bn")


POOLED = f"""g (float[1,3,6,6] x) => (float[1,4,2,2] y) {{
    r = Relu(x)
    a = {BN}(r, g, b, m, v)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2], pads=[0,0,1,1]>(a)
    y = Conv(p, w)
}}"""


def test_moves_behind_max_pool() -> None:
    constants = parameters(3) | {"w": normal(4, 3, 2, 2)}
    negative = constants | {"g": np.array([1, -1, 1], np.float32)}
    assert ops_of(folded(POOLED, negative, shapes=True)) == ["Relu", BN, "MaxPool", "Conv"]
    positive = constants | {"g": np.array([1, 0, 2], np.float32)}
    assert ops_of(folded(POOLED, positive, shapes=True)) == ["Relu", "MaxPool", "Conv"]


@pytest.mark.parametrize(
    ("between", "gamma", "rest"),
    [
        ("r = Relu(a)", [1, 2, 3], ["Add"]),
        ("r = Relu(a)", [1, -2, 0], ["Mul", "Add"]),
        ("r = LeakyRelu<alpha=0.3>(a)", [1, 2, 3], ["Add"]),
        ("q = MaxPool<kernel_shape=[2,2]>(a)\n r = Relu(q)", [1, -2, 3], ["Mul", "Add"]),
    ],
)
def test_positive_scales_go_before_the_activation(between: str, gamma: list[float], rest: list[str]) -> None:
    text = f"g (float[1,2,6,6] x) => (float[1,3,h,w] y) {{\n a = Conv(x, w)\n {between}\n y = {BN}(r, g, b, m, v)\n}}"
    constants = parameters(3) | {"w": normal(3, 2, 3, 3), "g": np.asarray(gamma, np.float32)}
    ops = ops_of(folded(text, constants, shapes=True))
    assert [op for op in ops if op in ("Mul", "Add")] == rest
    assert BN not in ops


@pytest.mark.parametrize("other", ["r", "a"])
def test_scales_stay_behind_an_activation_that_something_else_reads(other: str) -> None:
    text = f"""g (float[1,3,5,5] x) => (float[1,3,5,5] y) {{
        a = Conv(x, w)
        r = Relu(a)
        s = {BN}(r, g, b, m, v)
        y = Add(s, {other})
    }}"""
    after = folded(text, parameters(3) | {"w": normal(3, 3, 1, 1), "g": np.array([1, 2, 3], np.float32)}, shapes=True)
    assert BN in ops_of(after)


def test_scales_before_the_activation_do_not_reach_the_next_weights() -> None:
    text = f"""g (float[1,2,6,6] x) => (float[1,4,4,4] y) {{
        a = Conv(x, w)
        r = Relu(a)
        s = {BN}(r, g, b, m, v)
        y = Conv<pads=[1,1,1,1]>(s, u)
    }}"""
    constants = parameters(3) | {
        "w": normal(3, 2, 3, 3),
        "u": normal(4, 3, 3, 3),
        "g": np.array([0.01, 1, 100], np.float32),
    }
    after = folded(text, constants, shapes=True)
    assert ops_of(after) == ["Conv", "Relu", "Add", "Conv"]
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in after.graph.initializer}
    assert any(np.array_equal(a, constants["u"]) for a in arrays.values())


def test_depthwise_option() -> None:
    constants = parameters(3) | {"w": normal(4, 3, 2, 2), "g": np.array([1, -1, 1], np.float32)}
    assert ops_of(folded(POOLED, constants, shapes=True, depthwise=True)) == ["Relu", "Conv", "MaxPool", "Conv"]
    flat = f"g (float[2,3] x) => (float[2,3] y) {{\n y = {BN}(x, g, b, m, v)\n}}"
    assert ops_of(folded(flat, parameters(3), depthwise=True)) == [BN]


CONV = {"w": normal(3, 3, 1, 1), "w3": normal(3, 3, 3, 3)} | parameters(3)
IMAGE = "float[1,3,5,5]"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"a = ConvTranspose(x, w)\n s = {BN}(a, g, b, m, v)\n y = Add(s, a)", "read elsewhere"),
        (f"a = {BN}(x, g, b, m, v)\n y = Conv<pads=[1,1,1,1]>(a, w3)", "pads"),
        (f'a = {BN}(x, g, b, m, v)\n y = Conv<auto_pad="SAME_UPPER">(a, w3)', "pads"),
        (f"a = Conv(x, w)\n s = {BN}(a, g, b, m, v)\n y = Add(s, a)", "read elsewhere"),
        (f"a = {BN}(x, g, b, m, v)\n c = Conv(a, w)\n y = Add(a, c)", "Add"),
        (f"a = {BN}(x, g, b, m, v)\n y = ConvTranspose(a, w)", "no fold"),
        (f"k = Relu(w)\n a = Conv(x, k)\n y = {BN}(a, g, b, m, v)", "not a float constant"),
        (f"k = Relu(m)\n a = Conv(x, w, k)\n y = {BN}(a, g, b, m, v)", "bias is not a constant"),
        (f"k = Relu(g)\n a = Conv(x, w)\n y = {BN}(a, k, b, m, v)", "parameters are not constants"),
    ],
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, body: str, reason: str) -> None:
    found = refusal(monkeypatch, f"g ({IMAGE} x) => ({IMAGE} y) {{\n{body}\n}}", CONV)
    assert reason in found.reason


def test_refuses_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"g ({IMAGE} x) => ({IMAGE} y) {{\n a = Conv(x, w)\n y, p, q = {BN}<training_mode=1>(a, g, b, m, v)\n}}"
    assert "training_mode=1" in refusal(monkeypatch, text, CONV).reason


def test_refuses_spatial_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"g ({IMAGE} x) => ({IMAGE} y) {{\n a = Conv(x, w)\n y = {BN}<spatial=0>(a, g, b, m, v)\n}}"
    assert "spatial=0" in refusal(monkeypatch, text, CONV, opset=8).reason


def test_refuses_conv_result_that_is_a_graph_output(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"g ({IMAGE} x) => ({IMAGE} a, {IMAGE} y) {{\n a = Conv(x, w)\n y = {BN}(a, g, b, m, v)\n}}"
    found = refusal(monkeypatch, text, CONV)
    assert (found.culprit, "read elsewhere" in found.reason) == ("a", True)


def test_refuses_what_a_subgraph_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"""g ({IMAGE} x, bool p) => ({IMAGE} y, {IMAGE} z) {{
        a = Conv(x, w)
        y = {BN}(a, g, b, m, v)
        z = If(p) <
            then_branch = t () => ({IMAGE} i) {{ i = Relu(a) }},
            else_branch = e () => ({IMAGE} j) {{ j = Relu(x) }}
        >
    }}"""
    assert "read elsewhere" in refusal(monkeypatch, text, CONV).reason


def test_refuses_an_unknown_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"g ({IMAGE} x) => ({IMAGE} y) {{\n a = Relu(x)\n c = {BN}(a, g, b, m, v)\n y = Relu(c)\n}}"
    assert "rank" in refusal(monkeypatch, text, CONV).reason


def test_refuses_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"g ({IMAGE} x) => ({IMAGE} y) {{\n a = Conv(x, w)\n y = {BN}(a, g, b, m, v)\n}}"
    huge = np.full((3, 3, 1, 1), 3e38, np.float32)
    found = refusal(monkeypatch, text, CONV | {"w": huge, "g": np.full(3, 1e3, np.float32)})
    assert "overflow" in found.reason
