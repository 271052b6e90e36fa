"""Element-wise knowledge of shape tensors."""

from __future__ import annotations

import numpy as np
import pytest
from qcompiler_passes.sizes import Element, Sizes

from qcompiler import ir
from qcompiler.shapes import infer_shapes
from tests.support import model_from_text

PRELUDE = """s = Shape (x) n = Slice (s, zero, one) c = Slice (s, one, two)"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Identity (s)", ["N", 6, "T"]),
        ("y = Shape <start = 1> (x)", [6, "T"]),
        ("y = Gather (s, back)", ["T", "N"]),
        ("y = Slice (s, minus, far, zero, minus)", ["T", 6, "N"]),
        ("y = Squeeze (c, zero)", 6),
        ("u = Unsqueeze (s, zero) y = Reshape (u, minus)", ["N", 6, "T"]),
        ("y = Mul (c, two)", [12]),
        ("y = Mul (n, one)", ["N"]),
        ("y = Mul (n, two)", ["(2)*(N)"]),
        ("y = Mul (n, minus)", [None]),
        ("y = Add (n, two)", ["(2)+(N)"]),
        ("y = Add (n, zero)", ["N"]),
        ("y = Sub (n, n)", [0]),
        ("y = Sub (n, two)", [None]),
        ("y = Div (minus, two)", [0]),
        ("y = Div (n, two)", ["(N)/(2)"]),
        ("y = Div (c, zero)", [None]),
        (
            "f = Cast <to = 1> (s) h = Mul (f, half) g = Floor (h) y = Cast <to = 7> (g)",
            ["int(floor((0.5)*(N)))", 3, "int(floor((0.5)*(T)))"],
        ),
        ("e = Equal (s, minus) y = Where (e, one, s)", ["N", 6, "T"]),
        ("e = Equal (s, two) y = Where (e, one, s)", [None, 6, None]),
    ],
)
def test_elements(body: str, expected: list[Element] | Element) -> None:
    model = model_from_text(
        """g (float[N,6,T] x) => (int64[k] y) <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] minus = {-1},
        int64[1] far = {-99}, int64[2] back = {-1, 0}, float half = {0.5}>"""
        f" {{ {PRELUDE} {body} }}"
    )
    graph = ir.from_proto(model)
    infer_shapes(graph)
    found = Sizes(graph).of(graph.outputs[0])
    assert found is not None
    np.testing.assert_array_equal(found, np.array(expected, dtype=object))


def test_large_numbers_do_not_pass_through_float() -> None:
    model = model_from_text(
        "g (float[2] x) => (int64[1] y) <int64[1] big = {16777217}> { f = Cast <to = 1> (big) y = Cast <to = 7> (f) }"
    )
    graph = ir.from_proto(model)
    infer_shapes(graph)
    found = Sizes(graph).of(graph.outputs[0])
    assert found is not None and found.tolist() == [None]
