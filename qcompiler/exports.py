"""What exporters write that ONNX Runtime does not take."""

from __future__ import annotations

import onnx
from onnx import helper

_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")


def make_scalars(model: onnx.ModelProto) -> None:
    """Let conversions whose scale is a vector of one number, as PyTorch writes them, read a scalar; in place.

    Fused kernels such as QLinearAdd refuse such vectors, so that the model would not load.
    """
    single = {t.name for t in model.graph.initializer if list(t.dims) == [1]}
    single |= {n.output[0] for n in model.graph.node if n.op_type == "Constant" and _dims(n) == [1]}
    scalars: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type in _CONVERSIONS and node.input[1] in single:
            for index in range(1, len(node.input)):
                name = node.input[index]
                if name and name not in scalars:
                    scalars[name] = f"{name}_as_scalar"
                    nodes.append(helper.make_node("Squeeze", [name], [scalars[name]], name=scalars[name]))
                node.input[index] = scalars.get(name, "")
        nodes.append(node)
    if scalars:
        del model.graph.node[:]
        model.graph.node.extend(nodes)


def _dims(constant: onnx.NodeProto) -> list[int] | None:
    values = [a.t for a in constant.attribute if a.name == "value"]
    return list(values[0].dims) if values else None
