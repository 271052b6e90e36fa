from __future__ import annotations

import numpy as np
import onnx
import pytest

from qcompiler import compile_model
from tests.forms import graph_text, ops_between, weights
from tests.support import random_feeds, run

TOKENS, WIDTH = 6, 16
CAUSAL = """g (float[1,6,16] x) => (float[1,6,16] y) {
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    t = Transpose<perm = [0, 2, 1]>(k)
    p = MatMul(q, t)
    s = Add(p, mask)
    a = Softmax(s)
    m = MatMul(a, v)
    y = MatMul(m, wo)
}"""


def attention(hidden: float) -> onnx.ModelProto:
    """One head of attention in which no token sees those behind it."""
    names = ("wq", "wk", "wv", "wo")
    products = {name: weights(WIDTH, WIDTH, seed=i) / 2 for i, name in enumerate(names)}
    mask = np.triu(np.full((TOKENS, TOKENS), hidden, np.float32), 1)
    return graph_text(CAUSAL, mask=mask, **products)


@pytest.mark.parametrize("hidden", [-100.0, -1e4, float(np.finfo(np.float32).min), -np.inf])
def test_masks_take_no_steps(hidden: float) -> None:
    model = attention(hidden)
    samples = [random_feeds(model, seed) for seed in range(20)]
    integer = compile_model(model, samples[:16], target="integer", emit="integer", compare=False).model
    assert not ops_between(integer)
    wanted, got = (np.stack([run(m, f)[0] for f in samples[16:]]) for m in (model, integer))
    assert 10 * np.log10((wanted**2).sum() / ((got - wanted) ** 2).sum()) > 20
    for before, after in ((model, samples[16]), (integer, samples[16])):
        changed = {"x": after["x"].copy()}
        changed["x"][0, -1] += 1  # the last token, which only itself may see
        np.testing.assert_array_equal(run(before, after)[0][0, :-1], run(before, changed)[0][0, :-1])
