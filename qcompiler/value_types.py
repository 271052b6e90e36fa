"""Types that are no tensor's: sequences, optional values, maps; and types as attributes. onnx-graphsurgeon loses most of them.

What is of such a type keeps all of it in `Tensor.type`, in place of graphsurgeon's word, and has neither dtype nor shape.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_graphsurgeon as gs


def attach(graph: gs.Graph, proto: onnx.GraphProto) -> None:
    """Bring the types of a graph that was just imported from `proto` into it, subgraphs included."""
    values = (*proto.input, *proto.output, *proto.value_info)
    lost = {value.name: value.type for value in values if is_other(value.type)}
    if lost:
        for tensor in (*graph.inputs, *graph.outputs, *(t for n in graph.nodes for t in n.outputs)):
            if tensor.name in lost:
                set_type(tensor, lost[tensor.name])
    for node, node_proto in zip(graph.nodes, proto.node, strict=True):
        for attribute in node_proto.attribute:
            if attribute.type == onnx.AttributeProto.TYPE_PROTO:
                node.attrs[attribute.name] = attribute.tp
    for body, body_proto in _bodies(graph, proto):
        attach(body, body_proto)


def write(graph: gs.Graph, proto: onnx.GraphProto) -> None:
    """Bring the types of the inputs and outputs into the proto that the graph was just exported to, subgraphs included."""
    pairs = (*zip(graph.inputs, proto.input, strict=True), *zip(graph.outputs, proto.output, strict=True))
    for tensor, value in pairs:
        if isinstance(known := getattr(tensor, "type", None), onnx.TypeProto):
            value.type.CopyFrom(known)
    for body, body_proto in _bodies(graph, proto):
        write(body, body_proto)


def set_type(tensor: gs.Tensor, kind: onnx.TypeProto) -> None:
    """Let a tensor be of a type that is no tensor's."""
    tensor.dtype = tensor.shape = None
    tensor.type = kind  # type: ignore[attr-defined]


def is_other(kind: onnx.TypeProto) -> bool:
    """Whether a type is known, and is no tensor's."""
    return kind.WhichOneof("value") not in (None, "tensor_type", "sparse_tensor_type")


def _bodies(graph: gs.Graph, proto: onnx.GraphProto) -> Iterator[tuple[gs.Graph, onnx.GraphProto]]:
    for node, node_proto in zip(graph.nodes, proto.node, strict=True):
        protos = {a.name: a.g for a in node_proto.attribute if a.HasField("g")}
        for key, attribute in node.attrs.items():
            if isinstance(attribute, gs.Graph):
                yield attribute, protos[key]
