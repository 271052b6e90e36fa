"""The built-in targets."""

from __future__ import annotations

from dataclasses import replace

from qcompiler.ops import Lowering
from qcompiler.quant import QuantSpec
from qcompiler.target import Alignment, Target

_ALL = frozenset(Lowering) - {Lowering.NONE}

_LAYERS = frozenset({Lowering.NORM, Lowering.PRODUCT, Lowering.SOFTMAX})
"""What takes integers of 64 bits: exact where all is integer, slower than float where there is float."""

_SLOW = "its uint8 kernel is slower than float, or there is none"

ORT_CPU = Target(
    name="ort-cpu",
    description="ONNX Runtime on x86 with VNNI and on ARM: uint8 activations, int8 weights per channel",
    activation=QuantSpec("uint8", 0, 255),
    weight=QuantSpec("int8", -128, 127, symmetric=True),
    lowerings=_ALL - _LAYERS,
    stays_float=dict.fromkeys(
        ("Softmax", "ConvTranspose", "PRelu", "Where", "AveragePool", "ReduceMean", "ReduceMax", "ReduceMin"), _SLOW
    ),
    float_result=frozenset({"Gemm", "MatMul"}),
    kernels=frozenset(
        {
            "QLinearConv",
            "QLinearMatMul",
            "com.microsoft.QGemm",
            "com.microsoft.MatMulIntegerToFloat",
            "com.microsoft.DynamicQuantizeMatMul",
            "com.microsoft.DynamicQuantizeLSTM",
            "com.microsoft.GatherBlockQuantized",
            "com.microsoft.MatMulNBits",
            "com.microsoft.QLinearAdd",
            "com.microsoft.QLinearMul",
            "com.microsoft.QLinearConcat",
            "com.microsoft.QLinearGlobalAveragePool",
            "com.microsoft.QLinearSigmoid",
            "com.microsoft.QLinearLeakyRelu",
        }
    ),
    rewrites=frozenset(
        {
            "QuickGelu",
            "channel-shuffle",
            "average-pool-as-conv",
            "hard-swish-as-mul",
            "overlapping-conv-transpose-as-conv",
        }
    ),
    alignment=Alignment(inputs=4, outputs=4, least=16, depthwise=16, block=32),
    profile="ort-cpu",
)

# The cost table is that of newer machines: it places well as long as float and int8 are slower there by like factors, and
# `qcompile profile` measures one where they are not.
ORT_CPU_AVX2 = replace(
    ORT_CPU,
    name="ort-cpu-avx2",
    description="ONNX Runtime on older x86: 7-bit weights, because U8S8 products saturate at 16 bits there",
    weight=QuantSpec("int8", -64, 63, symmetric=True),
)

INTEGER = Target(
    name="integer",
    description="integer-only accelerators: whatever can be is integer arithmetic in standard operators",
    activation=QuantSpec("uint8", 0, 255),
    weight=QuantSpec("int8", -128, 127, symmetric=True),
    lowerings=_ALL,
    rewrites=frozenset(
        {
            "MaskedSoftmax",
            "QuickGelu",
            "RMSNormalization",
            "attention-as-products",
            "average-pool-as-conv",
            "channel-norm-as-layer-norm",
            "conv-transpose-as-conv",
            "interpolation-as-product",
            "pool-as-reduce",
            "sub-as-add",
        }
    ),
)

TARGETS = (ORT_CPU, ORT_CPU_AVX2, INTEGER)
