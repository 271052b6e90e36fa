"""Element types and shapes of all tensors, by ONNX shape inference on a copy of the graph without its weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qcompiler import functions, ir, value_types
from qcompiler.ir import Graph, Node, Tensor

SMALL = 1024
"""Constants up to this number of elements go into the inference: they may be shapes, axes, pads or scales."""

_ACTIVATIONS = ("FastGelu", "Gelu", "QuickGelu")
"""Operators of ONNX Runtime, unknown to the inference, whose result has the type and shape of their first input."""

Dim = int | str | None


def infer_shapes(graph: Graph, trust: bool = True, facts: Collection[str] = ()) -> None:
    """Fill in element types and shapes, subgraphs included; inferred facts replace what the tensors said before.

    What inference leaves open keeps its former value if `trust`, else only if no standard operator made the tensor: a model
    file may carry shapes from before its inputs were edited. `facts`: tensors whose shapes are known to be right, which inference
    starts from. Never fails: if inference does, everything stays as it is.
    """
    for tensor in ir.tensors(graph):
        if tensor.shape is not None and not ir.is_constant(tensor):
            tensor.shape = [_valid(d) for d in tensor.shape]
    try:
        inferred = onnx.shape_inference.infer_shapes(_skeleton(graph, facts), data_prop=True)
    except Exception:  # shapes are a help, not a need, and ONNX Runtime has the last word on the model
        return
    symbols = {d for t in graph.inputs for d in t.shape or () if isinstance(d, str)}
    _update(graph, inferred.graph, symbols, trust)


def kind(tensor: Tensor) -> str:
    """NumPy's letter for the kind of numbers in a tensor (`f`, `i`, `u`, `b`); empty for other types and unknown ones."""
    if tensor.dtype is None or isinstance(
        tensor.dtype, int
    ):  # graphsurgeon keeps the ONNX code of types that NumPy lacks
        return ""
    letter = np.dtype(tensor.dtype).kind
    return letter if letter in "fiub" else ""


def _valid(dim: Any) -> Dim:
    """Exporters write unknown sizes as -1 and "?", the latter for sizes that differ."""
    if isinstance(dim, str):
        return dim if dim.strip("?") else None
    return int(dim) if dim is not None and dim >= 0 else None


def _skeleton(graph: Graph, facts: Collection[str]) -> onnx.ModelProto:
    called = {n.op for g in ir.all_graphs(graph) for n in g.nodes if n.domain == functions.DOMAIN}
    domains = {d.domain: d.version for d in graph.import_domains or []} | {"": graph.opset}
    domains.pop("ai.onnx", None)
    for name in sorted({n.domain or "" for g in ir.all_graphs(graph) for n in g.nodes}):
        domains.setdefault(name, 1)
    proto = _graph_proto(graph, set())
    proto.value_info.extend(_value_info(t) for n in graph.nodes for t in n.outputs if t.name in facts)
    return helper.make_model(
        proto,
        opset_imports=[helper.make_opsetid(d, v) for d, v in domains.items()],
        functions=[functions.proto(name, graph.opset) for name in sorted(called)],
        ir_version=ir.IR_VERSION,
    )


def _graph_proto(graph: Graph, outer: set[str]) -> onnx.GraphProto:
    """The graph with its small constants as initializers; of the large ones only the type."""
    proto = onnx.GraphProto(name=graph.name or "graph")
    proto.input.extend(_value_info(t) for t in graph.inputs)
    proto.output.extend(_value_info(t, dims=False) for t in graph.outputs)
    tensors = list(ir.tensors(graph))
    for tensor in tensors:
        if ir.is_constant(tensor) and tensor.name not in outer:
            if math.prod(tensor.shape) <= SMALL and kind(tensor):
                proto.initializer.append(numpy_helper.from_array(np.asarray(ir.value(tensor)), tensor.name))
            else:
                proto.value_info.append(_value_info(tensor))
    visible = outer | {t.name for t in tensors}
    for node in graph.nodes:
        proto.node.append(_node_proto(node, visible))
        if not _is_standard(node) and not _is_activation(node):
            proto.value_info.extend(_value_info(t) for t in node.outputs if t.dtype is not None)
    return proto


def _node_proto(node: Node, visible: set[str]) -> onnx.NodeProto:
    if _is_activation(node):
        return helper.make_node("Identity", [node.inputs[0].name], [node.outputs[0].name], node.name)
    proto = helper.make_node(
        node.op, [t.name for t in node.inputs], [t.name for t in node.outputs], node.name, domain=node.domain
    )
    for key, attribute in node.attrs.items():
        if isinstance(attribute, Graph):
            proto.attribute.append(helper.make_attribute(key, _graph_proto(attribute, visible)))
        elif isinstance(attribute, ir.Constant):
            proto.attribute.append(helper.make_attribute(key, ir.constant_proto(attribute)))
        elif not isinstance(attribute, (list, tuple)) or len(attribute):
            proto.attribute.append(helper.make_attribute(key, attribute))
    return proto


def _is_standard(node: Node) -> bool:
    return (node.domain or "") in ("", "ai.onnx", functions.DOMAIN)


def _is_activation(node: Node) -> bool:
    return node.domain == ir.CONTRIB_DOMAIN and node.op in _ACTIVATIONS


def _value_info(tensor: Tensor, dims: bool = True) -> onnx.ValueInfoProto:
    kind = getattr(tensor, "type", "tensor_type")
    if isinstance(kind, onnx.TypeProto):
        return helper.make_value_info(tensor.name, kind)
    if tensor.dtype is None or kind != "tensor_type":
        return onnx.ValueInfoProto(name=tensor.name)
    code = tensor.dtype if isinstance(tensor.dtype, int) else helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, code, tensor.shape if dims else None)


def _update(graph: Graph, proto: onnx.GraphProto, symbols: set[str], trust: bool) -> None:
    found = {v.name: v.type for v in (*proto.value_info, *proto.output)}
    outputs = {t.name for t in graph.outputs}
    for node, node_proto in zip(graph.nodes, proto.node, strict=True):
        for tensor in node.outputs:
            if not trust and _is_standard(node) and tensor.name not in outputs:
                tensor.shape = None
            _refine(tensor, found.get(tensor.name), symbols, tensor.name in outputs)
        bodies = {a.name: a.g for a in node_proto.attribute if a.HasField("g")}
        for key, attribute in node.attrs.items():
            if isinstance(attribute, Graph):
                _update(attribute, bodies[key], symbols, trust)


def _refine(tensor: Tensor, found: onnx.TypeProto | None, symbols: set[str], is_output: bool) -> None:
    if found is not None and value_types.is_other(found):
        value_types.set_type(tensor, found)
    if found is None or not found.HasField("tensor_type") or not found.tensor_type.elem_type:
        return
    tensor.dtype = helper.tensor_dtype_to_np_dtype(found.tensor_type.elem_type)
    if not found.tensor_type.HasField("shape"):
        return
    dims = [_dim(d) for d in found.tensor_type.shape.dim]
    former: Iterable[Dim] = (
        tensor.shape if tensor.shape is not None and len(tensor.shape) == len(dims) else [None] * len(dims)
    )
    tensor.shape = [_merge(new, old, symbols, is_output) for new, old in zip(dims, former, strict=True)]


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None


def _merge(new: Dim, old: Dim, symbols: set[str], is_output: bool) -> Dim:
    """The better of two sizes; a graph output keeps its declared symbol, the user may know it by that."""
    if isinstance(new, int) or old is None:
        return new
    if isinstance(old, int):
        return new if new in symbols else old
    return old if is_output or new is None else new
