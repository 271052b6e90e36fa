"""QONNX's `Quant` (brevitas, QKeras) in standard operators.

`Quant(x, scale, zero point, bits)` is `(clip(round(x / scale + zero point), qmin, qmax) - zero point) * scale`, in float
(Pappalardo et al. 2022, arXiv 2206.07527). Behind it comes the pipeline for any quantized model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qcompiler.errors import UserError

DOMAINS = ("qonnx.custom_op.general", "finn.custom_op.general", "onnx.brevitas")

_MIN_OPSET = 11
"""Since then Clip takes its bounds as inputs."""


def expand(model: onnx.ModelProto) -> None:
    """Replace the `Quant` nodes of the main graph, in place. Raises UserError for other operators of these domains.

    One scale, up to 8 bits: a Clip (of fewer than 8 bits), QuantizeLinear and DequantizeLinear. Else Div, Round, Clip and Mul,
    which fold-constants computes on weights.
    """
    if not any(node.domain in DOMAINS for node in model.graph.node):
        return
    opset = max((d.version for d in model.opset_import if d.domain in ("", "ai.onnx")), default=0)
    if opset < _MIN_OPSET:
        raise UserError(f"QONNX operators need opset {_MIN_OPSET} or newer, not {opset}", "model")
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += _expanded(model.graph, node, constants) if node.domain in DOMAINS else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    kept = [d for d in model.opset_import if d.domain not in DOMAINS]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _expanded(
    graph: onnx.GraphProto, node: onnx.NodeProto, constants: Mapping[str, NDArray[Any]]
) -> Iterator[onnx.NodeProto]:
    where = f"node {node.name or node.output[0]!r}"
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type != "Quant":
        raise UserError(f"{node.op_type} of {node.domain} has no counterpart here", where)
    if attributes.get("rounding_mode", b"ROUND") not in (b"ROUND", b"HALF_EVEN"):
        raise UserError(f"rounding mode {attributes['rounding_mode'].decode()} is not supported", where)
    known = [constants.get(name) for name in node.input[1:4]]
    if any(value is None for value in known) or any(k is not None and k.size != 1 for k in known[1:]):
        raise UserError("Quant needs a constant scale, and one constant zero point and number of bits", where)
    scale, zero, bits = (np.asarray(value, np.float32) for value in known)
    low, high = _range(float(bits.reshape(())), bool(attributes.get("signed", 1)), bool(attributes.get("narrow", 0)))
    yield from _Writer(graph, node).write(scale, float(zero.reshape(())), low, high, node.input[0] in constants)


def _range(bits: float, signed: bool, narrow: bool) -> tuple[float, float]:
    """The least and greatest integer."""
    if signed:
        return -(2.0 ** (bits - 1)) + narrow, 2.0 ** (bits - 1) - 1
    return 0.0, 2.0**bits - 1 - narrow


class _Writer:
    """Nodes in place of one, with names derived from its output."""

    def __init__(self, graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
        self.graph, self.node = graph, node
        self.tensor = node.input[0]
        self.count = 0

    def write(
        self, scale: NDArray[Any], zero: float, low: float, high: float, is_constant: bool
    ) -> Iterator[onnx.NodeProto]:
        signed = low < 0
        least, greatest = (-128, 127) if signed else (0, 255)
        whole = zero == round(zero) and least <= zero <= greatest
        if scale.size > 1 or is_constant or not (least <= low and high <= greatest and whole):
            yield self._op("Div", scale)
            yield self._op("Round")
            yield self._op("Clip", np.float32(low - zero), np.float32(high - zero))
            yield self._op("Mul", scale, last=True)
            return
        scale = scale.reshape(())
        if (low, high) != (least, greatest):
            yield self._op("Clip", np.float32(scale * (low - zero)), np.float32(scale * (high - zero)))
        integer = np.array(zero, np.int8 if signed else np.uint8)
        yield self._op("QuantizeLinear", scale, integer)
        yield self._op("DequantizeLinear", scale, integer, last=True)

    def _op(self, op: str, *constants: Any, last: bool = False) -> onnx.NodeProto:
        self.count += 1
        stem = f"{self.node.output[0]}_quant_{self.count}"
        names = [f"{stem}_{i}" for i in range(len(constants))]
        for name, value in zip(names, constants, strict=True):
            self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        output = self.node.output[0] if last else stem
        made = helper.make_node(op, [self.tensor, *names], [output], f"{self.node.name or stem}_{op}_{self.count}")
        self.tensor = output
        return made
