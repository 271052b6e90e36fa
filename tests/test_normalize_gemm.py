"""Matrix products with constants reach one form."""

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from qcompiler_passes import normalize_gemm
from qcompiler_passes.normalize_gemm import NormalizeGemm

from qcompiler.rewrite import Rewriter
from qcompiler.text import format_graph
from tests.support import assert_same_function, model_from_text, ops_of, run_passes, state_of

RNG = np.random.default_rng(3)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CONSTANTS = {"w": normal(4, 6), "v": normal(6, 4), "row": normal(6), "one": normal(1), "table": normal(5, 6)}


def normalized(text: str, constants: Mapping[str, np.ndarray] = CONSTANTS) -> onnx.ModelProto:
    """The model after the pass, which keeps the function and has nothing left to do."""
    model = model_from_text(text, constants)
    after, state = run_passes(model, NormalizeGemm())
    assert_same_function(model, after)
    assert NormalizeGemm().run(state) == 0
    return after


def gemm_of(model: onnx.ModelProto) -> tuple[list[str], list[tuple[int, ...]]]:
    """The attributes of the one Gemm, and the shapes of its constants."""
    (node,) = (n for n in model.graph.node if n.op_type == "Gemm")
    shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    odd = [a.name for a in node.attribute if onnx.helper.get_attribute_value(a) != plain[a.name]]
    return odd, [shapes[i] for i in node.input if i in shapes]


@pytest.mark.parametrize("alpha", ["", "alpha=0.5", "alpha=0.0"])
@pytest.mark.parametrize("beta", ["", "beta=2.0", "beta=0.0"])
@pytest.mark.parametrize("trans", ["", "transA=1", "transB=1", "transA=1, transB=1"])
@pytest.mark.parametrize("bias", [None, (), (1,), (6,), (1, 6), (1, 1), (5, 1), (5, 6)])
def test_gemm(alpha: str, beta: str, trans: str, bias: tuple[int, ...] | None) -> None:
    attrs = ", ".join(filter(None, [alpha, beta, trans])) or "alpha=1.0"
    text = f"g (float[{'4,5' if 'transA' in trans else '5,4'}] x) => (float[5,6] y) {{\n"
    text += f"y = Gemm<{attrs}>(x, {'v' if 'transB' in trans else 'w'}{'' if bias is None else ', c'})\n}}"
    after = normalized(text, CONSTANTS if bias is None else CONSTANTS | {"c": normal(*bias)})
    matrix = bias is not None and bias[:1] == (5,)
    assert ops_of(after) == ["Transpose"] * ("transA" in trans) + ["Gemm"] + ["Add"] * matrix
    assert gemm_of(after) == ([], [(4, 6)] if bias is None or matrix else [(4, 6), (6,)])


def test_gemm_with_computed_bias() -> None:
    text = "g (float[5,4] x, float[5,6] c) => (float[5,6] y) {\n y = Gemm<alpha=2.0>(x, w, c)\n}"
    after = normalized(text)
    assert ops_of(after) == ["Gemm", "Add"]
    assert gemm_of(after) == ([], [(4, 6)])


def test_shared_weight_is_copied() -> None:
    text = "g (float[5,4] x, float[5,6] z) => (float[5,6] y, float[5,4] u) {\n y = Gemm<transB=1>(x, v)\n u = Gemm(z, v)\n}"
    assert ops_of(normalized(text)) == ["Gemm", "Gemm"]


@pytest.mark.parametrize("add", ["Add(a, c)", "Add(c, a)"])
@pytest.mark.parametrize("bias", [(), (1,), (6,), (1, 6), (1, 1)])
def test_matmul_of_rank_two(add: str, bias: tuple[int, ...]) -> None:
    after = normalized(
        f"g (float[n,4] x) => (float[n,6] y) {{\n a = MatMul(x, w)\n y = {add}\n}}", CONSTANTS | {"c": normal(*bias)}
    )
    assert ops_of(after) == ["Gemm"]
    assert gemm_of(after) == ([], [(4, 6), (6,)])


@pytest.mark.parametrize("dims", ["2,3", "n,3", "2,n", "n", "2,3,2", "n,3,2"])
@pytest.mark.parametrize("bias", [(6,), (1, 1, 6)])
def test_matmul_of_higher_rank(dims: str, bias: tuple[int, ...]) -> None:
    text = f"g (float[{dims},4] x) => (float[{dims},6] y) {{\n a = MatMul(x, w)\n y = Add(a, c)\n}}"
    if dims == "n":
        bias = (6,)
    after = normalized(text, CONSTANTS | {"c": normal(*bias)})
    assert ops_of(after) == (["Gemm"] if dims == "n" else ["Reshape", "Gemm", "Reshape"])


def test_matmul_of_dynamic_leading_axes() -> None:
    text = "g (float[n,m,3,4] x) => (float[n,m,3,6] y) {\n a = MatMul(x, w)\n y = Add(a, row)\n}"
    assert ops_of(normalized(text)) == ["Reshape", "Gemm", "Shape", "Gather", "Concat", "Reshape"]


def test_products_of_one_tensor_share_its_reshape() -> None:
    text = """g (float[2,3,4] x) => (float[2,3,6] y, float[2,3,6] z) {
        a = MatMul(x, w)
        y = Add(a, row)
        b = MatMul(x, w)
        z = Add(b, one)
    }"""
    assert sorted(ops_of(normalized(text))) == ["Gemm", "Gemm", "Reshape", "Reshape", "Reshape"]


@pytest.mark.parametrize(
    ("signature", "body", "reason"),
    [
        ("float[6,5] x", "a = MatMul(w, x)\n y = Add(a, one)", "right operand is not a constant"),
        ("float[5,4] x, float[4,6] k", "a = MatMul(x, k)\n y = Add(a, one)", "right operand is not a constant"),
        ("float[5,4] x", "k = Relu(row)\n a = MatMul(x, w)\n y = Add(a, k)", "not a float constant"),
        ("float[4] x", "a = MatMul(x, w)\n y = Add(a, row)", "rank of the left operand"),
        ("float[5,4] x", "r = Relu(x)\n a = MatMul(r, w)\n y = Add(a, row)", "rank of the left operand"),
        ("float[5,4] x", "a = MatMul(x, w)\n y = Add(a, table)", "not one row"),
        ("float[5,4] x", "a = MatMul(x, w)\n s = Add(a, row)\n y = Mul(s, a)", "no Add alone"),
        ("float[5,4] x, float[5,6] k", "y = Gemm<beta=0.5>(x, w, k)", "bias is not a constant"),
        ("float[5,4] x, float[4,6] k", "y = Gemm<alpha=0.5>(x, k, row)", "weight is not a constant"),
    ],
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, signature: str, body: str, reason: str) -> None:
    seen: list[Rewriter] = []
    apply = normalize_gemm.apply_rules
    monkeypatch.setattr(normalize_gemm, "apply_rules", lambda rw, rules: (seen.append(rw), apply(rw, rules))[1])
    state = state_of(model_from_text(f"g ({signature}) => (float[5,6] y) {{\n{body}\n}}", CONSTANTS))
    before = format_graph(state.graph)
    assert NormalizeGemm().run(state) == 0
    assert format_graph(state.graph) == before
    found = list(seen[0].refusals.values())
    assert any(reason in r.reason and r.culprit for r in found), found
