"""QONNX's Quant becomes standard operators that compute the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qcompiler import compile_model, qonnx
from qcompiler.errors import UserError
from tests.forms import weights
from tests.support import model_from_text, ops_of, run


def quant_model(
    body: str, arrays: dict[str, np.ndarray], shape: str = "1,8,6,6", result: str = "A,B,C,D"
) -> onnx.ModelProto:
    model = model_from_text(f"g (float[{shape}] x) => (float[{result}] y) {{ {body} }}", arrays)
    for node in model.graph.node:
        if node.op_type in ("Quant", "BipolarQuant"):
            node.domain = qonnx.DOMAINS[0]
    model.opset_import.append(onnx.helper.make_opsetid(qonnx.DOMAINS[0], 1))
    return model


def reference(x: np.ndarray, scale: np.ndarray, zero: float, low: int, high: int) -> np.ndarray:
    return (np.clip(np.rint(x / scale + zero), low, high) - zero) * scale


@pytest.mark.parametrize(
    ("bits", "attributes", "zero", "low", "high", "ops"),
    [
        (8, "signed=1, narrow=0", 0, -128, 127, ["QuantizeLinear", "DequantizeLinear"]),
        (8, "signed=1, narrow=1", 0, -127, 127, ["Clip", "QuantizeLinear", "DequantizeLinear"]),
        (8, "signed=0, narrow=0", 118, 0, 255, ["QuantizeLinear", "DequantizeLinear"]),
        (4, "signed=1, narrow=0", 0, -8, 7, ["Clip", "QuantizeLinear", "DequantizeLinear"]),
        (16, "signed=1, narrow=0", 0, -(2**15), 2**15 - 1, ["Div", "Round", "Clip", "Mul"]),
    ],
)
def test_activations(bits: int, attributes: str, zero: int, low: int, high: int, ops: list[str]) -> None:
    arrays = {"s": np.float32(0.25), "z": np.float32(zero), "b": np.float32(bits)}
    model = quant_model(f"y = Quant<{attributes}>(x, s, z, b)", arrays, "64", "64")
    qonnx.expand(model)
    assert ops_of(model) == ops
    x = np.linspace(-40, 40, 64).astype(np.float32)
    np.testing.assert_allclose(run(model, {"x": x})[0], reference(x, np.float32(0.25), zero, low, high), atol=1e-5)


def test_a_network_with_4_bit_weights_needs_no_data() -> None:
    body = """q = Quant<signed=1>(x, s, z, e) v = Quant<signed=1, narrow=1>(w, sw, z, f)
        c = Conv<pads=[1,1,1,1]>(q, v) r = Relu(c) y = Quant<signed=0>(r, t, z, e)"""
    w, scale = weights(8, 8, 3, 3), np.linspace(0.05, 0.1, 8).astype(np.float32).reshape(8, 1, 1, 1)
    numbers = {"s": 0.03, "z": 0.0, "e": 8.0, "f": 4.0, "t": 0.02}
    arrays = {"w": w, "sw": scale, **{k: np.float32(v) for k, v in numbers.items()}}
    model = quant_model(body, arrays)
    result = compile_model(model)
    assert [(layer.op, layer.quantized) for layer in result.report.layers] == [("Conv", True)]
    found = [onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer]
    trained = np.clip(np.rint(w / scale), -7, 7).astype(np.int8)
    stored = next(a for a in found if a.shape == trained.shape)
    peak = np.abs(trained).reshape(8, -1).max(axis=1)
    divisor = (peak // np.abs(stored).reshape(8, -1).max(axis=1)).reshape(8, 1, 1, 1)
    assert np.array_equal(stored * divisor, trained)
    assert model.opset_import[-1].domain == qonnx.DOMAINS[0]  # the caller's model is as it was


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("y = BipolarQuant(x, s)", "BipolarQuant of qonnx.custom_op.general has no counterpart here"),
        ('y = Quant<rounding_mode="FLOOR">(x, s, z, b)', "rounding mode FLOOR is not supported"),
        ("y = Quant(x, x, z, b)", "Quant needs a constant scale"),
    ],
)
def test_refusals(body: str, message: str) -> None:
    arrays = {"s": np.float32(0.25), "z": np.float32(0), "b": np.float32(8)}
    with pytest.raises(UserError, match=message):
        compile_model(quant_model(body, arrays))


def test_an_old_opset_is_refused() -> None:
    model = quant_model("y = BipolarQuant(x, s)", {"s": np.float32(1)})
    model.opset_import[0].version = 9
    with pytest.raises(UserError, match="opset 11 or newer, not 9"):
        compile_model(model)
