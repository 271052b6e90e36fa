"""What each pass makes of one small graph, as text: the place to see at a glance what a pass does, and that it changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from textwrap import dedent

import numpy as np
import pytest
from qcompiler_passes import DEFAULT_PIPELINE, LEVELS, MODES

from qcompiler import ir
from qcompiler.pipeline import Pass, Pipeline, parse_pipeline
from qcompiler.plugin import load_registry
from qcompiler.state import CompileState
from qcompiler.text import format_graph
from qcompiler.verify import verify
from tests.support import model_from_text

REGISTRY = load_registry()
SAMPLES = [{"x": np.full((1, 1, 2, 2), value, np.float32)} for value in (-1, 0, 1, 3)]


def f(*values: float, shape: tuple[int, ...] = (1, 1, 1, 1)) -> np.ndarray:
    return np.array(values, np.float32).reshape(shape)


@dataclass(frozen=True)
class Golden:
    """A graph from x to y, and the text after the pass. `before`: passes that run first; all of the pipeline's by default."""

    body: str
    constants: Mapping[str, np.ndarray]
    expected: str
    before: str | None = ""
    signature: str = "float[1,1,2,2] x) => (float[1,1,2,2] y"
    show: Callable[[CompileState], list[str]] = field(default=lambda state: [])
    keep_float: Mapping[str, str] = field(default_factory=dict)
    target: str = "ort-cpu"


def blocks(state: CompileState) -> list[str]:
    """A line per block."""
    return [
        f"block {' + '.join(b.nodes)} {b.low:g}..{b.high:g}{' integer' if b.quantized else ''}{b.reason and ' ' + b.reason}"
        for b in state.blocks.values()
    ]


def specs(state: CompileState) -> list[str]:
    """A line per block, and one per tensor to quantize."""
    return blocks(state) + [f"spec {name} {s.dtype} like {state.leader(name)}" for name, s in state.specs.items()]


def placed(state: CompileState) -> list[str]:
    """A line per block."""
    return [f"block {b.root} {b.reason.partition(':')[0] or 'integer'}" for b in state.blocks.values()]


def work(state: CompileState) -> list[str]:
    """A line per piece of work."""
    return [f"work {w.kind} {w.reads:g} {w.writes:g}" for w in state.float_work]


def params(state: CompileState) -> list[str]:
    """A line per tensor that has params."""
    return [f"params {n} {p.spec.dtype} {float(p.scale.max()):.4g} {p.zero_point}" for n, p in state.params.items()]


def factors(state: CompileState) -> list[str]:
    """A line per tensor that has Power-of-Two Factors."""
    return [f"factors {n} {float(p.scale):.4g} * 2**{p.exponents}" for n, p in state.params.items() if p.exponents]


def imported(state: CompileState) -> list[str]:
    """A line per tensor whose params the model came with."""
    return [f"imported {n} {p.spec.dtype} {float(p.scale):.4g} {p.zero_point}" for n, p in state.imported.items()]


def integers(state: CompileState) -> list[str]:
    """A line per weight that is not rounded to nearest."""
    return [f"integers {name} {values.reshape(-1).tolist()}" for name, values in state.integers.items()]


def constants(state: CompileState) -> list[str]:
    """A line per constant that a node reads."""
    found = {t.name: t for n in state.graph.nodes for t in n.inputs if ir.is_constant(t)}
    return [f"constant {name} {[float(f'{v:.4g}') for v in ir.array(t).reshape(-1)]}" for name, t in found.items()]


QUANTIZED = "c = Conv(x, w, b) r = Relu(c) s = Sigmoid(r) y = Conv(s, v)"
WEIGHTS = {"w": f(0.5), "b": f(0.25, shape=(1,)), "v": f(-1)}

