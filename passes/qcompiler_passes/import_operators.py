"""Quantized operators as their float operators between DequantizeLinear and QuantizeLinear."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.errors import UserError
from qcompiler.ir import Node, Tensor
from qcompiler.ops import op_key
from qcompiler.rewrite import Refusal, Rewriter


@dataclass(frozen=True)
class _Form:
    """Where an operator has what: `inputs`: position of each tensor, its scale and zero point behind it; `output`: position of
    the output's scale, its zero point behind it; `bias`: position of an int32 bias. `attributes` is what is understood of them.
    """

    op: str
    inputs: tuple[int, ...]
    output: int
    attributes: frozenset[str] = frozenset()
    bias: int | None = None


_POOL = frozenset({"auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides"})
_CONV = frozenset({"auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"})
_GEMM = frozenset({"alpha", "transA", "transB"})

FORMS: dict[str, _Form] = {
    "QLinearConv": _Form("Conv", (0, 3), 6, _CONV, bias=8),
    "QLinearMatMul": _Form("MatMul", (0, 3), 6),
    "com.microsoft.QGemm": _Form("Gemm", (0, 3), 7, _GEMM, bias=6),
    "com.microsoft.QLinearAdd": _Form("Add", (0, 3), 6),
    "com.microsoft.QLinearAveragePool": _Form("AveragePool", (0,), 3, _POOL),
    "com.microsoft.QLinearGlobalAveragePool": _Form("GlobalAveragePool", (0,), 3),
    "com.microsoft.QLinearLeakyRelu": _Form("LeakyRelu", (0,), 3, frozenset({"alpha"})),
    "com.microsoft.QLinearMul": _Form("Mul", (0, 3), 6),
    "com.microsoft.QLinearSigmoid": _Form("Sigmoid", (0,), 3),
}
"""The operators with a fixed number of inputs."""

_IGNORED = {"channels_last": 0}
"""Attributes that may be there with this value."""


def to_float(rewriter: Rewriter, node: Node) -> Refusal | None:
    """A rule for the operators of `FORMS`. Raises UserError for an attribute or constant that is not understood."""
    form = FORMS[op_key(node.op, node.domain)]
    attributes = {k: v for k, v in node.attrs.items() if _IGNORED.get(k) != v}
    unknown = [k for k in attributes if k not in form.attributes]
    if unknown:
        raise UserError(f"{node.op}'s attribute {unknown[0]} is not understood", f"node {node.name!r}")
    varying = _varying(node, [*(j for i in form.inputs for j in (i + 1, i + 2)), form.output, form.output + 1])
    if varying is not None:
        return varying
    inputs = [_dequantized(rewriter, node, i, _axis(form, node, i)) for i in form.inputs]
    bias = None if form.bias is None else ir.optional_input(node, form.bias)
    if bias is not None:
        product = _constant(node, form.inputs[0] + 1) * _constant(node, form.inputs[1] + 1).reshape(-1)
        values = ir.value(bias)
        if values is None:
            raise UserError(f"{node.op}'s bias is not a constant", f"node {node.name!r}")
        real = values.astype(np.float64) * product * node.attrs.get("alpha", 1.0)
        inputs.append(rewriter.constant(f"{node.name}_bias", real.astype(np.float32)))
    result = rewriter.node(form.op, inputs, origin=node, hint=node.name, **attributes)
    _quantize(rewriter, node, result, form.output)
    return None


def concat_to_float(rewriter: Rewriter, node: Node) -> Refusal | None:
    """The rule for QLinearConcat: the output's scale and zero point, then three inputs for each tensor."""
    varying = _varying(node, [i for i in range(len(node.inputs)) if i % 3 != 2])
    if varying is not None:
        return varying
    inputs = [_dequantized(rewriter, node, i, None) for i in range(2, len(node.inputs), 3)]
    result = rewriter.node("Concat", inputs, origin=node, hint=node.name, axis=node.attrs["axis"])
    _quantize(rewriter, node, result, 0)
    return None


def _axis(form: _Form, node: Node, position: int) -> int | None:
    """The channel axis of a weight."""
    if position == 0 or form.op not in ("Conv", "Gemm", "MatMul"):
        return None
    return 0 if form.op == "Conv" or node.attrs.get("transB", 0) else -1


def _varying(node: Node, positions: Iterable[int]) -> Refusal | None:
    """The refusal of a node with a scale or zero point, at these inputs, that is no constant."""
    for tensor in (ir.optional_input(node, i) for i in positions):
        if tensor is not None and ir.value(tensor) is None:
            return Refusal("a scale or zero point is not a constant", tensor.name)
    return None


def _constant(node: Node, index: int) -> NDArray[Any]:
    """A scale or zero point; a zero point that is left out is 0."""
    tensor = ir.optional_input(node, index)
    values = np.zeros((), np.uint8) if tensor is None else ir.value(tensor)
    assert values is not None
    return values.astype(np.float64) if values.dtype.kind == "f" else values


def _dequantized(rewriter: Rewriter, node: Node, index: int, axis: int | None) -> Tensor:
    tensor, integers = node.inputs[index], ir.value(node.inputs[index])
    scale, zero = (_constant(node, index + 1), _constant(node, index + 2))
    if integers is None:
        real = rewriter.variable(f"{tensor.name}_real", np.dtype(np.float32), tensor.shape)
        inputs = [tensor, *(node.inputs[i] for i in (index + 1, index + 2))]
        rewriter.node("DequantizeLinear", inputs, [real], origin=node, hint=f"{node.name}_dequantize")
        return real
    shape = [1] * integers.ndim
    if axis is not None and scale.size > 1:
        shape[axis] = -1
    values = (integers.astype(np.int64) - zero.astype(np.int64).reshape(shape if zero.size > 1 else [])) * (
        scale.reshape(shape if scale.size > 1 else [])
    )
    return rewriter.constant(f"{tensor.name}_real", values.astype(np.float32))


def _quantize(rewriter: Rewriter, node: Node, result: Node, scale: int) -> None:
    """Let `result` take the place of `node`, behind a QuantizeLinear if the output has a scale."""
    if ir.optional_input(node, scale) is None:
        rewriter.take_output(result, node.outputs[0])
    else:
        _constant(node, scale)
        inputs = [result.outputs[0], *(node.inputs[i] for i in (scale, scale + 1) if i < len(node.inputs))]
        result.outputs[0].dtype, result.outputs[0].shape = np.dtype(np.float32), node.outputs[0].shape
        quantize = rewriter.node("QuantizeLinear", inputs, origin=node, hint=f"{node.name}_quantize")
        rewriter.take_output(quantize, node.outputs[0])
    rewriter.remove(node)
