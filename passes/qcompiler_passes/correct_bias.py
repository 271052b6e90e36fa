"""correct-bias: take the mean error of quantization out of every layer through its bias, at no cost at run time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Graph, Node, Tensor
from qcompiler.ops import Lowering, op_key
from qcompiler.replay import Replay
from qcompiler.rewrite import Rewriter
from qcompiler.runtime import run, session
from qcompiler.state import CompileState, Feeds, Phase
from qcompiler_passes.insert_qdq import InsertQdq


@dataclass(frozen=True)
class CorrectBias:
    """Empirical bias correction (Nagel et al. 2019, arXiv 1906.04721, section 4.2), layer after layer.

    Rounding shifts the mean of each output channel. The shift is measured on `samples` calibration samples, as the difference
    between the float layer and the quantized layer behind the already quantized and corrected layers before it, and added to
    the bias. Layers without a place for a bias (MatMul) are left alone.
    """

    samples: int = 32

    name: ClassVar[str] = "correct-bias"
    requires: ClassVar[Phase] = Phase.CALIBRATED
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of layers corrected."""
        if state.phase >= Phase.QDQ or state.calibration is None:
            return 0
        layers = [n for n in state.graph.nodes if _has_bias_input(state, n) and n.name not in state.corrected]
        if not layers:
            return 0
        _ensure_bias(state, layers)
        samples = list(islice(state.calibration, self.samples))
        wanted = channel_means_of_float(state.graph, layers, samples)
        twin = _quantized_twin(state)
        nodes = {n.name: n for n in twin.nodes}
        rewriter = Rewriter(state)
        measured = _Measured(twin, [nodes[n.name] for n in layers], samples)
        for layer in layers:
            shift = wanted[layer.name] - measured.next_mean()
            bias = ir.array(layer.inputs[2])
            rewriter.set_input(
                layer, 2, rewriter.constant(f"{layer.name}_corrected_bias", (bias + shift).astype(np.float32))
            )
            measured.shift_bias(shift)
            state.corrected.add(layer.name)
        return len(layers)


def _has_bias_input(state: CompileState, node: Node) -> bool:
    block, rule = state.blocks.get(node.name), state.ops.get(op_key(node.op, node.domain))
    is_layer = block is not None and block.quantized and rule is not None and rule.lowering is Lowering.MAC
    return is_layer and node.op in ("Conv", "Gemm")


def _channels(node: Node) -> int:
    return int(ir.array(node.inputs[1]).shape[0 if node.op == "Conv" else 1])


def _ensure_bias(state: CompileState, layers: list[Node]) -> None:
    rewriter = Rewriter(state)
    for node in layers:
        bias = ir.optional_input(node, 2)
        values = np.zeros(_channels(node), np.float32) if bias is None else ir.array(bias).reshape(-1)
        values = np.broadcast_to(values, (_channels(node),))
        constant = rewriter.constant(f"{node.name}_bias", values)
        if len(node.inputs) > 2:
            rewriter.set_input(node, 2, constant)
        else:
            ir.add_input(node, constant)


def channel_means_of_float(graph: Graph, layers: list[Node], samples: list[Feeds]) -> dict[str, NDArray[np.float64]]:
    """The mean of each output channel of some layers of a float graph, over samples: node name -> (channels,)."""
    copy = ir.from_proto(ir.to_proto(graph))
    by_name = {n.name: n for n in copy.nodes}
    outputs = [_mean_tap(copy, by_name[n.name]) for n in layers]
    copy.outputs = outputs
    ir.drop_dead_nodes(copy)
    runner = session(ir.to_proto(copy), low_memory=True)
    rows = [run(runner, sample) for sample in samples]
    return {n.name: np.mean([row[i] for row in rows], axis=0, dtype=np.float64) for i, n in enumerate(layers)}


def _mean_tap(graph: Graph, node: Node) -> Tensor:
    """Add a mean over all axes but the channels to a layer's output."""
    out = node.outputs[0]
    rank = len(ir.shape(out) or ir.shape(node.inputs[0]) or ())
    axes = [i for i in range(rank) if i != (1 if node.op == "Conv" else rank - 1)]
    mean = ir.Variable(f"{node.name}_channel_mean", np.dtype(np.float32), [None])
    inputs: list[Tensor] = [out]
    attrs: dict[str, Any] = {"keepdims": 0}
    if graph.opset >= 18:
        inputs.append(ir.Constant(f"{mean.name}_axes", np.asarray(axes, np.int64)))
    else:
        attrs["axes"] = axes
    graph.nodes.append(ir.Node("ReduceMean", mean.name, attrs, inputs, [mean]))
    return mean


def _quantized_twin(state: CompileState) -> Graph:
    """The graph as insert-qdq will write it, for measurement."""
    twin = replace(
        state,
        graph=ir.from_proto(ir.to_proto(state.graph)),
        blocks=dict(state.blocks),
        params=dict(state.params),
        origin=dict(state.origin),
        rewrite_limit=None,
    )
    InsertQdq().run(twin)
    return twin.graph


class _Measured:
    """The channel means of the layers of a quantized graph, one layer after the other."""

    def __init__(self, graph: Graph, layers: list[Node], samples: list[Feeds]) -> None:
        self.graph, self.layers = graph, layers
        self.integers = [ir.producer(n.inputs[0]).inputs[0] for n in layers]  # type: ignore[union-attr]
        self.replay = Replay(graph, samples, self.integers)
        self.position = -1

    def next_mean(self) -> NDArray[np.float64]:
        """The mean of each output channel of the next layer, before any activation."""
        self.position += 1
        layer, x = self.layers[self.position], self.integers[self.position]
        self.replay.advance()
        means = self.replay.evaluate([x], [_mean_tap(self.graph, layer)])
        self.graph.nodes.pop()
        return np.asarray(np.mean([m[0] for m in means], axis=0, dtype=np.float64))

    def shift_bias(self, shift: NDArray[np.float64]) -> None:
        """Add to the bias of the layer that was measured last."""
        dq = ir.producer(self.layers[self.position].inputs[2])
        assert dq is not None
        scale = ir.array(dq.inputs[1]).astype(np.float64)
        integers = ir.array(dq.inputs[0]) + np.rint(shift / scale)
        ir.set_input(dq, 0, ir.Constant(dq.inputs[0].name, integers.astype(np.int32)))