GOLDEN: dict[str, Golden] = {
    "account": Golden(
        "r = Relu(x) y = Sigmoid(r)",
        {},
        """
        inputs: x:float32[1,1,2,2]
        r = Relu(x)
        y = Sigmoid(r)
        outputs: y:float32[1,1,2,2]
        work run 0 0
        work float.Relu 4 4
        work float.Sigmoid 4 4
        """,
        show=work,
    ),
    "align-scales": Golden(
        "c = Conv(x, w, b) d = Conv(x, v) a = Add(c, d) y = Conv(a, w)",
        WEIGHTS,
        """
        inputs: x:float32[1,1,2,2]
        c = Conv(x, 0.5, 0.25)
        d = Conv(x, -1)
        a = Add(c, d)
        y = Conv(a, 0.5)
        outputs: y:float32[1,1,2,2]
        params x uint8 0.01571 64
        params c uint8 0.00785 32
        params d uint8 0.01579 190
        params a uint8 0.007895 160
        params y uint8 0.003947 160
        """,
        before=None,
        show=params,
    ),
    "annotate": Golden(
        QUANTIZED,
        WEIGHTS,
        """
        inputs: x:float32[1,1,2,2]
        c = Conv(x, 0.5, 0.25)
        r = Relu(c)
        s = Sigmoid(r)
        y = Conv(s, -1)
        outputs: y:float32[1,1,2,2]
        block Conv_c + Relu_r 0..inf integer
        block Sigmoid_s -inf..inf integer
        block Conv_y -inf..inf integer
        spec x uint8 like x
        spec r uint8 like r
        spec s uint8 like s
        spec y uint8 like y
        """,
        before=None,
        show=specs,
    ),
    "calibrate": Golden(
        QUANTIZED,
        WEIGHTS,
        """
        inputs: x:float32[1,1,2,2]
        c = Conv(x, 0.5, 0.25)
        r = Relu(c)
        s = Sigmoid(r)
        y = Conv(s, -1)
        outputs: y:float32[1,1,2,2]
        params x uint8 0.01571 64
        params r uint8 0.006863 0
        params s uint8 0.003341 0
        params y uint8 0.003354 254
        """,
        before=None,
        show=params,
    ),
    "choose-ranges": Golden(
        "y = Conv(x, w, b)",
        WEIGHTS,
        """
        inputs: x:float32[1,1,2,2]
        y = Conv(x, 0.5, 0.25)
        outputs: y:float32[1,1,2,2]
        params x uint8 0.01571 64
        params y uint8 0.007848 32
        """,
        before="form-blocks,annotate,calibrate{collector=ema}",
        show=params,
    ),
    "cleanup": Golden(
        "y = Relu(x) d = Neg(x) e = Abs(d)",
        {},
        """
        inputs: x:float32[1,1,2,2]
        y = Relu(x)
        outputs: y:float32[1,1,2,2]
        """,
    ),
    "convert-float16": Golden(
        "c = Conv(x, w, b) e = Exp(c) y = Sigmoid(e)",
        WEIGHTS,
        """
        inputs: x:float32[1,1,2,2]
        x_half = Cast{to=10}(x)
        c_half = Conv(x_half, 0.5, 0.25)
        c = Cast{to=1}(c_half)
        e = Exp(c)
        e_half = Cast{to=10}(e)
        y_half = Sigmoid(e_half)
        y = Cast{to=1}(y_half)
        outputs: y:float32[1,1,2,2]
        block Conv_c -inf..inf integer float16
        """,
        before="normalize,form-blocks",
        show=blocks,
    ),
    "correct-bias": Golden(
        QUANTIZED,
        WEIGHTS,
        """
        inputs: x:float32[1,1,2,2]
        c = Conv(x, 0.5, 0.249362)
        r = Relu(c)
        s = Sigmoid(r)
        y = Conv(s, -1, 0.000633474)
        outputs: y:float32[1,1,2,2]
        """,
        before=None,
    ),
    "equalize": Golden(
        "c = Conv(x, w) r = Relu(c) y = Conv(r, v)",
        {"w": f(1, 0.0625, shape=(2, 1, 1, 1)), "v": f(1, 16, shape=(1, 2, 1, 1))},
        """
        inputs: x:float32[1,1,2,2]
        c_scaled = Conv(x, float32[2,1,1,1])
        r_scaled = Relu(c_scaled)
        y = Conv(r_scaled, float32[1,2,1,1])
        outputs: y:float32[1,1,2,2]
        constant Conv_c_weight [1.0, 0.7071]
        constant Conv_y_weight [1.0, 1.414]
        """,
        before="normalize",
        show=constants,
    ),
    "expand-activations": Golden(
        "c = Conv(x, w, b) y = HardSwish(c)",
        WEIGHTS,
        """
        inputs: x:float32[1,1,2,2]
        c_scaled = Conv(x, 0.204124, 0.102062)
        HardSwish_y_clip = Clip(c_scaled, -1.22474)
        HardSwish_y_add = Add(HardSwish_y_clip, 1.22474)
        HardSwish_y_clip_1 = Clip(HardSwish_y_add, 0, 2.44949)
        y = Mul(HardSwish_y_clip, HardSwish_y_clip_1)
        outputs: y:float32[1,1,2,2]
        """,
        before="normalize",
    ),
    "expand-operators": Golden(
        "y = ConvTranspose<strides=[2,2], pads=[1,1,1,1]>(x, w, b)",
        {"w": np.ones((16, 1, 4, 4), np.float32), "b": np.float32([0.5])},
        """
        inputs: x:float32[1,16,2,2]
        ConvTranspose_y_phases_output = Conv{group=1, pads=[1,1,1,1]}(x, float32[4,16,2,2], float32[4])
        ConvTranspose_y_1_output = DepthToSpace{blocksize=2, mode=CRD}(ConvTranspose_y_phases_output)
        y = Slice(ConvTranspose_y_1_output, int64[2], int64[2], int64[2])
        outputs: y:float32[1,1,4,4]
        """,
        before="normalize",
        signature="float[1,16,2,2] x) => (float[1,1,4,4] y",
    ),
    "fold-batchnorm": Golden(
        "c = Conv(x, w) y = BatchNormalization<epsilon = 0.0>(c, s, t, m, q)",
        {"w": f(0.5), **{k: f(v, shape=(1,)) for k, v in {"s": 6, "t": 1, "m": 2, "q": 4}.items()}},
        """
        inputs: x:float32[1,1,2,2]
        y = Conv(x, 1.5, -5)
        outputs: y:float32[1,1,2,2]
        """,
    ),
    "fold-bias": Golden(
        "c = Conv(x, w) a = Add(c, k) y = Mul(a, k)",
        {"w": f(0.5), "k": f(3)},
        """
        inputs: x:float32[1,1,2,2]
        y = Conv(x, 1.5, 9)
        outputs: y:float32[1,1,2,2]
        """,
        before="normalize",
    ),
    "fold-constants": Golden(
        "s = Shape(x) r = Reshape(x, s) k = Neg(w) y = Mul(r, k)",
        {"w": f(0.5)},
        """
        inputs: x:float32[1,1,2,2]
        y = Mul(x, -0.5)
        outputs: y:float32[1,1,2,2]
        """,
        before="normalize",
    ),
    "fold-pad": Golden(
        "p = Pad(x, n) y = Conv(p, w)",
        {"n": np.array([0, 0, 0, 1, 0, 0, 0, 0]), "w": np.ones((1, 1, 1, 2), np.float32)},
        """
        inputs: x:float32[1,1,2,2]
        y = Conv{pads=[0,1,0,0]}(x, float32[1,1,1,2])
        outputs: y:float32[1,1,2,2]
        """,
        before="normalize",
    ),
    "fold-scales": Golden(
        QUANTIZED,
        WEIGHTS,
        """
        inputs: x:float32[1,1,2,2]
        x_q = QuantizeLinear(x, 0.0157068, 64)
        Conv_c_acc = ConvInteger(x_q, 113, 64, 0)
        Conv_c_biased = Add(Conv_c_acc, 3595)
        r_raw_q = qcompiler.Requantize(Conv_c_biased, 664, 16, 0, 0, 255)
        s_raw_q = qcompiler.Table(r_raw_q, uint8[256])
        Conv_y_acc = ConvInteger(s_raw_q, -113, 0, 0)
        y_raw_q = qcompiler.Requantize(Conv_y_acc, 578, 16, 254, 0, 255)
        y = DequantizeLinear(y_raw_q, 0.00335414, 254)
        outputs: y:float32[1,1,2,2]
        """,
        before=None,
    ),
    "fold-width": Golden(
        "y = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w)",
        {"w": np.ones((16, 3, 3, 3), np.float32)},
        """
        inputs: x:float32[1,3,8,8]
        Conv_y_reshaped = Reshape(x, int64[5])
        Conv_y_transposed = Transpose{perm=[0,2,3,1,4]}(Conv_y_reshaped)
        Conv_y_reshaped_1 = Reshape(Conv_y_transposed, int64[4])
        Conv_y_transposed_1 = Transpose{perm=[0,3,1,2]}(Conv_y_reshaped_1)
        y_raw = Conv{kernel_shape=[3,2], pads=[1,1,1,0], strides=[2,1]}(Conv_y_transposed_1, float32[32,12,3,2])
        Conv_y_transposed_2 = Transpose{perm=[0,2,3,1]}(y_raw)
        Conv_y_reshaped_2 = Reshape(Conv_y_transposed_2, int64[4])
        y = Transpose{perm=[0,3,1,2]}(Conv_y_reshaped_2)
        outputs: y:float32[1,16,4,4]
        """,
        before="normalize",
        signature="float[1,3,8,8] x) => (float[1,16,4,4] y",
    ),
    "form-blocks": Golden(
        QUANTIZED,
        WEIGHTS,
        """
        inputs: x:float32[1,1,2,2]
        c = Conv(x, 0.5, 0.25)
        r = Relu(c)
        s = Sigmoid(r)
        y = Conv(s, -1)
        outputs: y:float32[1,1,2,2]
        block Conv_c + Relu_r 0..inf
        block Sigmoid_s -inf..inf
        block Conv_y -inf..inf
        """,
        before=None,
        show=blocks,
    ),
    "guard-float": Golden(
        "c = Conv(x, w, b) r = Relu(c) m = MaxPool<kernel_shape=[1,1]>(r) d = Conv(m, v) y = Conv(d, w)",
        {"w": f(1, 0, 0, 1, shape=(2, 2, 1, 1)), "b": f(0, 0, shape=(2,)), "v": f(0, 1, 1, 0, shape=(2, 2, 1, 1))},
        """
        inputs: x:float32[1,2,2,2]
        x_q = QuantizeLinear(x, 0.0157068, 64)
        r_raw_q = QLinearConv(x_q, 0.0157068, 64, int8[2,2,1,1], float32[2], int8[2], 0.0117647, 0, int32[2])
        r = DequantizeLinear{axis=1}(r_raw_q, float32[2], uint8[2])
        m = MaxPool{kernel_shape=[1,1]}(r)
        d = Conv(m, float32[2,2,1,1])
        d_q = QuantizeLinear(d, 0.0117647, 0)
        y_raw_q = QLinearConv(d_q, 0.0117647, 0, int8[2,2,1,1], float32[2], int8[2], 0.0117647, 0)
        y = DequantizeLinear(y_raw_q, 0.0117647, 0)
        outputs: y:float32[1,2,2,2]
        """,
        before=None,
        signature="float[1,2,2,2] x) => (float[1,2,2,2] y",
        keep_float={"m": "as asked", "d": "as asked"},
    ),
    "import-quantization": Golden(
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) c = Conv(d, w) p = QuantizeLinear(c, t, l) "
        "e = DequantizeLinear(p, t, l) y = Conv(e, v)",
        {
            **WEIGHTS,
            **{"s": np.float32(0.02), "z": np.int8(3), "t": np.float32(0.01), "l": np.int8(-128)},
        },
        """
        inputs: x:float32[1,1,2,2]
        c_raw = Conv(x, 0.5)
        c = Relu(c_raw)
        y = Conv(c, -1)
        outputs: y:float32[1,1,2,2]
        imported x uint8 0.02 130
        imported c uint8 0.01 0
        """,
        before="normalize",
        show=imported,
    ),
    "insert-qdq": Golden(
        QUANTIZED,
        WEIGHTS,
        """
        inputs: x:float32[1,1,2,2]
        w_q_dq = DequantizeLinear{axis=0}(113, 0.00442688, 0)
        b_q_dq = DequantizeLinear{axis=0}(3595, 6.95322e-05, 0)
        v_q_dq = DequantizeLinear{axis=0}(-113, 0.0088543, 0)
        x_q = QuantizeLinear(x, 0.0157068, 64)
        x_q_dq = DequantizeLinear(x_q, 0.0157068, 64)
        r_raw = Conv(x_q_dq, w_q_dq, b_q_dq)
        r_raw_q = QuantizeLinear(r_raw, 0.00686275, 0)
        r = DequantizeLinear(r_raw_q, 0.00686275, 0)
        s_raw = Sigmoid(r)
        s_raw_q = QuantizeLinear(s_raw, 0.00334099, 0)
        s = DequantizeLinear(s_raw_q, 0.00334099, 0)
        y_raw = Conv(s, v_q_dq)
        y_raw_q = QuantizeLinear(y_raw, 0.00335414, 254)
        y = DequantizeLinear(y_raw_q, 0.00335414, 254)
        outputs: y:float32[1,1,2,2]
        """,
        before=None,
    ),
    "lower-integer": Golden(
        QUANTIZED,
        WEIGHTS,
        """
        inputs: x:float32[1,1,2,2]
        x_q = QuantizeLinear(x, 0.0157068, 64)
        Conv_c_acc = ConvInteger(x_q, 113, 64, 0)
        Conv_c_biased = Add(Conv_c_acc, 3595)
        r_raw = DequantizeLinear{axis=-3}(Conv_c_biased, 6.95322e-05)
        r_raw_q = QuantizeLinear(r_raw, 0.00686275, 0)
        r = DequantizeLinear(r_raw_q, 0.00686275, 0)
        s_raw = Sigmoid(r)
        s_raw_q = QuantizeLinear(s_raw, 0.00334099, 0)
        Conv_y_acc = ConvInteger(s_raw_q, -113, 0, 0)
        y_raw = DequantizeLinear{axis=-3}(Conv_y_acc, 2.95821e-05)
        y_raw_q = QuantizeLinear(y_raw, 0.00335414, 254)
        y = DequantizeLinear(y_raw_q, 0.00335414, 254)
        outputs: y:float32[1,1,2,2]
        """,
        before=None,
    ),
    "migrate-scales": Golden(
        "n = LayerNormalization(x, g, b) y = MatMul(n, w)",
        {"g": f(1, 16, shape=(2,)), "b": f(1, 16, shape=(2,)), "w": f(1, 1, 0.25, 0.25, shape=(2, 2))},
        """
        inputs: x:float32[1,1,2,2]
        n_scaled = LayerNormalization(x, float32[2], float32[2])
        y = MatMul(n_scaled, float32[2,2])
        outputs: y:float32[1,1,2,2]
        constant g_1 [4.0, 16.0]
        constant b_1 [4.0, 16.0]
        constant MatMul_y_weight [0.25, 0.25, 0.25, 0.25]
        """,
        before="normalize",
        show=constants,
    ),
    "normalize": Golden(
        "k = Constant<value = float {2.0}>() i = Identity(x) m = Mul(i, k) y = Dropout(m)",
        {},
        """
        inputs: x:float32[1,1,2,2]
        y = Mul(x, 2)
        outputs: y:float32[1,1,2,2]
        """,
    ),
    "normalize-gemm": Golden(
        "m = MatMul(x, w) y = Add(m, b)",
        {"w": f(1, 2, 3, 4, shape=(2, 2)), "b": f(5, 6, shape=(2,))},
        """
        inputs: x:float32[3,2]
        y = Gemm(x, float32[2,2], float32[2])
        outputs: y:float32[3,2]
        """,
        before="normalize",
        signature="float[3,2] x) => (float[3,2] y",
    ),
    "normalize-pooling": Golden(
        "y = ReduceMean<axes = [2, 3]>(x)",
        {},
        """
        inputs: x:float32[1,3,4,4]
        y = GlobalAveragePool(x)
        outputs: y:float32[1,3,1,1]
        """,
        before="normalize",
        signature="float[1,3,4,4] x) => (float[1,3,1,1] y",
    ),
    "pad-channels": Golden(
        "c = Conv(x, w) r = Relu(c) y = Conv(r, v)",
        {"w": np.ones((18, 4, 1, 1), np.float32), "v": np.ones((4, 18, 1, 1), np.float32)},
        """
        inputs: x:float32[1,4,8,8]
        c = Conv(x, float32[20,4,1,1])
        r = Relu(c)
        y = Conv(r, float32[4,20,1,1])
        outputs: y:float32[1,4,8,8]
        """,
        before="normalize",
        signature="float[1,4,8,8] x) => (float[1,4,8,8] y",
    ),
    "place": Golden(
        "c = Conv<pads=[1,1,1,1]>(x, w) d = Conv(c, v) y = Conv(d, u)",
        {
            "w": np.ones((16, 3, 3, 3), np.float32),
            "v": np.ones((64, 16, 1, 1), np.float32),
            "u": np.ones((64, 64, 1, 1), np.float32),
        },
        """
        inputs: x:float32[1,3,128,128]
        c = Conv{pads=[1,1,1,1]}(x, float32[16,3,3,3])
        d = Conv(c, float32[64,16,1,1])
        y = Conv(d, float32[64,64,1,1])
        outputs: y:float32[1,64,128,128]
        block Conv_c faster in float here
        block Conv_d integer
        block Conv_y integer
        """,
        before="normalize,form-blocks,annotate",
        signature="float[1,3,128,128] x) => (float[1,64,128,128] y",
        show=placed,
    ),
    "power-of-two-factors": Golden(
        "c = Conv(x, w) s = Add(c, k) y = LayerNormalization(s, g)",
        {"w": f(0.03), "k": f(0, 30, shape=(2,)), "g": f(1, 1, shape=(2,))},
        """
        inputs: x:float32[1,1,2,2]
        c = Conv(x, 0.03)
        s = Add(c, float32[2])
        y = LayerNormalization(s, float32[2])
        outputs: y:float32[1,1,2,2]
        factors s 0.01487 * 2**(0, 3)
        """,
        before="form-blocks,annotate,calibrate{collector=minmax}",
        show=factors,
        target="integer",
    ),
    "quantize-blocks": Golden(
        "y = MatMul(x, w)",
        {"w": np.ones((16, 1024), np.float32)},
        """
        inputs: x:float32[1,16]
        y = com.microsoft.MatMulNBits{K=16, N=1024, accuracy_level=4, bits=4, block_size=32}(x, uint8[1024,1,16], float32[1024])
        outputs: y:float32[1,1024]
        block MatMul_y -inf..inf integer int4 weights
        """,
        before="form-blocks",
        signature="float[1,16] x) => (float[1,1024] y",
        show=blocks,
    ),
    "quantize-dynamic": Golden(
        "m = MatMul(x, w) y = Add(m, b)",
        {"w": np.ones((4, 1024), np.float32), "b": np.ones(1024, np.float32)},
        """
        inputs: x:float32[1,4]
        y = com.microsoft.DynamicQuantizeMatMul(x, int8[4,1024], float32[1024], _, float32[1024])
        outputs: y:float32[1,1024]
        block MatMul_m -inf..inf integer dynamic
        """,
        before="form-blocks",
        signature="float[1,4] x) => (float[1,1024] y",
        show=blocks,
    ),
    "recompose": Golden(
        "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)",
        {"three": f(3, shape=()), "zero": f(0, shape=()), "six": f(6, shape=())},
        """
        inputs: x:float32[1,1,2,2]
        y = HardSwish(x)
        outputs: y:float32[1,1,2,2]
        """,
        before="normalize",
    ),
    "round-weights": Golden(
        "c = Conv(x, w) y = Conv(c, v)",
        {"w": f(1, -2, shape=(2, 1, 1, 1)), "v": f(0.503, 0.7, -0.3, 0.11, shape=(2, 2, 1, 1))},
        """
        inputs: x:float32[1,1,2,2]
        c = Conv(x, float32[2,1,1,1], float32[2])
        y = Conv(c, float32[2,2,1,1], float32[2])
        outputs: y:float32[1,1,2,2]
        integers w [108, -108]
        integers v [87, 121, -128, 47]
        """,
        before="form-blocks,annotate,calibrate{collector=minmax},align-scales,scale-weights",
        show=integers,
    ),
    "scale-weights": Golden(
        QUANTIZED,
        WEIGHTS,
        """
        inputs: x:float32[1,1,2,2]
        c = Conv(x, 0.5, 0.25)
        r = Relu(c)
        s = Sigmoid(r)
        y = Conv(s, -1)
        outputs: y:float32[1,1,2,2]
        params x uint8 0.01571 64
        params r uint8 0.006863 0
        params s uint8 0.003341 0
        params y uint8 0.003354 254
        params w int8 0.004427 0
        params v int8 0.008854 0
        """,
        before=None,
        show=params,
    ),
    "select-kernels": Golden(
        QUANTIZED,
        WEIGHTS,
        """
        inputs: x:float32[1,1,2,2]
        x_q = QuantizeLinear(x, 0.0157068, 64)
        r_raw_q = QLinearConv(x_q, 0.0157068, 64, 113, 0.00442688, 0, 0.00686275, 0, 3595)
        s_raw_q = com.microsoft.QLinearSigmoid(r_raw_q, 0.00686275, 0, 0.00334099, 0)
        y_raw_q = QLinearConv(s_raw_q, 0.00334099, 0, -113, 0.0088543, 0, 0.00335414, 254)
        y = DequantizeLinear(y_raw_q, 0.00335414, 254)
        outputs: y:float32[1,1,2,2]
        """,
        before=None,
    ),
    "split-groups": Golden(
        "c = Conv<group=16>(x, w) y = Relu(c)",
        {"w": np.ones((64, 4, 1, 1), np.float32)},
        """
        inputs: x:float32[1,64,8,8]
        x_part, x_part_1 = Split{axis=1}(x, int64[2])
        c_part = Conv{group=1}(x_part, float32[32,32,1,1])
        y_part = Relu(c_part)
        c_part_1 = Conv{group=1}(x_part_1, float32[32,32,1,1])
        y_part_1 = Relu(c_part_1)
        y = Concat{axis=1}(y_part, y_part_1)
        outputs: y:float32[1,64,8,8]
        """,
        before="normalize",
        signature="float[1,64,8,8] x) => (float[1,64,8,8] y",
    ),
}


