"""guard-float: what stays float runs in float, and what is quantized on integers, in ONNX Runtime's own graph."""

from __future__ import annotations

import numpy as np
from qcompiler_passes.guard_float import GuardFloat

from qcompiler import ir
from qcompiler.runtime import optimized_ops, run, session
from tests.forms import TO_KERNELS, TO_QDQ, compiled, graph_text, weights
from tests.support import random_feeds


def test_a_quantized_gemm_is_not_fused_with_a_relu() -> None:
    text = (
        "g (float[1,8,4,4] x) => (float[] y) { c = Conv(x, v) f = Flatten(c) "
        "h = Gemm(f, w, b) a = Relu(h) y = LogSoftmax(a) }"
    )
    model = graph_text(text, v=weights(8, 8, 1, 1), w=weights(128, 10), b=weights(10))
    plain = compiled(model, *TO_QDQ)
    fused = optimized_ops(ir.to_proto(plain.graph))
    guard = GuardFloat()
    assert guard.run(plain) == 1
    assert guard.run(plain) == 0
    guarded = ir.to_proto(plain.graph)
    ops = optimized_ops(guarded)
    assert fused["com.microsoft.FusedGemm"] == 1
    assert (ops["com.microsoft.FusedGemm"], ops["com.microsoft.QGemm"], ops["DequantizeLinear"]) == (0, 1, 0)
    kernels = compiled(model, *TO_KERNELS)
    assert GuardFloat().run(kernels) == 0
    for seed in range(3):
        feeds = random_feeds(model, seed)
        both = (run(session(m), feeds)[0] for m in (guarded, ir.to_proto(kernels.graph)))
        np.testing.assert_array_equal(*both)


def test_a_transpose_whose_result_a_body_reads_is_kept_apart() -> None:
    """ONNX Runtime would move the DQ behind the Transpose and abort at the If, which has no input for it."""
    branches = (
        "<then_branch = t () => (float[] a) { [t] a = Relu(m) }, else_branch = e () => (float[] b) { [e] b = Neg(m) }>"
    )
    text = (
        "g (float[1,8,4,4] x) => (float[] y) { n = Conv(x, v) m = Transpose<perm=[0,2,3,1]>(n) "
        f"s = ReduceSum<keepdims=0>(x) c = Greater(s, zero) y = If(c) {branches} }}"
    )
    model = graph_text(text, v=weights(8, 8, 1, 1), zero=0.0)
    guarded = compiled(model, *TO_QDQ)
    moved = next(n for n in guarded.graph.nodes if n.op == "Transpose")
    assert ir.producer(moved.inputs[0]).op == "DequantizeLinear"
    plain, guard = ir.to_proto(guarded.graph), GuardFloat()
    assert guard.run(guarded) == 1
    assert guard.run(guarded) == 0
    assert ir.producer(moved.inputs[0]).op == "Max"
    one, other = ir.to_proto(guarded.graph), ir.to_proto(compiled(model, *TO_KERNELS, GuardFloat()).graph)
    for seed in range(4):
        feeds = random_feeds(model, seed)
        both = (run(session(m, optimize=False), feeds)[0] for m in (plain, one))
        np.testing.assert_array_equal(*both)
        np.testing.assert_array_equal(*(run(session(m), feeds)[0] for m in (one, other)))


def test_a_scale_that_is_made_at_run_time_stays() -> None:
    text = (
        "g (float[1,8,4,4] x) => (float[] y) { q, s, z = DynamicQuantizeLinear(x) d = DequantizeLinear(q, s, z) "
        "p = MaxPool<kernel_shape=[2,2]>(d) y = Conv(p, v) }"
    )
    state = compiled(graph_text(text, v=weights(8, 8, 1, 1)), *TO_KERNELS)
    guard = GuardFloat()
    guard.run(state)
    assert guard.run(state) == 0
    assert "DynamicQuantizeLinear" in [n.op for n in state.graph.nodes]
