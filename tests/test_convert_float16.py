"""convert-float16: what is safe computes in half precision, the rest in float32, and no tensor is converted twice."""

from __future__ import annotations

import numpy as np
import onnx
from qcompiler_passes.convert_float16 import ConvertFloat16
from qcompiler_passes.form_blocks import FormBlocks

from qcompiler.state import CompileState
from tests.support import assert_same_function, model_from_text, ops_of, run_passes

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def converted(text: str, **constants: np.ndarray) -> tuple[onnx.ModelProto, onnx.ModelProto, CompileState]:
    model = onnx.shape_inference.infer_shapes(model_from_text(text, constants))
    after, state = run_passes(model, FormBlocks(), ConvertFloat16())
    assert ConvertFloat16().run(state) == 0
    return model, after, state


def test_a_chain_is_converted_once() -> None:
    text = (
        "g (float[2,8,4,4] x) => (float[2,8,4,4] y) { c = Conv(x, w, b) r = Relu(c) t = Transpose(r) y = Transpose(t) }"
    )
    model, after, state = converted(text, w=floats(8, 8, 1, 1), b=floats(8))
    assert ops_of(after) == ["Cast", "Conv", "Relu", "Transpose", "Transpose", "Cast"]
    assert_same_function(model, after, rtol=3e-3)
    assert {t.data_type for t in after.graph.initializer} == {onnx.TensorProto.FLOAT16}
    assert [(b.root, b.reason) for b in state.blocks.values()] == [("Conv_c", "float16")]


def test_a_tensor_of_several_readers_is_converted_once() -> None:
    text = "g (float[2,8] x) => (float[2,8] y) { a = MatMul(x, w) b = MatMul(x, v) y = Add(a, b) }"
    model, after, _ = converted(text, w=floats(8, 8), v=floats(8, 8))
    assert ops_of(after) == ["Cast", "MatMul", "MatMul", "Add", "Cast"]
    assert_same_function(model, after, rtol=3e-3)


def test_what_may_overflow_stays_float32() -> None:
    text = "g (float[2,8] x) => (float[2,8] y) { a = MatMul(x, w) e = Exp(a) m = Mul(e, large) y = MatMul(m, w) }"
    model, after, _ = converted(text, w=floats(8, 8), large=np.float32(1e5))
    assert ops_of(after) == ["Cast", "MatMul", "Cast", "Exp", "Mul", "Cast", "MatMul", "Cast"]
    kinds = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(after).graph.value_info}
    assert kinds["e"] == kinds["m"] == onnx.TensorProto.FLOAT
    assert model.graph.output[0].type == after.graph.output[0].type


def test_data_movers_alone_do_not_pay_but_tables_do() -> None:
    _, after, _ = converted("g (float[2,8] x) => (float[8,2] y) { y = Transpose(x) }")
    assert ops_of(after) == ["Transpose"]
    model, after, _ = converted("g (int64[N] i) => (float[N,8] y) { y = Gather(t, i) }", t=floats(4, 8))
    assert ops_of(after) == ["Gather", "Cast"]
    assert_same_function(model, after, rtol=1e-3)
