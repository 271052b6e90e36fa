"""Quantized models become float models that remember their scales, and come out with the same integers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from qcompiler_passes.fold_constants import FoldConstants
from qcompiler_passes.import_quantization import ImportQuantization
from qcompiler_passes.normalize import Normalize

from qcompiler import compile_model, ir, quant
from qcompiler.errors import UserError
from qcompiler.load import is_quantized
from qcompiler.state import CompileState
from tests.forms import weights
from tests.support import model_from_text, ops_of, run, run_passes


def imported(model: onnx.ModelProto) -> tuple[onnx.ModelProto, CompileState]:
    return run_passes(model, Normalize(), FoldConstants(), ImportQuantization())


def scale_and_zero(state: CompileState) -> dict[str, tuple[float, int]]:
    return {name: (round(float(p.scale), 6), p.zero_point) for name, p in state.imported.items()}


def conv_net(kind: str, zero: int, **weight: np.ndarray) -> onnx.ModelProto:
    """x -> Conv -> Relu -> Conv -> y, as an exporter writes it: Q and DQ on activations, DQ on weights."""
    text = """g (float[1,8,6,6] x) => (float[1,8,6,6] y) {
        xq = QuantizeLinear(x, sx, zx) xd = DequantizeLinear(xq, sx, zx)
        w = DequantizeLinear<axis=0>(wq, sw, zw)
        c = Conv<pads=[1,1,1,1]>(xd, w) r = Relu(c)
        rq = QuantizeLinear(r, sr, zr) rd = DequantizeLinear(rq, sr, zr)
        v = DequantizeLinear(vq, sv) d = Conv(rd, v)
        dq = QuantizeLinear(d, sy, zx) y = DequantizeLinear(dq, sy, zx)
    }"""
    rng = np.random.default_rng(5)
    dtype = np.dtype(kind)
    arrays = {
        "sx": np.float32(0.03),
        "zx": np.array(zero, dtype),
        "sr": np.float32(0.02),
        "sy": np.float32(0.06),
        "zr": np.array(np.iinfo(dtype).min, dtype),
        "wq": rng.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8),
        "sw": quant.scale_for_multiplier(np.arange(100, 172, 9), np.float32(0.03), np.float32(0.02)),
        "zw": np.zeros(8, np.int8),
        "vq": rng.integers(-127, 128, (8, 8, 1, 1)).astype(np.int8),
        "sv": quant.scale_for_multiplier(87, np.float32(0.02), np.float32(0.06)).reshape(()),
        **weight,
    }
    return model_from_text(text, arrays)


def photos(count: int = 4) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(i).normal(0, 1, (1, 8, 6, 6)).astype(np.float32)} for i in range(count)]


@pytest.mark.parametrize(("kind", "zero"), [("uint8", 128), ("int8", 0)])
def test_conversions_go_and_their_scales_stay(kind: str, zero: int) -> None:
    model, state = imported(conv_net(kind, zero))
    assert ops_of(model) == ["Conv", "Relu", "Conv"]
    assert scale_and_zero(state) == {"x": (0.03, 128), "r": (0.02, 0), "y": (0.06, 128)}


@pytest.mark.parametrize(("kind", "zero"), [("uint8", 128), ("int8", 0)])
def test_no_data_is_needed(kind: str, zero: int) -> None:
    model = conv_net(kind, zero)
    result = compile_model(model)
    assert [(layer.op, layer.quantized) for layer in result.report.layers] == [("Conv", True), ("Conv", True)]
    assert "trained scales: 3 of 3 tensors" in result.report.notes
    assert any(note.startswith("trained integers: 16 of 16 weight channels") for note in result.report.notes)
    for feeds in photos():
        before, after = run(model, feeds)[0], run(result.model, feeds)[0]
        assert np.abs(before - after).max() <= 0.0601  # one step
        assert np.mean(before != after) < 0.1


def test_without_data_the_comparison_takes_random_inputs() -> None:
    report = compile_model(conv_net("uint8", 128, sw=np.linspace(0.001, 0.002, 8).astype(np.float32))).report
    rows = dict(report.rows())
    assert rows["accuracy"].endswith("y (SQNR, random inputs, for there is no data)")
    assert report.outputs[0].sqnr is not None
    assert report.outputs[0].sqnr > 25
    assert "than the quantized original)" in rows["speed"]
    assert compile_model(conv_net("uint8", 128), compare=False).report.outputs == []


def test_the_three_forms_agree() -> None:
    model = conv_net("int8", 6)
    forms = [compile_model(model, emit=form).model for form in ("qdq", "integer", "kernels")]
    for feeds in photos():
        outputs = [run(form, feeds)[0] for form in forms]
        assert np.array_equal(outputs[0], outputs[1])
        assert np.array_equal(outputs[0], outputs[2])


def test_trained_integers_are_kept() -> None:
    model = conv_net("uint8", 128)
    compiled = compile_model(model).model
    trained = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    found = [onnx.numpy_helper.to_array(t) for t in compiled.graph.initializer]
    of_type = [a for a in found if a.dtype == np.int8 and a.ndim == 4]
    for name in ("wq", "vq"):
        assert any(a.shape == trained[name].shape and np.array_equal(a, trained[name]) for a in of_type), name


def test_integers_survive_a_batch_normalization() -> None:
    """Conv with weights on a grid, then BatchNormalization: folded, the integers are the same, with a sign."""
    text = """g (float[1,8,6,6] x) => (float[1,8,6,6] y) {
        xq = QuantizeLinear(x, sx, zx) xd = DequantizeLinear(xq, sx, zx)
        f = QuantizeLinear<axis=0>(w, sw, zw) d = DequantizeLinear<axis=0>(f, sw, zw)
        c = Conv<pads=[1,1,1,1]>(xd, d) b = BatchNormalization(c, gamma, beta, mean, var)
        yq = QuantizeLinear(b, sy, zy) y = DequantizeLinear(yq, sy, zy)
    }"""
    multipliers = np.array([-160, -130, -100, -70, 70, 100, 130, 160])
    gamma = (multipliers * 2.0**-16 * 0.05 / 0.03 / 0.002 * np.sqrt(0.50001)).astype(np.float32)
    trained = np.random.default_rng(1).integers(-127, 128, (8, 8, 3, 3))
    scale = np.full(8, 0.002, np.float32)
    arrays = {
        "w": (trained * 0.002).astype(np.float32),
        **{"sw": scale, "zw": np.zeros(8, np.int8), "gamma": gamma, "beta": np.zeros(8, np.float32)},
        **{"mean": np.full(8, 0.1, np.float32), "var": np.full(8, 0.5, np.float32)},
        **{"sx": np.float32(0.03), "zx": np.uint8(128), "sy": np.float32(0.05), "zy": np.uint8(120)},
    }
    compiled = compile_model(model_from_text(text, arrays)).model
    found = [onnx.numpy_helper.to_array(t) for t in compiled.graph.initializer]
    signed = trained * np.sign(gamma).astype(np.int64).reshape(8, 1, 1, 1)
    assert any(a.shape == signed.shape and np.array_equal(a, signed) for a in found)


def test_zero_points_become_even_on_the_same_grid() -> None:
    def imported_zero(kind: str, zero: int) -> int:
        return imported(conv_net(kind, zero))[1].imported["x"].zero_point

    assert imported_zero("uint8", 131) == 130
    assert imported_zero("uint8", 101) == 102
    assert imported_zero("int8", -27) == 102


def test_the_range_of_a_relu_begins_at_zero() -> None:
    """As symmetric int8 activations have it: half of the integers would stand for nothing, and the Relu would be a kernel."""
    model = conv_net("int8", 0, zr=np.array(0, np.int8))
    assert scale_and_zero(imported(model)[1])["r"] == (0.02, 0)
    assert ops_of(compile_model(model).model) == ["QuantizeLinear", "QLinearConv", "QLinearConv", "DequantizeLinear"]


def test_saturation_that_did_the_work_of_a_relu_becomes_one() -> None:
    text = """g (float[1,8,6,6] x) => (float[1,8,6,6] y) { c = Conv(x, w)
        q = QuantizeLinear(c, s, z) d = DequantizeLinear(q, s, z) y = Conv(d, v) }"""
    arrays = {"w": weights(8, 8, 1, 1), "v": weights(8, 8, 1, 1), "s": np.float32(0.02)}
    assert ops_of(imported(model_from_text(text, {**arrays, "z": np.int8(-128)}))[0]) == ["Conv", "Relu", "Conv"]
    assert ops_of(imported(model_from_text(text, {**arrays, "z": np.int8(0)}))[0]) == ["Conv", "Conv"]


def test_it_comes_back_before_what_moves_values() -> None:
    """A MaxPool whose result saturates at zero: the tensor before it gets the finer scale of the two."""
    text = """g (float[1,8,6,6] x) => (float[1,8,3,3] y) { c = Conv(x, w)
        q = QuantizeLinear(c, s, a) d = DequantizeLinear(q, s, a) m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(d)
        p = QuantizeLinear(m, t, z) e = DequantizeLinear(p, t, z) y = Conv(e, v) }"""
    scales = {"s": np.float32(0.03), "a": np.uint8(100), "t": np.float32(0.02), "z": np.uint8(0)}
    model, state = imported(model_from_text(text, {"w": weights(8, 8, 1, 1), "v": weights(8, 8, 1, 1), **scales}))
    assert ops_of(model) == ["Conv", "Relu", "MaxPool", "Conv"]
    assert scale_and_zero(state) == {"c": (0.02, 0), "m": (0.02, 0)}


def test_no_relu_where_nothing_is_negative() -> None:
    text = """g (float[1,8,6,6] x) => (float[1,8,1,1] y) { c = Conv(x, w) r = Relu(c)
        q = QuantizeLinear(r, s, z) d = DequantizeLinear(q, s, z) m = GlobalAveragePool(d)
        p = QuantizeLinear(m, s, z) e = DequantizeLinear(p, s, z) y = Conv(e, w) }"""
    scales = {"s": np.float32(0.03), "z": np.uint8(0)}
    model = imported(model_from_text(text, {"w": weights(8, 8, 1, 1), **scales}))[0]
    assert ops_of(model) == ["Conv", "Relu", "GlobalAveragePool", "Conv"]


def test_fewer_bits_become_a_clip() -> None:
    head = "g (float[1,4] x) => (float[1,4] y) { m = MatMul(x, w) q = QuantizeLinear(m, s, z) c = Clip(q, low, high) "
    text = head + "d = DequantizeLinear(c, s, z) y = MatMul(d, w) }"
    arrays = {"s": np.float32(0.5), "z": np.int8(0), "low": np.int8(-8), "high": np.int8(7), "w": weights(4, 4)}
    model, state = imported(model_from_text(text, arrays))
    assert ops_of(model) == ["MatMul", "Clip", "MatMul"]
    clip = state.graph.nodes[1]
    assert [ir.scalar(t) for t in clip.inputs[1:]] == [-4.0, 3.5]


def test_what_moves_integers_moves_floats() -> None:
    text = """g (float[1,8,6,6] x) => (float[1,6,6,8] y) {
        q = QuantizeLinear(x, s, z) t = Transpose<perm=[0,2,3,1]>(q) d = DequantizeLinear(t, s, z) y = MatMul(d, w) }"""
    arrays = {"s": np.float32(0.5), "z": np.uint8(128), "w": weights(8, 8)}
    model, state = imported(model_from_text(text, arrays))
    assert ops_of(model) == ["Transpose", "MatMul"]
    assert scale_and_zero(state) == {"x": (0.5, 128)}


def test_different_scales_on_both_sides_stay() -> None:
    text = "g (float[4] x) => (float[4] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, t, z) }"
    arrays = {"s": np.float32(0.5), "t": np.float32(0.25), "z": np.uint8(0)}
    assert ops_of(imported(model_from_text(text, arrays))[0]) == ["QuantizeLinear", "DequantizeLinear"]


@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_integer_inputs_and_outputs_stay(kind: str) -> None:
    text = f"""g ({kind}[1,6,6,8] x) => ({kind}[1,8,6,6] y) {{
        t = Transpose<perm=[0,3,1,2]>(x) d = DequantizeLinear(t, sx, zx)
        c = Conv<pads=[1,1,1,1]>(d, w) r = Relu(c) y = QuantizeLinear(r, sy, zy) }}"""
    low = np.iinfo(kind).min
    arrays = {
        "w": (np.random.default_rng(0).integers(-127, 128, (8, 8, 3, 3)) * 0.002).astype(np.float32),
        **{"sx": np.float32(0.03), "zx": np.array(low + 128, kind), "sy": np.float32(0.02), "zy": np.array(low, kind)},
    }
    model = model_from_text(text, arrays)
    compiled = compile_model(model).model
    feeds = {"x": np.random.default_rng(1).integers(low, low + 256, (1, 6, 6, 8)).astype(kind)}
    before, after = run(model, feeds)[0], run(compiled, feeds)[0]
    assert after.dtype == before.dtype
    assert np.abs(before.astype(int) - after).max() <= 1
    if kind == "uint8":
        assert ops_of(compiled) == ["Transpose", "QLinearConv"]


def test_gaps_stay_float_without_data_and_are_calibrated_with_it() -> None:
    model = conv_net("uint8", 128)
    nodes = [n for n in model.graph.node if n.output[0] not in ("dq", "y")]
    next(n for n in nodes if n.output[0] == "d").output[0] = "y"
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    alone = compile_model(model).report
    reason = "the model has no scale for 'y', and there is no calibration data"
    assert [(layer.quantized, layer.reason) for layer in alone.layers] == [(True, ""), (False, reason)]
    assert all(layer.quantized for layer in compile_model(model, photos()).report.layers)


def test_a_float_model_is_not_a_quantized_one() -> None:
    model = model_from_text(
        "g (float[1,4] x) => (float[1,4] y) { d = DequantizeLinear(w, s) y = MatMul(x, d) }",
        {"w": np.eye(4, dtype=np.int8), "s": np.float32(0.5)},
    )
    assert not is_quantized(model)
    assert is_quantized(conv_net("int8", 0))
    with pytest.raises(UserError, match="calibration data is missing"):
        compile_model(model)
    assert imported(model)[1].imported == {}


def test_what_cannot_be_read_back_is_refused() -> None:
    text = """g (uint8[1,4] x, float s, uint8 z) => (uint8[1,4] y) {
        y = com.microsoft.QLinearSoftmax<opset=17>(x, s, z, s, z) }"""
    arrays = {"s": np.float32(0.1), "z": np.uint8(0)}
    model = model_from_text(text.replace(", float s, uint8 z)", ")"), arrays)
    with pytest.raises(UserError, match="QLinearSoftmax cannot be read back to float"):
        imported(model)


@pytest.mark.parametrize("options", [{"emit": "kernels"}, {"emit": "integer"}, {"mode": "dynamic"}])
def test_what_has_no_scales_stays_and_the_rest_is_compiled(options: dict[str, str]) -> None:
    text = """g (float[4,64] x) => (float[4,64] y) {
        q, s, z = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, z) c = Cast<to=1>(i) f = Mul(s, t) m = Mul(c, f)
        y = MatMul(m, v)
    }"""
    rng = np.random.default_rng(0)
    integers = rng.integers(-127, 128, (64, 64), np.int8)
    model = model_from_text(text, {"w": integers, "t": np.float32(0.001), "v": weights(64, 64)})
    data = [{"x": rng.standard_normal((4, 64)).astype(np.float32)} for _ in range(8)]
    result = compile_model(model, None if "mode" in options else data, optimize=None, **options)
    assert ops_of(result.model).count("MatMulInteger") == (2 if options == {"emit": "integer"} else 1)
    if "mode" not in options:
        assert [layer.quantized for layer in result.report.layers if layer.op == "MatMul"] == [True]
        assert "quantized without scales, left as it is: MatMulInteger 1" in result.report.notes
    a, b = run(model, data[0])[0], run(result.model, data[0])[0]
    assert 10 * np.log10(np.square(a).sum() / max(np.square(a - b).sum(), 1e-30)) > 30
