"""Nodes that do nothing are removed; those that almost do nothing are not."""

from __future__ import annotations

import onnx
import pytest
from qcompiler_passes.fold_constants import FoldConstants
from qcompiler_passes.normalize import Normalize

from tests.support import assert_same_function, model_from_text, ops_of, run_passes

CONSTANTS = """<float zero = {0}, float one = {1}, float[1,1,1,1,1] ones5 = {1}, float[3,1,1] ones3 = {1,1,1}, float[1] two = {2},
    int64[8] none = {0,0,0,0,0,0,0,0}, int64[8] some = {0,0,0,0,0,0,0,1}, int64[4] same = {0,3,4,-1}, int64[4] t1 = {1,1,1,1},
    int64[4] t2 = {1,1,1,2}, float[4] r1 = {1,1,1,1}, float[4] r2 = {1,1,1.1,1}, int64[4] e = {1,3,4,5},
    int64[4] half = {0,3,2,-1}>"""


@pytest.mark.parametrize(
    ("node", "removed"),
    [
        ("Identity (a)", True),
        ("Cast <to = 1> (a)", True),
        ("Transpose <perm = [0,1,2,3]> (a)", True),
        ("Transpose <perm = [0,1,3,2]> (a)", False),
        ("Transpose (a)", False),
        ("Add (a, zero)", True),
        ("Add (zero, a)", True),
        ("Add (a, one)", False),
        ("Sub (a, zero)", True),
        ("Sub (zero, a)", False),
        ("Mul (ones3, a)", True),
        ("Mul (a, ones5)", False),
        ("Mul (a, two)", False),
        ("Div (a, one)", True),
        ("Div (one, a)", False),
        ("Pad (a, none)", True),
        ("Pad (a, some)", False),
        ("Reshape (a, same)", True),
        ("Reshape (a, half)", False),
        ("Tile (a, t1)", True),
        ("Tile (a, t2)", False),
        ('Resize <mode = "linear"> (a, , r1)', True),
        ('Resize <mode = "linear"> (a, , r2)', False),
        ("Expand (a, e)", True),
        ("Concat <axis = 1> (a)", True),
        ("Concat <axis = 1> (a, a)", False),
        ("Max (a)", True),
        ("Max (a, a)", False),
    ],
)
def test_removal(node: str, removed: bool) -> None:
    model = model_from_text(
        f"g (float[N,3,4,5] x) => (float y) {CONSTANTS} {{ a = Sigmoid (x) b = {node} y = Exp (b) }}"
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    result, _ = run_passes(model, Normalize(), FoldConstants())
    onnx.checker.check_model(result)
    assert_same_function(model, result)
    assert (ops_of(result) == ["Sigmoid", "Exp"]) == removed
