"""Compile a model in tests: calibrated on random inputs, to each of the three forms that a compilation can end in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from qcompiler_passes.align_scales import AlignScales
from qcompiler_passes.annotate import Annotate
from qcompiler_passes.calibrate import Calibrate
from qcompiler_passes.cleanup import Cleanup
from qcompiler_passes.fold_scales import FoldScales
from qcompiler_passes.form_blocks import FormBlocks
from qcompiler_passes.insert_qdq import InsertQdq
from qcompiler_passes.lower_integer import LowerInteger
from qcompiler_passes.scale_weights import ScaleWeights
from qcompiler_passes.select_kernels import SelectKernels
from qcompiler_passes.targets import ORT_CPU

from qcompiler import ir
from qcompiler.pipeline import Pass, Pipeline
from qcompiler.runtime import run, session
from qcompiler.state import CompileState
from qcompiler.target import Target
from qcompiler.verify import verify
from tests.support import model_from_text, random_feeds, state_of

TO_QDQ: tuple[Pass, ...] = (
    FormBlocks(),
    Annotate(),
    Calibrate(collector="minmax"),
    AlignScales(),
    ScaleWeights(search=False),
    InsertQdq(),
)
TO_INTEGER: tuple[Pass, ...] = (*TO_QDQ, LowerInteger(), FoldScales())
TO_KERNELS: tuple[Pass, ...] = (*TO_INTEGER, SelectKernels(), Cleanup())


def inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shapes of its tensors, as the float passes leave it."""
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def graph_text(text: str, opset: int = 17, /, **initializers: Any) -> onnx.ModelProto:
    """A model from ONNX text with shapes inferred; Python floats become float32 scalars."""
    arrays = {k: np.float32(v) if isinstance(v, float) else np.asarray(v) for k, v in initializers.items()}
    return inferred(model_from_text(text, arrays, opset))


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    """Seeded normal float32 weights of shape (out, in, ...), scaled to keep variances."""
    rng = np.random.default_rng([seed, *shape])
    return (rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[1:]), 1))).astype(np.float32)


def advance(state: CompileState, *passes: Pass) -> CompileState:
    """Run passes on the state and verify after each."""
    for stage in passes:
        Pipeline((stage,)).run(state)
        verify(state)
    return state


def compiled(
    model: onnx.ModelProto, *passes: Pass, target: Target = ORT_CPU, keep_float: Sequence[str] = ()
) -> CompileState:
    """The state of a float model after the passes."""
    state = state_of(model, target)
    state.keep_float = {pattern: f"kept in float as {pattern!r} asks" for pattern in keep_float}
    state.calibration = [random_feeds(model, 1000 + seed) for seed in range(4)]
    return advance(state, *passes)


@dataclass
class Forms:
    """One model in its three forms, with the final state."""

    qdq: onnx.ModelProto
    integer: onnx.ModelProto
    kernels: onnx.ModelProto
    state: CompileState

    def models(self) -> dict[str, onnx.ModelProto]:
        """The forms by name, the reference for the others first."""
        return {"kernels": self.kernels, "qdq": self.qdq, "integer": self.integer}


def all_forms(model: onnx.ModelProto, target: Target = ORT_CPU, keep_float: Sequence[str] = ()) -> Forms:
    """Compile a float model and keep each form on the way."""
    state = compiled(model, *TO_QDQ, target=target, keep_float=keep_float)
    qdq = ir.to_proto(state.graph)
    integer = ir.to_proto(advance(state, LowerInteger(), FoldScales()).graph)
    kernels = ir.to_proto(advance(state, SelectKernels(), Cleanup()).graph)
    return Forms(qdq, integer, kernels, state)


def assert_bit_identical(forms: Forms, seeds: Sequence[int] = (0, 1)) -> None:
    """All three forms give the same bits on seeded inputs in ONNX Runtime, as users run it: all optimizations."""
    samples = [random_feeds(forms.qdq, seed) for seed in seeds]
    expected: list[list[np.ndarray]] = []
    for name, model in forms.models().items():
        runner = session(model)
        results = [run(runner, feeds) for feeds in samples]
        expected = expected or results
        for got, wanted in zip(results, expected, strict=True):
            for a, b, value in zip(got, wanted, model.graph.output, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"{name} differs from kernels at {value.name}")


def ops_between(model: onnx.ModelProto) -> set[str]:
    """Operators that compute floats between a DequantizeLinear before them and a QuantizeLinear behind them."""
    makers = {o: n for n in model.graph.node for o in n.output if o}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def reach(node: onnx.NodeProto, forward: bool) -> list[onnx.NodeProto]:
        names = node.output if forward else node.input
        if forward:
            return [r for n in names for r in readers.get(n, [])]
        return [makers[n] for n in names if n in makers]

    def marked(start: str, forward: bool) -> set[str]:
        stack = [n for n in model.graph.node if n.op_type == start]
        seen: set[str] = set()
        while stack:
            for node in reach(stack.pop(), forward):
                if node.name not in seen and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                    seen.add(node.name)
                    stack.append(node)
        return seen

    both = marked("DequantizeLinear", True) & marked("QuantizeLinear", False)
    return {n.op_type for n in model.graph.node if n.name in both}
