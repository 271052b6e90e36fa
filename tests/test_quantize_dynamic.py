"""quantize-dynamic: the kernels compute what the float layers do, up to the rounding of 8 bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from qcompiler_passes.form_blocks import FormBlocks
from qcompiler_passes.quantize_dynamic import QuantizeDynamic
from qcompiler_passes.targets import INTEGER, ORT_CPU, ORT_CPU_AVX2

from qcompiler.pipeline import Pipeline
from qcompiler.state import CompileState
from qcompiler.target import Target
from tests.support import model_from_text, ops_of, random_feeds, run, run_passes

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def compiled(
    text: str, target: Target = ORT_CPU, least: int = 1, **constants: np.ndarray
) -> tuple[onnx.ModelProto, onnx.ModelProto, CompileState]:
    """The float model, the compiled one and its state; a second run changes nothing."""
    model = model_from_text(text, constants)
    stage = QuantizeDynamic(least=least, table=64)
    after, state = run_passes(model, FormBlocks(), stage, target=target)
    assert stage.run(state) == 0
    return model, after, state


def sqnr(model: onnx.ModelProto, after: onnx.ModelProto, output: int = 0) -> float:
    """The least over some inputs, in dB."""
    found = []
    for seed in range(3):
        feeds = random_feeds(model, seed, dynamic=5)
        a, b = run(model, feeds)[output], run(after, feeds)[output]
        assert a.shape == b.shape
        found.append(10 * np.log10(np.square(a).sum() / max(np.square(a - b).sum(), 1e-30)))
    return min(found)


def test_matmul_takes_its_bias_and_keeps_the_batch() -> None:
    text = "g (float[2,N,64] x) => (float[2,N,48] y) { m = MatMul(x, w) y = Add(b, m) }"
    model, after, state = compiled(text, w=floats(64, 48), b=floats(48))
    assert ops_of(after) == ["DynamicQuantizeMatMul"]
    assert sqnr(model, after) > 35
    assert state.blocks["MatMul_m"].quantized
    assert state.origin[after.graph.node[0].name] == ("MatMul_m", "Add_y")


@pytest.mark.parametrize("attributes", ["", "<transB=1>", "<alpha=0.5, beta=2.0>", "<alpha=-2.0, transB=1>"])
def test_gemm_with_attributes(attributes: str) -> None:
    w = floats(48, 64) if "transB" in attributes else floats(64, 48)
    text = f"g (float[N,64] x) => (float[N,48] y) {{ y = Gemm{attributes}(x, w, b) }}"
    model, after, _ = compiled(text, w=w, b=floats(1, 48))
    assert ops_of(after) == ["DynamicQuantizeMatMul"]
    assert sqnr(model, after) > 35


def test_products_of_one_tensor_share_its_integers() -> None:
    text = "g (float[N,64] x) => (float[N,48] y, float[N,48] z) { y = MatMul(x, w) z = Gemm(x, v, b) }"
    model, after, _ = compiled(text, w=floats(64, 48), v=floats(64, 48), b=floats(48))
    assert ops_of(after) == ["DynamicQuantizeLinear", "MatMulIntegerToFloat", "MatMulIntegerToFloat"]
    assert min(sqnr(model, after), sqnr(model, after, 1)) > 35


def test_channels_of_different_ranges_have_scales_of_their_own() -> None:
    w = floats(64, 48) * np.logspace(0, -4, 48, dtype=np.float32)
    text = "g (float[N,64] x) => (float[N,48] y) { m = MatMul(x, w) y = Mul(m, s) }"
    constants = {"w": w, "s": (1 / np.abs(w).max(axis=0)).astype(np.float32)}
    model, after, _ = compiled(text, **constants)
    assert sqnr(model, after) > 35
    model, after, _ = compiled(text, replace(ORT_CPU, per_channel=False), **constants)
    assert sqnr(model, after) < 20


def test_weights_keep_to_the_range_of_the_target() -> None:
    text = "g (float[N,64] x) => (float[N,48] y) { y = MatMul(x, w) }"
    _, after, _ = compiled(text, ORT_CPU_AVX2, w=floats(64, 48))
    weight = next(
        onnx.numpy_helper.to_array(t) for t in after.graph.initializer if t.data_type == onnx.TensorProto.INT8
    )
    assert (weight.min(), weight.max()) == (-63, 63)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_lstm(direction: str) -> None:
    d = 2 if direction == "bidirectional" else 1
    text = (
        f"g (float[T,1,32] x, float[{d},1,16] h) => (float[] y, float[] last) "
        f'{{ y, last = LSTM<hidden_size=16, direction="{direction}">(x, w, r, b, , h) }}'
    )
    model, after, _ = compiled(text, w=floats(d, 64, 32) / 4, r=floats(d, 64, 16) / 4, b=floats(d, 128) / 4)
    assert ops_of(after) == ["DynamicQuantizeLSTM"]
    assert min(sqnr(model, after), sqnr(model, after, 1)) > 30


def test_lstm_with_a_scale_per_direction() -> None:
    text = "g (float[T,1,32] x) => (float[] y) { y = LSTM<hidden_size=16>(x, w, r) }"
    target = replace(ORT_CPU, per_channel=False)
    model, after, _ = compiled(text, target, w=floats(1, 64, 32) / 4, r=floats(1, 64, 16) / 4)
    scales = [onnx.numpy_helper.to_array(t) for t in after.graph.initializer if t.name.endswith("_scale")]
    assert [scale.shape for scale in scales] == [(1,), (1,)]
    assert sqnr(model, after) > 25


def test_large_tables_of_rows_are_integers() -> None:
    text = "g (int64[N] i) => (float[N,32] y) { y = Gather(t, i) }"
    model, after, state = compiled(text, t=floats(9, 32))
    assert ops_of(after) == ["GatherBlockQuantized"]
    assert sqnr(model, after) > 40
    assert state.blocks["Gather_y"].quantized


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = MatMul(x, x)", "the weight is not a constant"),
        ("y = MatMul(x, few)", "it has fewer than 100 weights, too few to pay"),
        ("y = MatMul(x, bad)", "its weights are not finite"),
        ("y = Gemm(x, w, matrix)", "the bias is a matrix"),
        ("y = Gemm<transA=1>(x, w)", "its left operand is a constant, or transposed"),
        ("y = MatMul(w, w)", "its left operand is a constant, or transposed"),
    ],
)
def test_what_stays_float_says_why(body: str, reason: str) -> None:
    bad = np.full((16, 16), np.inf, np.float32)
    constants = {"w": floats(16, 16), "few": floats(16, 2), "bad": bad, "matrix": floats(16, 16)}
    model, after, state = compiled(f"g (float[16,16] x) => (float[] y) {{ {body} }}", least=100, **constants)
    assert ops_of(after) == ops_of(model)
    (block,) = state.blocks.values()
    assert (block.quantized, block.reason) == (False, reason)


def test_patterns_and_targets_keep_layers_in_float() -> None:
    text = "g (float[N,64] x) => (float[N,48] y) { y = MatMul(x, w) }"
    _, after, state = compiled(text, INTEGER, w=floats(64, 48))
    assert ops_of(after) == ["MatMul"]
    assert state.blocks["MatMul_y"].reason == "target integer has no DynamicQuantizeMatMul"
    _, state = run_passes(model_from_text(text, {"w": floats(64, 48)}), FormBlocks(), target=ORT_CPU)
    state.keep_float = {"MatMul*": "asked for"}
    Pipeline((QuantizeDynamic(least=1),)).run(state)
    assert state.blocks["MatMul_y"].reason == "asked for"


@pytest.mark.parametrize("target", [ORT_CPU, replace(ORT_CPU, per_channel=False)], ids=["channels", "tensor"])
def test_conv_on_request(target: Target) -> None:
    text = """g (float[1,8,9,9] x) => (float[1,16,5,5] y, float[1,4,9,9] z) {
        y = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w, b) z = Conv(x, v)
    }"""
    model = model_from_text(text, {"w": floats(16, 8, 3, 3), "b": floats(16), "v": floats(4, 8, 1, 1)})
    left, state = run_passes(model, FormBlocks(), QuantizeDynamic(least=1), target=target)
    assert ops_of(left) == ["Conv", "Conv"]
    assert "conv=true" in state.blocks["Conv_y"].reason
    after, state = run_passes(model, FormBlocks(), QuantizeDynamic(least=1, conv=True), target=target)
    assert sorted(ops_of(after)) == sorted(["DynamicQuantizeLinear", "Add", *2 * ["ConvInteger", "Cast", "Mul", "Mul"]])
    assert state.blocks["Conv_y"].quantized
    assert min(sqnr(model, after, 0), sqnr(model, after, 1)) > 32


def test_gru_stays_float_and_says_why() -> None:
    text = "g (float[5,1,8] x) => (float[5,1,1,4] y) { y, h = GRU<hidden_size=4>(x, w, r) }"
    _, after, state = compiled(text, w=floats(1, 12, 8), r=floats(1, 12, 4))
    assert ops_of(after) == ["GRU"]
    assert [block.reason for block in state.blocks.values()] == ["ONNX Runtime has no GRU that quantizes what it reads"]


@pytest.mark.parametrize(("ends", "quantized"), [(0, False), (1, True)])
def test_sums_that_may_overflow_stay_float(ends: int, quantized: bool) -> None:
    """They cannot where a few large weights make the others small integers."""
    w = np.ones((65536, 2), np.float32)
    w[:ends] = 100
    _, after, state = compiled("g (float[1,65536] x) => (float[] y) { y = MatMul(x, w) }", w=w)
    assert ("DynamicQuantizeMatMul" in ops_of(after)) == quantized
    assert quantized or state.blocks["MatMul_y"].reason == "its sums of 65536 products may overflow int32"
