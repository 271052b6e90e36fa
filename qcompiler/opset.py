"""Raise the opset of a graph: per operator, the versions whose signature or meaning changed.

An operator of the default domain that is not in `UPGRADES` means the same from opset `OLDEST` to `NEWEST`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qcompiler import ir, shapes
from qcompiler.errors import UserError
from qcompiler.ir import Graph, Node, Tensor
from qcompiler.rewrite import Rewriter
from qcompiler.state import CompileState

OLDEST = 1
"""Of what changed up to opset 7 (Add, BatchNormalization, PRelu …), ONNX Runtime runs the old form of Reshape only."""
NEWEST = 17

Upgrade = Callable[[Rewriter, Node], None]
"""Brings a node that is valid one opset earlier to the opset of the entry; raises UserError if that is impossible."""


def raise_opset(state: CompileState, opset: int) -> int:
    """Bring the graph and its subgraphs to at least this opset of the default domain; return how many nodes changed.

    Tensors must have their types and, where known, ranks (see `shapes`). Raises UserError for operators whose
    old meaning newer ones cannot express.
    """
    graph = state.graph
    if graph.opset >= opset:
        return 0
    if opset > NEWEST:
        raise UserError(f"models can be raised to opset {NEWEST} at most, not to {opset}", "target")
    count = 0
    for version in range(graph.opset + 1, opset + 1):
        for inner in list(ir.all_graphs(graph)):
            if _pending(inner, version):
                count += _raise_one(Rewriter(state, inner), version)
    _set_opset(graph, opset)
    return count


def _pending(graph: Graph, version: int) -> list[Node]:
    return [n for n in graph.nodes if not n.domain and version in UPGRADES.get(n.op, {})]


def _raise_one(rewriter: Rewriter, version: int) -> int:
    for node in _pending(rewriter.graph, version):
        UPGRADES[node.op][version](rewriter, node)
        rewriter.count += 1
    return rewriter.finish()


def _set_opset(graph: Graph, opset: int) -> None:
    others = [d for d in graph.import_domains or [] if d.domain not in ("", "ai.onnx")]
    domains = [onnx.helper.make_opsetid("", opset), *others]
    for inner in ir.all_graphs(graph):
        inner.opset, inner.import_domains = opset, domains


def _impossible(node: Node, reason: str) -> UserError:
    return UserError(f"cannot raise {node.op} to a newer opset: {reason}", f"node {node.name!r}")


def _known(tensor: Tensor) -> NDArray[Any] | None:
    """The value of an initializer or, in a subgraph, of a Constant node."""
    maker = ir.producer(tensor)
    if maker is not None and maker.op == "Constant" and "value" in maker.attrs:
        return ir.value(maker.attrs["value"])
    return ir.value(tensor)


def _dtype(node: Node) -> Any:
    return node.inputs[0].dtype if shapes.kind(node.inputs[0]) else np.float32


def _add_constants(rewriter: Rewriter, node: Node, **inputs: NDArray[Any] | None) -> None:
    """Append constant inputs; None leaves one out, unless none follows it."""
    last = max((i for i, v in enumerate(inputs.values()) if v is not None), default=-1)
    for name, array in list(inputs.items())[: last + 1]:
        empty = ir.Variable.empty()
        ir.add_input(node, empty if array is None else rewriter.constant(f"{node.name}_{name}", array))


def _int64(numbers: list[int] | None) -> NDArray[Any] | None:
    return None if numbers is None else np.array(numbers, np.int64)


def _integers_to_input(attribute: str) -> Upgrade:
    """An attribute with a list of integers becomes the next input."""

    def upgrade(rewriter: Rewriter, node: Node) -> None:
        _add_constants(rewriter, node, **{attribute: _int64(node.attrs.pop(attribute, None))})

    return upgrade


def _clip_11(rewriter: Rewriter, node: Node) -> None:
    bounds = {k: node.attrs.pop(k, None) for k in ("min", "max")}
    _add_constants(rewriter, node, **{k: None if v is None else np.array(v, _dtype(node)) for k, v in bounds.items()})


def _pad_11(rewriter: Rewriter, node: Node) -> None:
    fill = node.attrs.pop("value", 0.0)
    pads = _int64(node.attrs.pop("pads"))
    _add_constants(rewriter, node, pads=pads, value=np.array(fill, _dtype(node)) if fill else None)


def _slice_10(rewriter: Rewriter, node: Node) -> None:
    _add_constants(rewriter, node, **{k: _int64(node.attrs.pop(k, None)) for k in ("starts", "ends", "axes")})


def _topk_10(rewriter: Rewriter, node: Node) -> None:
    _add_constants(rewriter, node, k=_int64([node.attrs.pop("k")]))


def _dropout_10(rewriter: Rewriter, node: Node) -> None:
    if len(node.outputs) > 1 and (
        node.outputs[1].outputs or any(ir.is_output(rewriter.graph, t) for t in node.outputs[1:])
    ):
        raise _impossible(node, "its mask is used, and was a float tensor before opset 10")


def _dropout_12(rewriter: Rewriter, node: Node) -> None:
    node.attrs.pop("ratio", None)  # without a training_mode input nothing is dropped


def _batchnorm_9(rewriter: Rewriter, node: Node) -> None:
    if node.attrs.pop("spatial", 1) != 1:
        raise _impossible(node, "statistics per activation (spatial = 0) are gone since opset 9")


def _batchnorm_14(rewriter: Rewriter, node: Node) -> None:
    if any(t.outputs or ir.is_output(rewriter.graph, t) for t in node.outputs[1:]):
        raise _impossible(node, "it is in training mode (its statistics are used)")
    for tensor in node.outputs[1:]:
        list.clear(tensor.inputs)
    list.__delitem__(node.outputs, slice(1, None))


def _upsample_9(rewriter: Rewriter, node: Node) -> None:
    _add_constants(rewriter, node, scales=np.array(node.attrs.pop("scales"), np.float32))


def _upsample_10(rewriter: Rewriter, node: Node) -> None:
    node.op = "Resize"


def _resize_11(rewriter: Rewriter, node: Node) -> None:
    """Resize 10 maps coordinates without an offset; its nearest neighbour is below when it enlarges, above when it shrinks."""
    scales = _known(node.inputs[1])
    shrinks = scales is not None and bool((scales < 1).any())
    nearest = node.attrs.get("mode", "nearest") == "nearest"
    if nearest and shrinks and scales is not None and bool((scales > 1).any()):
        raise _impossible(node, "it enlarges one axis and shrinks another")
    node.attrs["coordinate_transformation_mode"] = "asymmetric"
    if nearest:
        node.attrs["nearest_mode"] = "ceil" if shrinks else "floor"
    ir.add_input(node, node.inputs[1])
    rewriter.set_input(node, 1, rewriter.constant(f"{node.name}_roi", np.zeros(0, np.float32)))


def _resize_13(rewriter: Rewriter, node: Node) -> None:
    """Inputs that had to be there are now left out."""
    for i in range(1, len(node.inputs)):
        array = _known(node.inputs[i])
        if array is not None and array.size == 0:
            rewriter.set_input(node, i, ir.Variable.empty())


def _scatter_11(rewriter: Rewriter, node: Node) -> None:
    node.op = "ScatterElements"


def _scan_9(rewriter: Rewriter, node: Node) -> None:
    """Before opset 9 Scan ran for each row of a batch: that is a Scan over the rows, whose body is the Scan of one row."""
    if ir.optional_input(node, 0) is not None:
        raise _impossible(node, "the lengths of its sequences are given")
    list.__delitem__(node.inputs, 0)
    directions = node.attrs.pop("directions", None)
    attrs = node.attrs if directions is None else node.attrs | {"scan_input_directions": directions}
    rows, results = ([_row(rewriter, t) for t in tensors] for tensors in (node.inputs, node.outputs))
    body = Graph([], rows, results, name=f"{node.name}_rows", opset=rewriter.graph.opset)
    Rewriter(rewriter.state, body).node("Scan", rows, results, origin=node, hint=f"{node.name}_row", **attrs)
    node.attrs.clear()
    node.attrs |= {"num_scan_inputs": len(rows), "body": body}


def _row(rewriter: Rewriter, tensor: Tensor) -> Tensor:
    """A new tensor for one row of another."""
    dims = ir.shape(tensor)
    return rewriter.variable(f"{tensor.name}_row", tensor.dtype, None if dims is None else dims[1:])


def _roi_align_16(rewriter: Rewriter, node: Node) -> None:
    node.attrs.setdefault("coordinate_transformation_mode", "output_half_pixel")


def _softmax_13(rewriter: Rewriter, node: Node) -> None:
    """Before opset 13 all axes from `axis` on are normalised together; since then, one axis is."""
    axis, dims = node.attrs.pop("axis", 1), ir.shape(node.inputs[0])
    if dims is not None:
        axis += len(dims) if axis < 0 else 0
        wide = [i for i in range(axis, len(dims)) if dims[i] != 1]
        if len(wide) <= 1:
            node.attrs["axis"] = wide[0] if wide else axis
            return
    node.attrs["axis"] = -1
    source, result = node.inputs[0], node.outputs[0]
    shape = rewriter.node("Shape", [source], origin=node, hint=f"{node.name}_shape")
    flat = rewriter.node("Flatten", [source], origin=node, hint=f"{node.name}_flat", axis=axis)
    flat.outputs[0].dtype = source.dtype
    rewriter.set_input(node, 0, flat.outputs[0])
    rows = rewriter.cut(result)
    rows.shape = None
    rewriter.node("Reshape", [rows, shape.outputs[0]], [result], origin=node, hint=f"{node.name}_restore")


UPGRADES: dict[str, dict[int, Upgrade]] = {
    "BatchNormalization": {9: _batchnorm_9, 14: _batchnorm_14},
    "Clip": {11: _clip_11},
    "Dropout": {10: _dropout_10, 12: _dropout_12},
    "Hardmax": {13: _softmax_13},
    "LogSoftmax": {13: _softmax_13},
    "Pad": {11: _pad_11},
    "Reshape": {5: _integers_to_input("shape")},
    "ReduceSum": {13: _integers_to_input("axes")},
    "Resize": {11: _resize_11, 13: _resize_13},
    "RoiAlign": {16: _roi_align_16},
    "Scan": {9: _scan_9},
    "Scatter": {11: _scatter_11},
    "Slice": {10: _slice_10},
    "Softmax": {13: _softmax_13},
    "Split": {13: _integers_to_input("split")},
    "Squeeze": {13: _integers_to_input("axes")},
    "TopK": {10: _topk_10},
    "Unsqueeze": {13: _integers_to_input("axes")},
    "Upsample": {9: _upsample_9, 10: _upsample_10},
}
"""Operator -> opset at which it changed -> what to do."""
