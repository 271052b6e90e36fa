"""Raising the opset keeps what a model computes: old and new run in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state
from qcompiler_passes.normalize import Normalize

from qcompiler.errors import UserError
from qcompiler.load import load_model
from qcompiler.opset import NEWEST, UPGRADES
from tests.support import assert_same_function, model_from_text, ops_of, run_passes

COMPATIBLE = """
    Abs Add ArgMax ArgMin AveragePool Cast Ceil Compress Concat Constant Conv ConvTranspose CumSum DepthToSpace DequantizeLinear
    Div Equal Erf Exp Expand Flatten Floor GRU Gather GatherElements GatherND Gemm Greater GreaterOrEqual Identity If IsNaN LRN
    LSTM LeakyRelu Less LessOrEqual Log Loop LpPool MatMul Max MaxPool MaxUnpool Mean MeanVarianceNormalization Min Mod Mul Neg
    NegativeLogLikelihoodLoss NonMaxSuppression NonZero OneHot PRelu Pow QuantizeLinear RNN Reciprocal ReduceL1 ReduceL2
    ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare Relu ScatterElements ScatterND
    Shape Sigmoid Sign Size SoftmaxCrossEntropyLoss SpaceToDepth Sqrt Sub Sum Tanh Tile Transpose Where
"""
"""Reviewed: later versions add types, axes or attributes with a neutral default."""


FIRST_CHANGE = 8
"""ONNX Runtime has no kernels for what opset 7 changed."""

CHANGED_IN_7 = {
    "Add": "Add (x, x)",
    "And": "And (c, c)",
    "BatchNormalization": "BatchNormalization <is_test = 1> (x, s, s, s, s)",
    "Div": "Div (x, x)",
    "Dropout": "Dropout <is_test = 1> (x)",
    "Equal": "Equal (i, i)",
    "Gemm": "Gemm <broadcast = 1> (m, m, s)",
    "Greater": "Greater (x, x)",
    "Less": "Less (x, x)",
    "Mul": "Mul (x, x)",
    "Or": "Or (c, c)",
    "PRelu": "PRelu (x, s)",
    "Pow": "Pow (x, x)",
    "Sub": "Sub (x, x)",
    "Xor": "Xor (c, c)",
}
"""What it changed in meaning; recurrent operators and AveragePool got an attribute less or more."""


@pytest.mark.parametrize("op", CHANGED_IN_7)
def test_what_changed_in_opset_7_does_not_load(op: str) -> None:
    inputs = "float[1,3,2,2] x, bool[3] c, int32[3] i, float[3] s, float[3,3] m"
    kind = {"And": "bool[3]", "Equal": "bool[3]", "Or": "bool[3]", "Xor": "bool[3]", "Gemm": "float[3,3]"}.get(
        op, "float[a,b,c,d]"
    )
    kind = "bool[a,b,c,d]" if op in ("Greater", "Less") else kind
    with pytest.raises(UserError, match=r"Could not find an implementation.*export with opset 7 or newer"):
        load_model(model_from_text(f"g ({inputs}) => ({kind} y) {{ y = {CHANGED_IN_7[op]} }}", opset=6))


def test_every_operator_that_changed_was_reviewed() -> None:
    versions: dict[str, set[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            versions.setdefault(schema.name, set()).add(schema.since_version)
    changed = {
        name for name, since in versions.items() if any(FIRST_CHANGE <= v <= NEWEST and min(since) < v for v in since)
    }
    assert set(COMPATIBLE.split()).isdisjoint(UPGRADES)
    assert changed == set(COMPATIBLE.split()) | set(UPGRADES)
    for op, steps in UPGRADES.items():
        assert set(steps) <= versions[op]


def test_older_operators_that_run_mean_the_same_in_opset_6() -> None:
    """Of what changed before opset 7, ONNX Runtime has kernels for the old form of Reshape only."""
    kernels = [k for k in onnxruntime_pybind11_state.get_all_opkernel_def() if k.provider == "CPUExecutionProvider"]
    changed = set()
    for kernel in kernels:
        first, last = kernel.version_range
        known = not kernel.domain and onnx.defs.has(kernel.op_name, 6, "")  # there are operators of before ONNX, too
        if known and first < onnx.defs.get_schema(kernel.op_name, 6, "").since_version:
            changed.add((kernel.op_name, last))
    assert changed == {("Reshape", 4)}


SCAN = """g (float[2,2] s, float[2,3,2] a, float[2,3] b, int64[2] lengths) => (float[2,2] t, float[2,3,2] r)
    {{ t, r = Scan <num_scan_inputs = 2, body = body (float[2] s0, float[2] a0, float b0) => (float[2] s1, float[2] r0)
    {{ m = Mul (a0, b0) s1 = Add (s0, m) r0 = Identity (s1) }}> ({}, s, a, b) }}"""
"""Running sums, a batch of two."""


X = "g (float[2,3,4,5] x) => (float[a,b,c,d] y)"

CASES = {
    "batchnorm-8": (
        8,
        f"{X} <float[3] s = {{1,2,3}}, float[3] b = {{0.1,0.2,0.3}}, float[3] m = {{0,1,-1}}, float[3] v = {{1,0.5,2}}>"
        " { y = BatchNormalization <epsilon = 0.01> (x, s, b, m, v) }",
    ),
    "conv-6": (6, "g (float[2,3,4,5] x, float[2,3,3,3] w) => (float[a,b,c,d] y) { t = Conv (x, w) y = Relu (t) }"),
    "clip-7": (7, f"{X} {{ y = Clip <min = -0.5, max = 0.25> (x) }}"),
    "clip-10-one-bound": (10, f"{X} {{ y = Clip <max = 0.25> (x) }}"),
    "clip-10-none": (10, f"{X} {{ y = Clip (x) }}"),
    "dropout-7": (7, f"{X} {{ y, mask = Dropout <ratio = 0.4> (x) }}"),
    "dropout-10": (10, f"{X} {{ y = Dropout <ratio = 0.4> (x) }}"),
    "pad-7": (7, f"{X} {{ y = Pad <pads = [0,0,1,2,0,0,1,0], value = 1.5> (x) }}"),
    "pad-10-reflect": (10, f'{X} {{ y = Pad <mode = "reflect", pads = [0,0,1,2,0,0,1,0]> (x) }}'),
    "slice-9": (9, f"{X} {{ y = Slice <axes = [2,3], starts = [1,-2], ends = [9,5]> (x) }}"),
    "slice-7-all-axes": (7, f"{X} {{ y = Slice <starts = [0,1,1,1], ends = [2,3,3,-1]> (x) }}"),
    "squeeze-11": (11, "g (float[2,1,4,1] x) => (float[2,4,1] y) { y = Squeeze <axes = [1]> (x) }"),
    "squeeze-9-all": (9, "g (float[2,1,4,1] x) => (float[2,4] y) { y = Squeeze (x) }"),
    "unsqueeze-9": (9, "g (float[2,4] x) => (float[1,2,4,1] y) { y = Unsqueeze <axes = [0,3]> (x) }"),
    "reduce-sum-11": (11, f"{X} {{ y = ReduceSum <axes = [1,-1], keepdims = 1> (x) }}"),
    "reduce-sum-12-all": (12, "g (float[2,3] x) => (float y) { y = ReduceSum <keepdims = 0> (x) }"),
    "reduce-mean-9": (9, f"{X} {{ y = ReduceMean <axes = [2,3], keepdims = 1> (x) }}"),
    "split-11": (11, f"{X} {{ p, q = Split <axis = 3, split = [2,3]> (x) y = Concat <axis = 3> (q, p) }}"),
    "split-7-equal": (7, f"{X} {{ p, q = Split <axis = 2> (x) y = Sub (q, p) }}"),
    "softmax-9": (9, f"{X} {{ y = Softmax (x) }}"),
    "softmax-11-last": (11, f"{X} {{ y = Softmax <axis = -1> (x) }}"),
    "softmax-12-all": (12, f"{X} {{ y = Softmax <axis = 0> (x) }}"),
    "log-softmax-11": (11, f"{X} {{ y = LogSoftmax <axis = 2> (x) }}"),
    "softmax-11-thin": (11, "g (float[2,7,1,1] x) => (float[2,7,1,1] y) { y = Softmax <axis = 1> (x) }"),
    "softmax-11-dynamic": (11, "g (float[n,3,w] x) => (float[n,3,w] y) { y = Softmax <axis = 1> (x) }"),
    "hardmax-11": (11, f"{X} {{ y = Hardmax <axis = 2> (x) }}"),
    "topk-9": (9, "g (float[4,9] x) => (float[4,3] y, int64[4,3] i) { y, i = TopK <axis = 1, k = 3> (x) }"),
    "upsample-7": (7, f'{X} {{ y = Upsample <mode = "nearest", scales = [1.0,1.0,2.0,3.0]> (x) }}'),
    "upsample-7-linear": (7, f'{X} {{ y = Upsample <mode = "linear", scales = [1.0,1.0,2.0,3.0]> (x) }}'),
    "upsample-9": (9, f"{X} <float[4] s = {{1,1,1.5,2}}> {{ y = Upsample (x, s) }}"),
    "resize-10": (10, f"{X} <float[4] s = {{1,1,2.5,2}}> {{ y = Resize (x, s) }}"),
    "resize-10-linear": (10, f'{X} <float[4] s = {{1,1,0.6,0.7}}> {{ y = Resize <mode = "linear"> (x, s) }}'),
    "resize-10-shrink": (10, f"{X} <float[4] s = {{1,1,0.6,0.7}}> {{ y = Resize (x, s) }}"),
    "resize-11-sizes": (
        11,
        f"{X} <float[0] none = {{}}, int64[4] size = {{2,3,7,9}}>"
        ' { y = Resize <mode = "linear", coordinate_transformation_mode = "align_corners"> (x, none, none, size) }',
    ),
    "scatter-9": (
        9,
        "g (float[3,4] x) => (float[3,4] y) <int64[1,2] i = {2,0}, float[1,2] u = {9,8}> { y = Scatter <axis = 0> (x, i, u) }",
    ),
    "roi-align-10": (
        10,
        "g (float[1,2,8,8] x) => (float[1,2,2,2] y) <float[1,4] r = {1,1,6,5}, int64[1] i = {0}>"
        " { y = RoiAlign <output_height = 2, output_width = 2, sampling_ratio = 2> (x, r, i) }",
    ),
    "body-9": (
        9,
        "g (float[2,3] x, bool c) => (float[2,3] y) { y = If (c) <"
        "then_branch = a () => (float[2,3] r) { p = Unsqueeze <axes = [0]> (x) q = Clip <max = 0.5> (p) "
        "r = Squeeze <axes = [0]> (q) }, else_branch = b () => (float[2,3] s) { s = Softmax <axis = 0> (x) }> }",
    ),
    "lstm-7": (
        7,
        "g (float[4,1,3] x, float[1,8,3] w, float[1,8,2] r) => (float[4,1,1,2] y) { y = LSTM <hidden_size = 2> (x, w, r) }",
    ),
    "reshape-1": (1, "g (float[2,6] x) => (float[3,4] y) { y = Reshape <shape = [3,-1]> (x) }"),
    "scan-8": (8, SCAN.format("")),
    "scan-8-backwards": (8, SCAN.format("").replace("num_scan", "directions = [1,0], num_scan")),
    "max-pool-7": (7, f"{X} {{ y = MaxPool <kernel_shape = [2,2], strides = [2,2]> (x) }}"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_old_model_computes_the_same_at_the_new_opset(case: str) -> None:
    opset, text = CASES[case]
    model = model_from_text(text, opset=opset)
    raised, state = run_passes(model, Normalize())
    onnx.checker.check_model(raised)
    assert [d.version for d in raised.opset_import if d.domain == ""] == [17]
    assert state.graph.opset == 17
    assert_same_function(model, raised)
    assert Normalize().run(state) == 0


def test_softmax_over_one_axis_stays_one_node() -> None:
    for case in ("softmax-11-last", "softmax-11-thin"):
        opset, text = CASES[case]
        assert ops_of(run_passes(model_from_text(text, opset=opset), Normalize())[0]) == ["Softmax"]


def test_attributes_become_constants_of_the_data_type() -> None:
    text = "g (double[4] x) => (double[5] y) { c = Clip <min = -0.5> (x) y = Pad <pads = [0,1], value = 2.0> (c) }"
    model = model_from_text(text, opset=10)
    state = run_passes(model, Normalize())[1]
    clip, pad = state.graph.nodes
    assert [t.dtype for t in (clip.inputs[1], *pad.inputs[1:])] == [np.float64, np.int64, np.float64]


def test_a_newer_model_keeps_its_opset() -> None:
    model = model_from_text("g (float[2,3] x) => (float[2,3] y) { y = Relu (x) }", opset=19)
    assert run_passes(model, Normalize())[1].graph.opset == 19


@pytest.mark.parametrize(
    ("opset", "text", "message"),
    [
        (8, SCAN.format("lengths"), "Scan.*lengths of its sequences"),
        (
            7,
            f"{X} <float[60] s, float[60] b, float[60] m, float[60] v>"
            " { y = BatchNormalization <spatial = 0> (x, s, b, m, v) }",
            "BatchNormalization.*spatial = 0",
        ),
        (10, f"{X} <float[4] s = {{1,1,0.5,2}}> {{ y = Resize (x, s) }}", "Resize.*enlarges one axis"),
        (9, "g (float[2,3] x) => (float[2,3] y, float[2,3] m) { y, m = Dropout (x) }", "Dropout.*mask"),
    ],
)
def test_what_has_no_new_form_is_refused(opset: int, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_passes(model_from_text(text, opset=opset), Normalize())


def test_batchnorm_with_unused_statistics_is_inference() -> None:
    text = f"{X} <float[3] s = {{1,2,3}}> {{ y, a, b, c, d = BatchNormalization (x, s, s, s, s) }}"
    model, state = run_passes(model_from_text(text, opset=9), Normalize())
    assert len(state.graph.nodes[0].outputs) == 1
    onnx.checker.check_model(model)
    assert np.dtype(state.graph.outputs[0].dtype) == np.float32
