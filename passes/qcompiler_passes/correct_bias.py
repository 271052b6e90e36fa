"""correct-bias: take the mean error of quantization out of every layer through its bias, at no cost at run time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Graph, Node, Tensor
from qcompiler.ops import Lowering, op_key
from qcompiler.relay import relay
from qcompiler.replay import Replay
from qcompiler.rewrite import Rewriter
from qcompiler.runtime import run_all
from qcompiler.state import Block, CompileState, Feeds, Phase
from qcompiler_passes.insert_qdq import InsertQdq

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


LEAST_ACTIVE = 0.1
"""Below this share of outputs inside the activation's bounds, the bias is taken to move the mean as if it were this share."""


@dataclass(frozen=True)
class CorrectBias:
    """Empirical bias correction, layer after layer (after Nagel et al. 2019, arXiv 1906.04721, section 4.2).

    Rounding shifts the mean of each output channel. The shift is measured on `samples` calibration samples, as the difference
    between the float layer and the quantized layer behind the already quantized and corrected layers before it, and taken out
    of the bias. Two things differ from the paper: means are compared behind the activation, where the next layer sees them, and
    divided by the share of outputs that the bias moves there; and each shift is shrunk by its sampling error, as estimated
    from the samples' variance, so that few samples do not add noise. Layers that stay float are corrected, too, where quantized
    ones are before them. Layers without a place for a bias (MatMul) stay as they are, and so
    do models that came quantized: their biases were chosen with that in view.
    """

    samples: int = 64

    name: ClassVar[str] = "correct-bias"
    requires: ClassVar[Phase] = Phase.CALIBRATED
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of layers corrected."""
        if state.phase >= Phase.QDQ or state.calibration is None or state.imported:
            return 0
        layers = [n for n in _reached(state) if _has_bias_input(state, n) and n.name not in state.corrected]
        if not layers:
            return 0
        _ensure_bias(state, layers)
        samples = list(islice(state.calibration, self.samples))
        blocks = [state.blocks[n.name] for n in layers]
        wanted = _float_means(state.graph, layers, blocks, samples)
        quantized = _QuantizedPrefix(_quantized_twin(state), layers, samples)
        rewriter = Rewriter(state)
        for layer, block, means in zip(layers, blocks, wanted, strict=True):
            if rewriter.exhausted:
                break
            measured, active = quantized.next_layer(block)
            shift = _shift(means[: len(measured)], measured, active)
            bias = (ir.array(layer.inputs[2]) + shift).astype(np.float32)
            rewriter.set_input(layer, 2, rewriter.constant(f"{layer.name}_corrected_bias", bias))
            quantized.shift_bias(shift)
            state.corrected.add(layer.name)
            rewriter.count += 1
        return rewriter.count


def _has_bias_input(state: CompileState, node: Node) -> bool:
    rule = state.ops.get(op_key(node.op, node.domain))
    is_layer = (
        node.name in state.blocks and rule is not None and rule.lowering is Lowering.MAC and not rule.refuse(node)
    )
    return is_layer and node.op in ("Conv", "Gemm") and ir.type_name(node.inputs[1]) == "float32"


def _reached(state: CompileState) -> list[Node]:
    """The nodes of quantized blocks, and those behind them."""
    quantized = {name for block in state.blocks.values() if block.quantized for name in block.nodes}
    behind: set[int] = set()
    found = []
    for node in state.graph.nodes:
        if node.name in quantized or any(id(t) in behind for t in (*node.inputs, *ir.captures(node))):
            behind.update(id(t) for t in node.outputs)
            found.append(node)
    return found


def _ensure_bias(state: CompileState, layers: list[Node]) -> None:
    rewriter = Rewriter(state)
    for node in layers:
        channels = ir.array(node.inputs[1]).shape[0 if node.op == "Conv" else 1]
        bias = ir.optional_input(node, 2)
        values = np.zeros(1, np.float32) if bias is None else ir.array(bias).reshape(-1)
        constant = rewriter.constant(f"{node.name}_bias", np.broadcast_to(values, (channels,)))
        if len(node.inputs) > 2:
            rewriter.set_input(node, 2, constant)
        else:
            ir.add_input(node, constant)


def _shift(wanted: F64, measured: F64, active: F64) -> F64:
    """How far to move the bias of each channel.

    wanted, measured: means behind the activation, shape (samples, channels); active: share of outputs within its bounds.
    The estimate is multiplied by max(0, 1 - variance of the mean / mean**2), the positive-part James-Stein factor.
    """
    error = wanted - measured
    mean = error.mean(axis=0)
    variance = error.var(axis=0) / len(error)
    signal = np.square(mean)
    certainty = np.divide(np.maximum(signal - variance, 0), signal, out=np.zeros_like(mean), where=signal > variance)
    share = active.mean(axis=0)
    return np.where(share > 0, mean * certainty / np.maximum(share, LEAST_ACTIVE), 0)


def _float_means(graph: Graph, layers: list[Node], blocks: list[Block], samples: list[Feeds]) -> list[F64]:
    """Per layer, the mean of each channel behind the activation: (samples, channels)."""
    copy = graph.copy()
    by_name = {n.name: n for n in copy.nodes}
    copy.outputs = [_tap(copy, by_name[n.name], b)[0] for n, b in zip(layers, blocks, strict=True)]
    ir.drop_dead_nodes(copy)
    rows = run_all(relay(ir.to_proto(copy)), samples)
    return [np.asarray([row[i] for row in rows], np.float64) for i in range(len(layers))]


def _tap(graph: Graph, node: Node, block: Block) -> list[Tensor]:
    """Add to the graph, for each channel of a layer: the mean behind the activation, and the share that the bias moves."""
    raw = node.outputs[0]
    rank = _rank(node)
    axes = [i for i in range(rank) if i != (1 if node.op == "Conv" else rank - 1)]
    bounds = [
        ir.Constant(f"{raw.name}_{which}", np.asarray(np.clip(bound, *_FINITE), np.float32))
        for which, bound in (("low", block.low), ("high", block.high))
    ]
    clipped = _append(graph, "Clip", [raw, *bounds], np.float32)
    within = _append(graph, "Cast", [_append(graph, "Equal", [raw, clipped], np.bool_)], np.float32, to=1)
    return [_mean(graph, t, axes) for t in (clipped, within)]


def _rank(node: Node) -> int:
    """The rank of a layer's output: 2 for Gemm, the weight's for Conv, whose weight may be dequantized."""
    if node.op == "Gemm":
        return 2
    dequantizer = ir.producer(node.inputs[1])
    return ir.array(node.inputs[1] if dequantizer is None else dequantizer.inputs[0]).ndim


_FINITE = (float(np.finfo(np.float32).min), float(np.finfo(np.float32).max))


def _append(graph: Graph, op: str, inputs: list[Tensor], dtype: Any, **attrs: Any) -> Tensor:
    name = f"{inputs[0].name}_tap_{op}"
    graph.nodes.append(ir.Node(op, name, attrs, inputs, [ir.Variable(name, np.dtype(dtype))]))
    return graph.nodes[-1].outputs[0]


def _mean(graph: Graph, tensor: Tensor, axes: list[int]) -> Tensor:
    if graph.opset < 18:
        return _append(graph, "ReduceMean", [tensor], np.float32, axes=axes, keepdims=0)
    wanted = ir.Constant(f"{tensor.name}_axes", np.asarray(axes, np.int64))
    return _append(graph, "ReduceMean", [tensor, wanted], np.float32, keepdims=0)


def _quantized_twin(state: CompileState) -> Graph:
    """The graph as insert-qdq will write it, for measurement."""
    twin = state.clone()
    twin.rewrite_limit = None
    InsertQdq().run(twin)
    return twin.graph


def _dequantized(tensor: Tensor) -> F32:
    """What a DequantizeLinear without zero point makes of constants."""
    node = ir.producer(tensor)
    if node is None:
        return ir.array(tensor)
    integers, scale = ir.array(node.inputs[0]), ir.array(node.inputs[1])
    shape = [1] * integers.ndim
    if scale.ndim:
        shape[node.attrs.get("axis", 1)] = -1
    return np.asarray(integers.astype(np.float32) * scale.reshape(shape), np.float32)


def _source(tensor: Tensor) -> Tensor:
    """The integers behind a tensor, or the tensor itself if it is float."""
    node = ir.producer(tensor)
    return node.inputs[0] if node is not None and node.op == "DequantizeLinear" else tensor


class _QuantizedPrefix:
    """The layers of a quantized graph, measured one after the other behind those that are corrected already."""

    def __init__(self, graph: Graph, layers: list[Node], samples: list[Feeds]) -> None:
        nodes = {n.name: n for n in graph.nodes}
        self._graph = graph
        self._layers = [nodes[n.name] for n in layers]
        self._replay = Replay(graph, samples, [_source(n.inputs[0]) for n in self._layers])
        self._position = -1

    def next_layer(self, block: Block) -> tuple[F64, F64]:
        """The channel means behind the activation, and the shares that the bias moves: (samples, channels) each."""
        self._position += 1
        count = len(self._graph.nodes)
        rows = self._replay.advance(_tap(self._graph, self._with_constants(self._layers[self._position]), block))
        for node in self._graph.nodes[count:]:
            ir.detach(node)
        del self._graph.nodes[count:]
        means, shares = (np.asarray([row[i] for row in rows], np.float64) for i in (1, 2))
        return means, shares

    def _with_constants(self, layer: Node) -> Node:
        """A copy of the layer with constants for weight and bias, for which ONNX Runtime has its fast float kernels."""
        inputs = [layer.inputs[0], *(ir.Constant(f"{t.name}_constant", _dequantized(t)) for t in layer.inputs[1:])]
        result = ir.Variable(f"{layer.outputs[0].name}_raw", np.dtype(np.float32))
        self._graph.nodes.append(ir.Node(layer.op, f"{layer.name}_raw", dict(layer.attrs), inputs, [result]))
        return self._graph.nodes[-1]

    def shift_bias(self, shift: F64) -> None:
        """Add to the bias of the layer that was measured last."""
        layer = self._layers[self._position]
        dq = ir.producer(layer.inputs[2])
        if dq is None:
            bias = ir.array(layer.inputs[2]) + shift.astype(np.float32)
            ir.set_input(layer, 2, ir.Constant(layer.inputs[2].name, bias))
            return
        integers = ir.array(dq.inputs[0]) + np.rint(shift / ir.array(dq.inputs[1]).astype(np.float64))
        ir.set_input(dq, 0, ir.Constant(dq.inputs[0].name, integers.astype(np.int32)))
