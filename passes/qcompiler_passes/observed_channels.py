"""What the channels of tensors hold, on some calibration samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler import ir
from qcompiler.ir import Graph, Tensor
from qcompiler.ops import Lowering, op_key
from qcompiler.relay import relay
from qcompiler.rewrite import Rewriter
from qcompiler.runtime import run_all
from qcompiler.state import CompileState, Feeds
from qcompiler_passes.channels import Channels, Factors, Ids

_LONG = 24
"""Rows of an image of which some stand for all."""


@dataclass(frozen=True)
class Observed:
    """A tensor that will be quantized: the variables of its channels and what these hold, shape (channels,) each."""

    name: str
    roots: Ids
    low: Factors
    high: Factors
    power: Factors


def observed_channels(state: CompileState, channels: Channels, samples: Iterable[Feeds]) -> list[Observed]:
    """The tensors with free variables, in the order of the graph; none if there are no samples."""
    copy = state.graph.copy()
    known = {t.name: t for t in ir.tensors(copy)}
    taps = {name: ids for name, ids in _quantized(state, channels).items() if ir.shape(known[name]) is not None}
    copy.outputs = [tap for name, ids in taps.items() for tap in _taps(copy, known[name], ids)]
    if not taps:
        return []
    ir.drop_dead_nodes(copy)
    rows = run_all(relay(ir.to_proto(copy)), samples)
    if not rows:
        return []
    columns = [
        np.stack([value.reshape(-1) for value in column]).astype(np.float64) for column in zip(*rows, strict=True)
    ]
    return [
        Observed(
            name,
            channels.roots(ids).reshape(-1),
            np.minimum(columns[3 * i].min(axis=0), 0),
            np.maximum(columns[3 * i + 1].max(axis=0), 0),
            columns[3 * i + 2].mean(axis=0),
        )
        for i, (name, ids) in enumerate(taps.items())
    ]


def _quantized(state: CompileState, channels: Channels) -> Mapping[str, Ids]:
    """The tensors with free variables that get a scale of their own: no moved ones, none before an absorbed activation."""
    rewriter = Rewriter(state)
    found = {}
    for node in state.graph.nodes:
        rule = state.ops.get(op_key(node.op, node.domain))
        if rule is not None and rule.lowering is Lowering.MOVE:
            continue
        for tensor in node.outputs:
            reader = rewriter.only_user(tensor)
            if not channels.is_fixed(channels.of(tensor)) and (reader is None or reader.op != "Relu"):
                found[tensor.name] = channels.of(tensor)
    return found


def _taps(graph: Graph, tensor: Tensor, ids: Ids) -> list[Tensor]:
    """Per channel: the least and the greatest value, and the mean square."""
    rank = len(ir.shape(tensor) or ())
    axes = [i for i in range(rank) if i < rank - ids.ndim or ids.shape[i - rank] == 1]
    some = _some(graph, tensor, axes)
    square = _append(graph, "Mul", [some, some])
    wanted = (("ReduceMin", tensor), ("ReduceMax", tensor), ("ReduceMean", square))
    if graph.opset < 18:
        return [_append(graph, op, [source], axes=axes, keepdims=0) for op, source in wanted]
    return [_append(graph, op, [source], axes, keepdims=0) for op, source in wanted]


def _some(graph: Graph, tensor: Tensor, axes: list[int]) -> Tensor:
    """Of a large image every fourth row: enough for a mean."""
    if len(axes) < 3:
        return tensor
    rows = axes[1]
    size = (ir.shape(tensor) or ())[rows]
    if not isinstance(size, int) or size < _LONG:
        return tensor
    return _append(graph, "Slice", [tensor], [0], [size], [rows], [4])


def _append(graph: Graph, op: str, tensors: list[Tensor], *numbers: list[int], **attrs: Any) -> Tensor:
    """Append a node that reads the tensors and then constants of its own, and return its result."""
    name = f"{tensors[0].name}_tap_{op}"
    constants = [ir.Constant(f"{name}_{i}", np.array(given, np.int64)) for i, given in enumerate(numbers)]
    output = ir.Variable(name, np.dtype(np.float32))
    graph.nodes.append(ir.Node(op, name, attrs, [*tensors, *constants], [output]))
    return graph.nodes[-1].outputs[0]
