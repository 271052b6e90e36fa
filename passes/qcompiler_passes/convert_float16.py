"""convert-float16: weights and activations in half precision, with operators that overflow there kept in float32."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
import onnx

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.ops import op_key
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler.state import CompileState, Phase
from qcompiler_passes.runtime_layers import LAYERS

_MOVERS = frozenset(
    {
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
"""Data movers go with what they read, unless that is a constant: alone they do not pay for conversions."""

_SAFE = _MOVERS | {
    "Add",
    "AveragePool",
    "Clip",
    "Conv",
    "ConvTranspose",
    "Div",
    "Elu",
    "Gelu",
    "Gemm",
    "GlobalAveragePool",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "MatMul",
    "Max",
    "MaxPool",
    "Min",
    "Mul",
    "Neg",
    "PRelu",
    "Relu",
    "Sigmoid",
    "Softmax",
    "Sub",
    "Tanh",
    "Where",
    "com.microsoft.QuickGelu",
}
"""Operators that stay in range if what they read does. Sums over many elements, powers, exponentials and statistics do not."""

_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class ConvertFloat16:
    """Let operators compute in float16 between Casts; inputs and outputs of the model stay as they are.

    What is not known to stay in range remains in float32, and so does what reads a constant beyond 65504.
    """

    name: ClassVar[str] = "convert-float16"
    requires: ClassVar[Phase] = Phase.FUSED
    establishes: ClassVar[Phase | None] = Phase.KERNELS

    def run(self, state: CompileState) -> int:
        """Return the number of operators converted."""
        conversion = _Conversion(Rewriter(state))
        for node in list(state.graph.nodes):
            refusal = conversion.refuse(node)
            if refusal is None and not conversion.rewriter.exhausted:
                conversion.convert(node)
            elif refusal is not None:
                state.refusals[node.name] = refusal
            if node.name in state.blocks:
                _note(state, node, refusal)
        return conversion.rewriter.finish()


def _note(state: CompileState, node: Node, refusal: Refusal | None) -> None:
    block = state.blocks[node.name]
    if node.op not in LAYERS:
        del state.blocks[node.name]
    elif not block.quantized:
        state.blocks[node.name] = replace(block, quantized=not refusal, reason=refusal.reason if refusal else "float16")


@dataclass
class _Conversion:
    """Float16 twins of the float32 tensors, by the identity of these."""

    rewriter: Rewriter
    twins: dict[int, Tensor] = field(default_factory=dict)

    def refuse(self, node: Node) -> Refusal | None:
        """Why a node stays in float32."""
        if op_key(node.op, node.domain) not in _SAFE or ir.has_subgraph(node):
            return Refusal("it may leave the range of float16")
        for pattern, reason in self.rewriter.state.keep_float.items():
            if any(fnmatchcase(name, pattern) for name in (node.name, *(t.name for t in node.outputs))):
                return Refusal(reason, node.name)
        floats = _floats(node.inputs)
        if not floats:
            return Refusal("it reads no float32")
        for tensor in floats:
            array = ir.value(tensor)
            if array is not None and array.size and not np.abs(array).max() <= _LARGEST:
                return Refusal("a constant is beyond the range of float16", tensor.name)
        if node.op in _MOVERS and not any(id(t) in self.twins for t in floats) and not ir.is_constant(node.inputs[0]):
            return Refusal("what it moves is float32")
        return None

    def convert(self, node: Node) -> None:
        """Let a node read and write float16; others read its results through a Cast."""
        rewriter = self.rewriter
        for index, tensor in enumerate(node.inputs):
            if _is_float(tensor):
                rewriter.set_input(node, index, self._half(node, tensor))
        for index, tensor in enumerate(node.outputs):
            if tensor.is_empty():
                continue
            half = rewriter.variable(f"{tensor.name}_half", np.float16, tensor.shape)
            rewriter.take_output(node, half, index)
            self.twins[id(tensor)] = half
            back = rewriter.node("Cast", [half], origin=node, hint=f"{node.name}_float", to=onnx.TensorProto.FLOAT)
            rewriter.take_output(back, tensor)
        rewriter.count += 1

    def _half(self, node: Node, tensor: Tensor) -> Tensor:
        """The float16 twin of a tensor, made if there is none."""
        if id(tensor) not in self.twins:
            array = ir.value(tensor)
            if array is not None:
                self.twins[id(tensor)] = self.rewriter.constant(f"{tensor.name}_half", array.astype(np.float16))
            else:
                to = onnx.TensorProto.FLOAT16
                half = self.rewriter.variable(f"{tensor.name}_half", np.float16, tensor.shape)
                self.rewriter.node("Cast", [tensor], [half], origin=node, hint=f"{node.name}_half", to=to)
                self.twins[id(tensor)] = half
        return self.twins[id(tensor)]


def _floats(tensors: list[Tensor]) -> list[Tensor]:
    return [t for t in tensors if _is_float(t)]


def _is_float(tensor: Tensor) -> bool:
    return not tensor.is_empty() and ir.type_name(tensor) == "float32"
