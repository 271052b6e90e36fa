"""The quantized graph, run up to one layer after the other, while weights and biases of layers change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Graph, Node, Tensor
from qcompiler.quant import F32
from qcompiler.replay import Replay
from qcompiler.state import CompileState, Feeds
from qcompiler_passes.insert_qdq import InsertQdq

F64 = NDArray[np.float64]


class QuantizedPrefix:
    """The graph as insert-qdq will write it, for measurement. `layers`: nodes of the state's graph, producers first."""

    def __init__(self, state: CompileState, layers: Sequence[Node], samples: Sequence[Feeds]) -> None:
        self.graph = _quantized_twin(state)
        nodes = {n.name: n for n in self.graph.nodes}
        self._layers = [nodes[n.name] for n in layers]
        self._replay = Replay(self.graph, samples, [integers_of(n.inputs[0]) for n in self._layers])
        self._position = -1

    def next_layer(self) -> Node:
        """Go on to the next layer: its node in the quantized graph."""
        self._position += 1
        return self._layers[self._position]

    def run(self, taps: Sequence[Tensor] = ()) -> list[list[NDArray[Any]]]:
        """Run up to this layer; return, per sample, what it reads, integers if it is quantized, and the values of the taps.

        `taps`: tensors that depend on what the layer reads and on constants only.
        """
        return self._replay.advance(taps)

    def set_weight(self, integers: NDArray[Any]) -> None:
        """Give this layer, which is quantized, other integers for its weight."""
        dq = ir.producer(self._layers[self._position].inputs[1])
        assert dq is not None
        ir.set_input(dq, 0, ir.Constant(dq.inputs[0].name, integers))

    def shift_bias(self, shift: F64) -> None:
        """Add to the bias of this layer."""
        layer = self._layers[self._position]
        dq = ir.producer(layer.inputs[2])
        if dq is None:
            bias = ir.array(layer.inputs[2]) + shift.astype(np.float32)
            ir.set_input(layer, 2, ir.Constant(layer.inputs[2].name, bias))
            return
        integers = ir.array(dq.inputs[0]) + np.rint(shift / ir.array(dq.inputs[1]).astype(np.float64))
        ir.set_input(dq, 0, ir.Constant(dq.inputs[0].name, integers.astype(np.int32)))


def integers_of(tensor: Tensor) -> Tensor:
    """The integers behind a tensor, or the tensor itself if it is float."""
    node = ir.producer(tensor)
    return node.inputs[0] if node is not None and node.op == "DequantizeLinear" else tensor


def in_float(tensor: Tensor, integers: NDArray[Any] | None = None) -> F32:
    """What the DequantizeLinear that makes the tensor makes of `integers`, by default those of the constant behind it."""
    node = ir.producer(tensor)
    if node is None or node.op != "DequantizeLinear":
        return np.asarray(ir.array(tensor) if integers is None else integers, np.float32)
    values = ir.array(node.inputs[0]) if integers is None else integers
    parameters = [ir.array(t) for t in node.inputs[1:] if not t.is_empty()]
    scale, zero_point = parameters if len(parameters) > 1 else (parameters[0], np.zeros(()))
    shape = [1] * values.ndim
    if scale.size > 1:
        shape[node.attrs.get("axis", 1)] = -1
    else:
        shape = []
    return np.asarray((values.astype(np.float32) - zero_point.reshape(shape).astype(np.float32)) * scale.reshape(shape))


def _quantized_twin(state: CompileState) -> Graph:
    twin = state.clone()
    twin.rewrite_limit = None
    InsertQdq().run(twin)
    return twin.graph
