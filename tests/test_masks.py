"""Masks of attention, through the whole compiler to integers: in every form in which exporters write them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from qcompiler_passes.recompose import Recompose
from qcompiler_passes.targets import INTEGER

from qcompiler import compile_model
from tests.forms import graph_text, ops_between, weights
from tests.support import TEST_TARGET, assert_same_function, ops_of, random_feeds, run, run_passes

TOKENS, WIDTH = 6, 16
HEAD = """g (float[1,6,16] x{inputs}) => (float[1,6,16] y) {{
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    t = Transpose<perm = [0, 2, 1]>(k)
    p = MatMul(q, t)
    {scores}
    m = MatMul(a, v)
    y = MatMul(m, wo)
}}"""
SUM = "s = Add(p, mask) a = Softmax(s)"
COMPUTED = {
    "bert": "f = Cast<to = 1>(seen) h = Sub(one, f) mask = Mul(h, lowest) s = Add(p, mask) a = Softmax(s)",
    "sum": "b = Cast<to = 9>(seen) mask = Where(b, zero, infinite) s = Add(mask, p) a = Softmax(s)",
    "where": "b = Cast<to = 9>(seen) s = Where(b, p, infinite) a = Softmax(s)",
    "hidden": "n = Cast<to = 9>(seen) b = Not(n) s = Where(b, least, p) a = Softmax(s)",
    "twice": "b = Cast<to = 9>(seen) mask = Where(b, zero, least) r = Add(p, mask) s = Add(r, causal) a = Softmax(s)",
    "reshaped": "b = Cast<to = 9>(seen) mask = Where(b, zero, least) r = Add(p, mask) s = Reshape(r, wide) "
    "u = Softmax(s) a = Reshape(u, narrow)",
}


def attention(scores: str = SUM, inputs: str = "", **arrays: np.ndarray) -> onnx.ModelProto:
    names = ("wq", "wk", "wv", "wo")
    products = {name: weights(WIDTH, WIDTH, seed=i) / 2 for i, name in enumerate(names)}
    return graph_text(HEAD.format(scores=scores, inputs=inputs), **arrays, **products)


def computed(kind: str) -> onnx.ModelProto:
    """A model whose input `seen` tells which tokens there are."""
    numbers = {"one": 1.0, "zero": 0.0, "lowest": -1e4, "infinite": -np.inf, "least": float(np.finfo(np.float32).min)}
    arrays = {name: np.float32(number) for name, number in numbers.items()} | {
        "causal": np.triu(np.full((TOKENS, TOKENS), -np.inf, np.float32), 1),
        "wide": np.int64([1, 1, TOKENS, TOKENS]),
        "narrow": np.int64([1, TOKENS, TOKENS]),
    }
    return attention(COMPUTED[kind], ", int64[1,1,6] seen", **arrays)


def feeds(model: onnx.ModelProto, seed: int, tokens: int | None = None) -> dict[str, np.ndarray]:
    made = random_feeds(model, seed)
    if "seen" in made:
        made["seen"] = (np.arange(TOKENS) < (2 + seed % 5 if tokens is None else tokens)).astype(np.int64)[None, None]
    return made


def compiled(model: onnx.ModelProto) -> onnx.ModelProto:
    samples = [feeds(model, seed) for seed in range(16)]
    return compile_model(model, samples, target="integer", emit="integer", compare=False).model


def sqnr(model: onnx.ModelProto, integer: onnx.ModelProto, samples: list[dict[str, np.ndarray]]) -> float:
    wanted, got = (np.stack([run(m, f)[0] for f in samples]) for m in (model, integer))
    return float(10 * np.log10((wanted**2).sum() / ((got - wanted) ** 2).sum()))


@pytest.mark.parametrize("hidden", [-100.0, -1e4, float(np.finfo(np.float32).min), -np.inf])
def test_constant_masks_take_no_steps(hidden: float) -> None:
    model = attention(mask=np.triu(np.full((TOKENS, TOKENS), hidden, np.float32), 1))
    integer = compiled(model)
    assert not ops_between(integer)
    assert "QuantizeMask" not in ops_of(integer)
    samples = [feeds(model, seed) for seed in range(16, 20)]
    assert sqnr(model, integer, samples) > 20
    for before in (model, integer):
        changed = {"x": samples[0]["x"].copy()}
        changed["x"][0, -1] += 1  # the last token, which only itself may see
        np.testing.assert_array_equal(run(before, samples[0])[0][0, :-1], run(before, changed)[0][0, :-1])


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_masks_hide_all_of_a_token(kind: str) -> None:
    model = computed(kind)
    integer = compiled(model)
    assert not ops_between(integer)
    assert ops_of(integer).count("QuantizeMask") == 1
    assert not {"Softmax", "MaskedSoftmax"} & set(ops_of(integer))
    samples = [feeds(model, seed) for seed in range(16, 24)]
    assert sqnr(model, integer, samples) > 15
    given = feeds(model, 0, tokens=3)
    changed = given | {"x": given["x"].copy()}
    changed["x"][0, 3:] += 1
    np.testing.assert_array_equal(run(integer, given)[0][0, :3], run(integer, changed)[0][0, :3])


@pytest.mark.parametrize(("kind", "least"), [("bert", 15), ("hidden", 15), ("sum", None)])
def test_a_row_that_is_hidden_as_a_whole(kind: str, least: float | None) -> None:
    """With -1e4, all scores count as if none were hidden; with the lowest number, none; both as in float. -inf gives no NaN."""
    model = computed(kind)
    integer = compiled(model)
    samples = [feeds(model, seed, tokens=0) for seed in range(4)]
    assert all(np.isfinite(run(integer, f)[0]).all() for f in samples)
    assert least is None or sqnr(model, integer, samples) > least


@pytest.mark.parametrize("kind", COMPUTED)
def test_one_operator_has_the_mask(kind: str) -> None:
    model = computed(kind)
    after, state = run_passes(model, Recompose(), target=INTEGER)
    assert ops_of(after).count("MaskedSoftmax") == 1
    assert "Softmax" not in ops_of(after)
    assert_same_function(model, after)
    assert Recompose().run(state) == 0
    assert "MaskedSoftmax" not in ops_of(run_passes(model, Recompose(), target=TEST_TARGET)[0])


@pytest.mark.parametrize(
    "scores",
    [
        "r = MatMul(x, wide6) s = Add(p, r) a = Softmax(s)",
        "b = Cast<to = 9>(seen) s = Where(b, p, minus) a = Softmax(s)",
        "f = Cast<to = 1>(seen) s = Add(p, f) u = Neg(s) a = Softmax(u)",
        "f = Cast<to = 1>(seen) s = Add(p, f) a = Softmax<axis = 1>(s)",
        "f = Cast<to = 1>(seen) s = Add(p, f) u = Softmax(s) a = Add(u, s)",
    ],
)
def test_what_is_no_mask(scores: str) -> None:
    arrays = {"minus": np.float32(-1), "wide6": weights(WIDTH, TOKENS)}
    model = attention(scores, ", int64[1,1,6] seen", **arrays)
    assert "MaskedSoftmax" not in ops_of(run_passes(model, Recompose(), target=INTEGER)[0])