_ON_DATA = ("round-weights", "correct-bias")


def stages(name: str, golden: Golden) -> tuple[Pipeline, Pass]:
    """The passes that run before, and the pass itself; with plain ranges, weights and biases: readable numbers."""
    default = parse_pipeline(
        DEFAULT_PIPELINE.replace("calibrate", "calibrate{collector=minmax}"), REGISTRY.passes
    ).passes
    if golden.before is not None:
        pipelines = (LEVELS["O3"], *MODES.values())
        stage = next(p for text in pipelines for p in parse_pipeline(text, REGISTRY.passes).passes if p.name == name)
        return parse_pipeline(golden.before, REGISTRY.passes), stage
    at = next(i for i, stage in enumerate(default) if stage.name == name)
    return Pipeline(tuple(stage for stage in default[:at] if stage.name not in _ON_DATA)), default[at]


def start(golden: Golden) -> CompileState:
    model = model_from_text(f"g ({golden.signature}) {{ {golden.body} }}", golden.constants)
    target, collectors = REGISTRY.targets[golden.target], REGISTRY.collectors
    graph, dims = ir.from_proto(model), model.graph.input[0].type.tensor_type.shape.dim
    samples = [{name: np.repeat(x, dims[1].dim_value, axis=1) for name, x in sample.items()} for sample in SAMPLES]
    if len(dims) == 2:
        samples = [{name: x.reshape(-1, dims[1].dim_value) for name, x in sample.items()} for sample in samples]
    state = CompileState(graph, target, REGISTRY.ops, calibration=samples, collectors=collectors)
    return replace(state, keep_float=golden.keep_float)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    golden = GOLDEN[name]
    before, stage = stages(name, golden)
    state = start(golden)
    before.run(state)
    Pipeline((stage,)).run(state)
    verify(state)
    text = re.sub(r"#[0-9a-f]{6}", "", format_graph(state.graph)) + "".join(f"{line}\n" for line in golden.show(state))
    assert text == dedent(golden.expected).lstrip("\n")
    assert stage.run(state) == 0


def test_every_pass_has_a_golden_text() -> None:
    assert list(GOLDEN) == sorted(REGISTRY.passes)
