"""What ONNX Runtime's optimizer makes of a compiled model that costs time or accuracy: patterns that should not be there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx

_INTEGER_PRODUCTS = frozenset({"QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat"})
_FLOAT_PRODUCTS = frozenset({"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose"})


def find_traps(compiled: onnx.ModelProto, running: onnx.ModelProto) -> list[str]:
    """A sentence for each trap in `running`, the optimized graph of `compiled` (kernels): empty if all is well.

    Weights that are dequantized at every inference; float operators that were quantized on the way, or the reverse; MaxPool on
    integers with channels first; more changes of layout than there are conversions.
    """
    return [*_weights(running), *_products(compiled, running), *_pools(running), *_layouts(compiled, running)]


def _weights(running: onnx.ModelProto) -> Iterator[str]:
    constants = {t.name for t in running.graph.initializer}
    for node in running.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            yield f"ONNX Runtime dequantizes the constant '{node.input[0]}' at every inference"


def _products(compiled: onnx.ModelProto, running: onnx.ModelProto) -> Iterator[str]:
    before, after = (
        Counter(
            n.op_type in _INTEGER_PRODUCTS for n in m.graph.node if n.op_type in _INTEGER_PRODUCTS | _FLOAT_PRODUCTS
        )
        for m in (compiled, running)
    )
    if after[True] > before[True]:
        kept = {n.name for n in running.graph.node if n.op_type in _FLOAT_PRODUCTS}
        lost = [n.name for n in compiled.graph.node if n.op_type in _FLOAT_PRODUCTS and n.name not in kept]
        yield f"ONNX Runtime quantizes {after[True] - before[True]} float operators, of {', '.join(map(repr, lost))}"
    elif after[True] < before[True]:
        yield f"ONNX Runtime runs {before[True] - after[True]} integer operators in float"


def _pools(running: onnx.ModelProto) -> Iterator[str]:
    makers = {name: node for node in running.graph.node for name in node.output}
    for node in running.graph.node:
        maker = makers.get(node.input[0]) if node.op_type == "MaxPool" and not node.domain else None
        if maker is not None and (maker.op_type == "QuantizeLinear" or maker.op_type.startswith("QLinear")):
            yield f"ONNX Runtime runs the MaxPool '{node.name}' on integers with channels first, which is slow"


def _layouts(compiled: onnx.ModelProto, running: onnx.ModelProto) -> Iterator[str]:
    counts = [Counter(n.op_type for n in m.graph.node) for m in (compiled, running)]
    added = counts[1]["Transpose"] - counts[0]["Transpose"]
    conversions = counts[0]["QuantizeLinear"] + counts[0]["DequantizeLinear"]
    if added > conversions + 2:
        yield f"ONNX Runtime adds {added} Transpose for {conversions} conversions between float and integers"
