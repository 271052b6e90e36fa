"""What exporters write comes in, although ONNX Runtime does not take it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from qcompiler import compile_model
from qcompiler.exports import make_scalars
from qcompiler.load import load_model
from tests.support import model_from_text, ops_of, run


def quantized_add() -> onnx.ModelProto:
    """As torch.onnx.export writes a model of FX graph mode: scales and zero points are vectors of one number."""
    text = """g (float[1,8] x) => (float[1,8] y) {
        xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z)
        w = DequantizeLinear(wq, sw, zw) m = MatMul(xd, w)
        mq = QuantizeLinear(m, s, z) md = DequantizeLinear(mq, s, z)
        a = Add(xd, md) yq = QuantizeLinear(a, s, z) y = DequantizeLinear(yq, s, z)
    }"""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "s": np.array([0.05], np.float32),
        "z": np.array([128], np.uint8),
        "sw": np.array([0.01], np.float32),
        "zw": np.zeros(1, np.int8),
        "wq": rng.integers(-9, 9, (8, 8), np.int8),
    }
    return model_from_text(text, arrays)


def test_a_model_whose_scales_are_vectors_comes_in() -> None:
    model = quantized_add()
    with pytest.raises(Exception, match="must be a scalar"):
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((1, 8)).astype(np.float32)
    wanted = plain.run(None, {"x": x})[0]
    np.testing.assert_array_equal(run(load_model(model), {"x": x})[0], wanted)
    result = compile_model(model)
    assert result.report.layers[0].quantized
    assert np.abs(run(result.model, {"x": x})[0] - wanted).max() < 0.0501


def test_scales_of_channels_stay() -> None:
    text = "g (float[2,3] x) => (float[2,3] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
    model = model_from_text(text, {"s": np.ones(3, np.float32), "z": np.zeros(3, np.int8)})
    before = model.SerializeToString()
    make_scalars(model)
    assert model.SerializeToString() == before
    assert "Squeeze" not in ops_of(model)
