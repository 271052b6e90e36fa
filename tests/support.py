"""What tests share: models from text, running them, and comparing two models on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime as ort
from onnx import parser

from qcompiler import ir
from qcompiler.ops import OPS
from qcompiler.pipeline import Pass, Pipeline
from qcompiler.quant import QuantSpec
from qcompiler.state import CompileState, Phase
from qcompiler.target import Target
from qcompiler.verify import verify

TEST_TARGET = Target(
    "test", "for tests", QuantSpec("uint8", 0, 255), QuantSpec("int8", -128, 127, symmetric=True), frozenset()
)


def model_from_text(
    text: str, initializers: Mapping[str, np.ndarray] | None = None, opset: int = 17
) -> onnx.ModelProto:
    """Parse an ONNX text graph (`g (float[1,3,8,8] x) => (float[...] y) {...}`); initializers come as arrays."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n{text}')
    for node in model.graph.node:
        node.name = node.name or f"{node.op_type}_{node.output[0]}"
    for name, array in (initializers or {}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return model


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], optimize: bool = False) -> list[np.ndarray]:
    """Outputs of a model in ONNX Runtime; without graph optimizations unless asked for."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def random_feeds(model: onnx.ModelProto, seed: int = 0, dynamic: int = 2) -> dict[str, np.ndarray]:
    """Seeded normal inputs for every float graph input; dynamic axes get the size `dynamic`."""
    rng = np.random.default_rng(seed)
    constants = {i.name for i in model.graph.initializer}
    feeds = {}
    for value in model.graph.input:
        if value.name in constants:
            continue
        kind = value.type.tensor_type
        shape = [d.dim_value or dynamic for d in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        array = rng.standard_normal(shape)
        feeds[value.name] = array.astype(dtype) if dtype.kind == "f" else rng.integers(0, 4, shape).astype(dtype)
    return feeds


def state_of(model: onnx.ModelProto, target: Target = TEST_TARGET, phase: Phase = Phase.FLOAT) -> CompileState:
    """A state that holds the model."""
    return CompileState(ir.from_proto(model), target, OPS, phase)


def run_passes(
    model: onnx.ModelProto, *passes: Pass, target: Target = TEST_TARGET
) -> tuple[onnx.ModelProto, CompileState]:
    """The model after the passes, verified after each, with the state."""
    state = state_of(model, target)
    for stage in passes:
        Pipeline((stage,)).run(state)
        verify(state)
    return ir.to_proto(state.graph), state


def assert_same_function(before: onnx.ModelProto, after: onnx.ModelProto, seeds: int = 3, rtol: float = 1e-4) -> None:
    """Both models give equal outputs on seeded inputs; the tolerance is relative to each output's largest value."""
    assert [o.name for o in before.graph.output] == [o.name for o in after.graph.output]
    for seed in range(seeds):
        feeds = random_feeds(before, seed)
        for a, b in zip(run(before, feeds), run(after, feeds), strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            scale = np.abs(a).max() if a.size and a.dtype.kind == "f" else 1.0
            np.testing.assert_allclose(b, a, rtol=rtol, atol=rtol * max(float(scale), 1e-6))


def ops_of(model: onnx.ModelProto) -> list[str]:
    """The operator types of the main graph, in order."""
    return [n.op_type for n in model.graph.node]
