"""Targets claim nothing that they cannot run: each operator that they call integer is compiled between two layers and run."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from qcompiler_passes.targets import INTEGER, ORT_CPU, ORT_CPU_AVX2, TARGETS

from qcompiler import float_functions, functions
from qcompiler.ops import OPS, Result
from qcompiler.target import Target
from tests.forms import all_forms, assert_bit_identical, graph_text, inferred, ops_between, weights

# What stands between two Convs: m = ...; a and b are float[1,8,8,8], results of Convs.
CASES: dict[str, list[str]] = {
    "Conv": [
        "m = Conv(a, w3)",
        "m = Conv<pads=[1,1,1,1]>(a, w3, bias)",
        "m = Conv<pads=[0,1,2,1], strides=[2,1]>(a, w3, bias)",
        "m = Conv<dilations=[2,2], pads=[2,2,2,2]>(a, w3)",
        "m = Conv<group=2>(a, w_grouped, bias)",
        "m = Conv<group=8, pads=[1,1,1,1]>(a, w_depthwise, bias)",
    ],
    "Gemm": ["f = Flatten(a) m = Gemm(f, w512, bias)", "f = Flatten(a) m = Gemm(f, w512, one_bias)"],
    "MatMul": ["m = MatMul(a, w8)", "f = Reshape(a, tokens) m = MatMul(f, w64)"],
    "Add": [
        "m = Add(a, b)",
        "m = Add(a, a)",
        "m = Add(per_channel, a)",
        "s = Add(a, b) m = Relu(s)",
    ],
    "Mul": [
        "m = Mul(a, b)",
        "m = Mul(a, a)",
        "m = Mul(a, half)",
        "m = Mul(per_channel, a)",
        "s = Mul(a, b) m = Relu(s)",
    ],
    "Concat": ["m = Concat<axis=1>(a, b)", "m = Concat<axis=1>(a, a)", "m = Concat<axis=2>(a, b, a)"],
    "GlobalAveragePool": ["m = GlobalAveragePool(a)"],
    "ReduceMean": ["m = ReduceMean(a, space)", "p = ReduceMean(a, axis1) m = Mul(p, a)"],
    "ReduceMax": ["m = ReduceMax(a, space)"],
    "ReduceMin": ["m = ReduceMin(a, space)"],
    "PRelu": ["m = PRelu(a, per_channel)"],
    "Relu": ["c = Concat<axis=1>(a, b) m = Relu(c)"],
    "Clip": ["c = Concat<axis=1>(a, b) m = Clip(c, zero, half)", "c = Concat<axis=1>(a, b) m = Clip(c, , half)"],
    "MaxPool": [
        "m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)",
        "m = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(a)",
        "m = MaxPool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(a)",
    ],
    "Pad": [
        "m = Pad(a, pads)",
        "m = Pad(a, pads, zero)",
        "m = Pad(a, pads, half)",
        'm = Pad<mode="edge">(a, pads)',
        'm = Pad<mode="reflect">(a, pads)',
    ],
    "Resize": [
        'm = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(a, , scales)',
        'm = Resize<mode="nearest">(a, , , sizes)',
        *(
            f'm = Resize<mode="nearest", coordinate_transformation_mode="{where}", nearest_mode="ceil">(a, , , sizes)'
            for where in ("half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")
        ),
    ],
    "Reshape": ["m = Reshape(a, tokens)", "m = Reshape(a, image)"],
    "Flatten": ["m = Flatten(a)"],
    "Squeeze": ["m = Squeeze(a, axis0)"],
    "Unsqueeze": ["s = Squeeze(a, axis0) m = Unsqueeze(s, axis0)"],
    "Transpose": ["m = Transpose<perm=[0,1,3,2]>(a)"],
    "Slice": ["m = Slice(a, one, five, axis3)"],
    "Split": ["s, t = Split<axis=1, num_outputs=2>(a) m = Concat<axis=1>(t, s)"],
    "Gather": ["m = Gather<axis=1>(a, order)"],
    "DepthToSpace": ["m = DepthToSpace<blocksize=2>(a)", 'm = DepthToSpace<blocksize=2, mode="CRD">(a)'],
    "SpaceToDepth": ["m = SpaceToDepth<blocksize=2>(a)"],
    "Expand": ["p = GlobalAveragePool(a) m = Expand(p, image)"],
    "Tile": ["m = Tile(a, repeats)"],
    "Identity": ["m = Identity(a)"],
    "LeakyRelu": ["m = LeakyRelu<alpha=0.2>(a)", "m = LeakyRelu<alpha=-0.1>(a)"],
    "HardSigmoid": ["m = HardSigmoid(a)", "m = HardSigmoid<alpha=0.1666667, beta=0.5>(a)"],
    "Elu": ["m = Elu(a)", "m = Elu<alpha=0.3>(a)"],
    "Celu": ["m = Celu<alpha=0.3>(a)"],
    "Selu": ["m = Selu(a)", "m = Selu<alpha=1.5, gamma=0.7>(a)"],
    "ThresholdedRelu": ["m = ThresholdedRelu<alpha=0.4>(a)"],
    "Gelu": ["m = Gelu(a)", 'm = Gelu<approximate="tanh">(a)'],
    "Sqrt": ["p = Abs(a) m = Sqrt(p)"],
    "Reciprocal": ["p = Sigmoid(a) m = Reciprocal(p)"],
    "com.microsoft.QuickGelu": ["m = com.microsoft.QuickGelu<alpha=1.0>(a)", "m = com.microsoft.QuickGelu(a)"],
    "LayerNormalization": [
        "m = LayerNormalization(a, gamma, beta)",
        "m = LayerNormalization<axis=3, epsilon=1.0>(a, gamma)",
    ],
    "RMSNormalization": ["m = RMSNormalization(a, gamma)"],
    "qcompiler.RMSNormalization": ["m = qcompiler.RMSNormalization<epsilon=1.0>(a, gamma)"],
    "qcompiler.MaskedSoftmax": [
        "m = qcompiler.MaskedSoftmax(a, causal)",
        "r = ReduceMax(x, axis1) s = MatMul(a, b) p = qcompiler.MaskedSoftmax(s, r) m = MatMul(p, b)",
    ],
    "Softmax": ["m = Softmax(a)", "s = MatMul(a, b) p = Softmax<axis=3>(s) m = MatMul(p, b)"],
    "com.microsoft.Gelu": ["m = com.microsoft.Gelu(a)"],
    "com.microsoft.FastGelu": ["m = com.microsoft.FastGelu(a)"],
} | {
    op: [f"m = {op}(a)"]
    for op in ("Sigmoid", "HardSwish", "Tanh", "Softplus", "Softsign", "Erf", "Mish", "Abs", "Neg", "Exp", "Sin", "Cos")
}

INTEGER_CASES = ("Conv", "Gemm", "Tanh", "LayerNormalization", "Softmax")

KERNELS = {
    "Conv": "QLinearConv",
    "Gemm": "QGemm",
    "MatMul": "QLinearMatMul",
    "Add": "QLinearAdd",
    "Mul": "QLinearMul",
    "GlobalAveragePool": "QLinearGlobalAveragePool",
    "Sigmoid": "QLinearSigmoid",
    "LeakyRelu": "QLinearLeakyRelu",
}

CONSTANTS: dict[str, Any] = {
    "w3": weights(8, 8, 3, 3),
    "w_grouped": weights(8, 4, 1, 1),
    "w_depthwise": weights(8, 1, 3, 3),
    "w512": weights(512, 8) * 8,
    "w8": weights(8, 8),
    "w64": weights(64, 8),
    "bias": np.linspace(-1, 1, 8, dtype=np.float32),
    "gamma": np.linspace(-2, 1, 8, dtype=np.float32),
    "beta": np.linspace(1, -1, 8, dtype=np.float32),
    "per_channel": np.linspace(-2, 1, 8, dtype=np.float32).reshape(8, 1, 1),
    "one_bias": np.float32([0.3]),
    "half": 0.5,
    "zero": 0.0,
    "pads": [0, 0, 1, 0, 0, 0, 1, 2],
    "scales": np.float32([1, 1, 2, 2]),
    "sizes": [1, 8, 16, 12],
    "tokens": [1, 8, 64],
    "image": [1, 8, 8, 8],
    "axis0": [0],
    "axis1": [1],
    "space": [2, 3],
    "axis3": [3],
    "causal": np.triu(np.full((8, 8), -np.inf, np.float32), 1),
    "one": [1],
    "five": [5],
    "order": [7, 6, 5, 4, 3, 2, 1, 0],
    "repeats": [1, 2, 1, 2],
}


def between_layers(middle: str) -> onnx.ModelProto:
    """x -> Conv -> middle -> Conv (or MatMul, if the middle ends in a matrix) -> y."""
    needed = {
        k: v for k, v in CONSTANTS.items() if k in middle.replace("(", " ").replace(",", " ").replace(")", " ").split()
    }
    head = f"a = Conv(x, wa, wb) b = Conv(x, wb4) {middle}"
    stem = {"wa": weights(8, 3, 1, 1, seed=1), "wb": weights(8), "wb4": weights(8, 3, 1, 1, seed=2)}
    opset = 23 if " RMSNormalization" in middle else 20
    probe = graph_text(f"g (float[1,3,8,8] x) => (float[] m) {{ {head} }}", opset, **stem, **needed)
    shape = [d.dim_value for d in probe.graph.output[0].type.tensor_type.shape.dim] or [1, 8, 8, 8]
    last = weights(4, shape[1], 1, 1) if len(shape) == 4 else weights(shape[-1], 4)
    op = "Conv" if len(shape) == 4 else "MatMul"
    text = f"g (float[1,3,8,8] x) => (float[] y) {{ {head} y = {op}(m, last) }}"
    model = graph_text(text, opset, **stem, **needed, last=last)
    model.functions.extend(
        functions.proto(name, opset) for name in float_functions.BODIES if f"qcompiler.{name}" in middle
    )
    return inferred(model)


def claimed(target: Target) -> list[str]:
    """The rows that the target runs in integers."""
    return [
        key
        for key, rule in OPS.items()
        if key not in target.stays_float and rule.result is not Result.FLOAT and rule.lowering in target.lowerings
    ]


def cases(target: Target) -> list[Any]:
    return [pytest.param(key, text, id=text) for key in claimed(target) for text in CASES.get(key, ())]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_every_claim_has_a_case(target: Target) -> None:
    assert set(claimed(target)) <= set(CASES)


@pytest.mark.parametrize(("key", "middle"), cases(ORT_CPU))
def test_ort_cpu_runs_what_it_claims(key: str, middle: str) -> None:
    forms = all_forms(between_layers(middle), ORT_CPU)
    reasons = {b.reason for b in forms.state.blocks.values() if b.reason}
    assert not reasons
    assert_bit_identical(forms)
    assert not ops_between(forms.integer)
    if key in KERNELS:
        assert KERNELS[key] in [n.op_type for n in forms.kernels.graph.node]


@pytest.mark.parametrize(("key", "middle"), [p for p in cases(INTEGER) if p.values[0] in INTEGER_CASES])
def test_the_integer_target_ends_in_standard_integer_operators(key: str, middle: str) -> None:
    forms = all_forms(between_layers(middle), INTEGER)
    assert_bit_identical(forms)
    assert forms.kernels.graph.node == forms.integer.graph.node
    floats = {"QuantizeLinear", "DequantizeLinear"}
    ops = [n.op_type for n in forms.integer.graph.node]
    assert [op for op in ops if op in floats] == ["QuantizeLinear", "DequantizeLinear"]
    assert not {"QLinearConv", "QGemm", "QLinearAdd", key} & set(ops) - {"Tanh"}


@pytest.mark.parametrize("target", [ORT_CPU, INTEGER], ids=lambda t: t.name)
def test_functions_in_a_row_take_one_step(target: Target) -> None:
    forms = all_forms(between_layers("h = HardSwish(a) s = Mul(half, h) t = Add(s, half) m = Relu(t)"), target)
    assert_bit_identical(forms)
    assert [n.op_type for n in forms.integer.graph.node].count("Table") == 1


@pytest.mark.parametrize("key", ["Conv", "Gemm", "MatMul"])
def test_the_avx2_target_keeps_weights_in_seven_bits(key: str) -> None:
    for middle in CASES[key]:
        forms = all_forms(between_layers(middle), ORT_CPU_AVX2)
        assert_bit_identical(forms, seeds=(0,))
        for tensor in forms.kernels.graph.initializer:
            values = onnx.numpy_helper.to_array(tensor)
            if values.dtype == np.int8:
                assert values.min(initial=0) >= -64
                assert values.max(initial=0) <= 63


def test_operators_that_run_better_in_float_stay_float() -> None:
    state = all_forms(between_layers("m = Softmax<axis=1>(a)"), ORT_CPU).state
    assert [b.reason for b in state.blocks.values() if b.reason] == [
        "its uint8 kernel is slower than float, or there is none"
    ]
