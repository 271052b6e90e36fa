from __future__ import annotations

import numpy as np
import onnx
import pytest
from qcompiler_passes.cleanup import Cleanup
from qcompiler_passes.fold_batchnorm import FoldBatchnorm
from qcompiler_passes.fold_bias import FoldBias
from qcompiler_passes.fold_constants import FoldConstants
from qcompiler_passes.normalize import Normalize
from qcompiler_passes.recompose import Recompose

from qcompiler import ir
from qcompiler.bodies import run_everywhere
from qcompiler.pipeline import Pass
from qcompiler.verify import VerifyError, verify
from tests.support import assert_same_function, model_from_text, run_passes, state_of

PASSES: tuple[Pass, ...] = (
    Normalize(), FoldConstants(), Recompose(), FoldBias(), FoldBatchnorm(), FoldConstants(), Cleanup()
)  # fmt: skip
RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.standard_normal((4, 4, 1, 1)),
    "s": RNG.uniform(0.5, 2, 4),
    "b": RNG.standard_normal(4),
    "m": RNG.standard_normal(4),
    "v": RNG.uniform(0.5, 2, 4),
}
ARRAYS = {name: values.astype(np.float32) for name, values in WEIGHTS.items()}

BRANCH = """g (float[1,4,5,5] x, float[1] t) => (float[1,4,5,5] y) {
    zero = Constant <value = float[1] {0.0}> ()
    flag = Greater (t, zero)
    f = Squeeze (flag)
    c0 = Conv (x, w)
    y = If (f) <
        then_branch = a () => (float[1,4,5,5] r) { h = Conv (c0, w)  h1 = BatchNormalization (h, s, b, m, v)  r = Relu (h1) },
        else_branch = e () => (float[1,4,5,5] q) { h2 = BatchNormalization (c0, s, b, m, v)  i = Identity (h2)  q = Relu (i) }
    >
}"""

LOOP = """g (float[2] x) => (float[2] y, float[N,2] all) {
    n = Constant <value = int64 {3}> ()
    go = Constant <value = bool {1}> ()
    start = Mul (x, x)
    y, all = Loop (n, go, x) <
        body = l (int64 i, bool c, float[2] z) => (bool d, float[2] u, float[2] o) {
            d = Identity (c)
            two = Constant <value = float {2.0}> ()
            four = Mul (two, two)
            p = Mul (z, four)
            u = Add (p, start)
            o = Sub (u, z)
        }
    >
}"""

NESTED = """g (float[1,4,5,5] x, bool p, bool q) => (float[1,4,5,5] y) {
    y = If (p) <
        then_branch = a () => (float[1,4,5,5] r) {
            h = Conv (x, w)
            r = If (q) <
                then_branch = c () => (float[1,4,5,5] k) { j = Conv (h, w)  k = BatchNormalization (j, s, b, m, v) },
                else_branch = d () => (float[1,4,5,5] k2) { k2 = Identity (h) }
            >
        },
        else_branch = e () => (float[1,4,5,5] z) { z = Identity (x) }
    >
}"""


def ops(state: object) -> list[str]:
    """The operators of all graphs, sorted."""
    return sorted(n.op for g in ir.all_graphs(state.graph) for n in g.nodes)  # type: ignore[attr-defined]


def check(text: str, arrays: dict[str, np.ndarray]) -> tuple[onnx.ModelProto, list[str]]:
    before = model_from_text(text, arrays)
    after, state = run_passes(before, *PASSES)
    onnx.checker.check_model(after, full_check=True)
    for stage in PASSES:
        assert run_everywhere(stage.run, state) == 0, stage
    assert_same_function(before, after, seeds=8)
    return after, ops(state)


def test_batchnorm_in_a_branch_folds_into_the_conv_there_and_not_into_the_one_outside() -> None:
    _, found = check(BRANCH, ARRAYS)
    assert found.count("BatchNormalization") == 1
    assert found.count("Conv") == 2
    assert "Identity" not in found


def test_a_loop_with_scan_outputs_keeps_its_signature_and_folds_constants_in_its_body() -> None:
    after, found = check(LOOP, {})
    assert found == ["Add", "Identity", "Loop", "Mul", "Mul", "Sub"]
    body = next(n for n in after.graph.node if n.op_type == "Loop").attribute[0].g
    assert [len(body.input), [v.name for v in body.output]] == [3, ["d", "u", "o"]]


def test_passes_reach_nested_bodies() -> None:
    _, found = check(NESTED, ARRAYS)
    assert "BatchNormalization" not in found
    assert found.count("Conv") == 2


def test_names_are_unique_in_the_whole_model() -> None:
    _, state = run_passes(model_from_text(BRANCH, ARRAYS), *PASSES)
    nodes = [n.name for g in ir.all_graphs(state.graph) for n in g.nodes]
    tensors = {id(t): t.name for g in ir.all_graphs(state.graph) for t in ir.tensors(g)}
    assert len(set(nodes)) == len(nodes)
    assert len(set(tensors.values())) == len(tensors)


def test_what_bodies_read_from_outside_is_linked_as_before() -> None:
    _, state = run_passes(model_from_text(BRANCH, ARRAYS), *PASSES)
    branch = next(n for n in state.graph.nodes if n.op == "If")
    outer = next(n for n in state.graph.nodes if n.op == "Conv").outputs[0]
    assert [t for t in ir.captures(branch) if t is outer]
    assert {n.op for n in outer.outputs} == {"Conv", "BatchNormalization"}
    assert all(not g.inputs for g in ir.all_graphs(state.graph) if g is not state.graph)


def test_a_limit_on_rewrites_counts_all_graphs() -> None:
    for limit in range(4):
        state = state_of(model_from_text(NESTED, ARRAYS))
        run_everywhere(Normalize().run, state)
        state.rewrite_limit = limit
        assert run_everywhere(FoldBatchnorm().run, state) == min(limit, 1)


def test_verify_sees_what_is_wrong_in_a_body() -> None:
    _, state = run_passes(model_from_text(BRANCH, ARRAYS), Normalize())
    branch = next(n for n in state.graph.nodes if n.op == "If").attrs["then_branch"]
    branch.nodes.reverse()
    with pytest.raises(VerifyError, match="before it is read"):
        verify(state)
