"""The model-local functions compute what `quant` computes, in ONNX Runtime and in the evaluator of the onnx package."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from qcompiler import functions, quant
from qcompiler.quant import QuantSpec
from qcompiler.runtime import run, session

ACCUMULATORS = np.concatenate(
    [
        np.arange(-2000, 2000),
        np.asarray([-(2**31), 2**31 - 1, 2**30, -(2**30), 2**15, -(2**15), 3 * 2**15, -3 * 2**15]),
        np.random.default_rng(0).integers(-(2**31), 2**31, 2000),
    ]
).astype(np.int32)


def call(name: str, inputs: dict[str, np.ndarray], result: int, opset: int = functions.OPSET) -> onnx.ModelProto:
    """A model whose one node calls the function on all its inputs."""
    node = onnx.helper.make_node(name, list(inputs), ["y"], name, domain=functions.DOMAIN)
    declare = onnx.helper.make_tensor_value_info
    kinds = {k: onnx.helper.np_dtype_to_tensor_dtype(v.dtype) for k, v in inputs.items()}
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [declare(k, kinds[k], v.shape) for k, v in inputs.items()],
        [declare("y", result, None)],
    )
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(functions.DOMAIN, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    model.functions.append(functions.proto(name, opset))
    return model


def requantize_inputs(m: int, shift: int, zero_point: int, spec: QuantSpec) -> dict[str, np.ndarray]:
    limits = {"zero_point": zero_point, "qmin": spec.qmin, "qmax": spec.qmax}
    return {
        "acc": ACCUMULATORS,
        "multiplier": np.asarray(m, np.int32),
        "shift": np.asarray(shift, np.uint64),
        **{k: np.asarray(v, spec.dtype) for k, v in limits.items()},
    }


@pytest.mark.parametrize("spec", [QuantSpec("uint8", 0, 255), QuantSpec("int8", -128, 127)], ids=lambda s: s.dtype)
@pytest.mark.parametrize(("m", "shift"), [(1, 16), (32768, 16), (65537, 16), (2**30 - 1, 16), (1, 12), (3, 1)])
def test_requantize_rounds_ties_to_even_for_every_accumulator(m: int, shift: int, spec: QuantSpec) -> None:
    inputs = requantize_inputs(m, shift, 128 if spec.qmin == 0 else 0, spec)
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    model = call("Requantize", inputs, kind)
    expected = quant.requantize(ACCUMULATORS, m, int(inputs["zero_point"]), spec, shift)
    np.testing.assert_array_equal(run(session(model), inputs)[0], expected)
    np.testing.assert_array_equal(ReferenceEvaluator(model).run(None, inputs)[0], expected)


def test_requantize_takes_a_multiplier_per_channel() -> None:
    inputs = requantize_inputs(1, 16, 0, QuantSpec("uint8", 0, 255))
    inputs["acc"] = np.arange(2 * 3 * 4, dtype=np.int32).reshape(1, 2, 3, 4) * 1000
    inputs["multiplier"] = np.asarray([300, 700], np.int32).reshape(2, 1, 1)
    [got] = run(session(call("Requantize", inputs, onnx.TensorProto.UINT8)), inputs)
    expected = quant.requantize(inputs["acc"], inputs["multiplier"], 0, QuantSpec("uint8", 0, 255))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("multiplier", [1, -7, 4096])
def test_rescale_centres_and_multiplies(multiplier: int) -> None:
    q = np.arange(256, dtype=np.uint8)
    inputs = {"q": q, "zero_point": np.uint8([128]), "multiplier": np.int32([multiplier])}
    model = call("Rescale", inputs, onnx.TensorProto.INT32)
    for got in (run(session(model), inputs)[0], ReferenceEvaluator(model).run(None, inputs)[0]):
        np.testing.assert_array_equal(got, (q.astype(np.int32) - 128) * multiplier)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_table_is_indexed_by_the_bit_pattern(dtype: type) -> None:
    q = np.arange(256, dtype=np.uint8).view(dtype).reshape(2, 8, 16)
    entries = np.random.default_rng(0).integers(0, 256, 256).astype(np.uint8)
    inputs = {"q": q, "table": entries}
    [got] = run(session(call("Table", inputs, onnx.TensorProto.UINT8)), inputs)
    np.testing.assert_array_equal(got, entries[q.view(np.uint8)])


@pytest.mark.parametrize("name", ["Requantize", "Rescale", "Table"])
@pytest.mark.parametrize("opset", [17, 19, 21, 23])
def test_functions_are_valid_and_documented(name: str, opset: int) -> None:
    function = functions.proto(name, opset)
    inputs = {operand: np.zeros((), np.int32) for operand in function.input}
    model = call(name, inputs, onnx.TensorProto.INT32, opset)
    model.graph.output[0].type.tensor_type.shape.SetInParent()
    onnx.checker.check_model(model)
    assert function.doc_string


def test_an_unknown_function_is_an_error() -> None:
    with pytest.raises(KeyError):
        functions.proto("Softmax")
