"""What rounding a tensor costs at the outputs of the layers that read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Node
from qcompiler.ops import Lowering, rule_of
from qcompiler.quant import F32, QuantParams, dequantize, quantize
from qcompiler.replay import FRONT_BYTES, Replay
from qcompiler.state import CompileState, Feeds
from qcompiler_passes.layer_inputs import takes_vectors, vectors

_VECTORS = 2048
"""So many of the vectors that a layer multiplies with its weights are looked at."""


def least_error(
    state: CompileState, candidates: Sequence[dict[str, QuantParams]], samples: Sequence[Feeds]
) -> dict[str, QuantParams]:
    """For each tensor that layers read, those params with which these layers' outputs change least, all else in float.

    candidates: params by tensor name. The errors of several readers, each relative to the power of its output, are added up, also
    those of tensors that share their params. Tensors that no layer reads have the params of the first candidate.
    """
    layers = [n for n in state.graph.nodes if _is_layer(state, n)]
    graph = state.graph.copy()
    nodes = {n.name: n for n in graph.nodes}
    replay = Replay(graph, samples, [nodes[n.name].inputs[0] for n in layers], 4 * FRONT_BYTES)
    errors: dict[str, NDArray[np.float64]] = {}
    for layer in layers:
        name = layer.inputs[0].name
        values = [np.asarray(row[0], np.float32) for row in replay.advance()]
        found = _errors(layer, values, [params[name] for params in candidates])
        leader = state.leader(name)
        errors[leader] = errors.get(leader, 0) + found
    best = {leader: int(np.argmin(found)) for leader, found in errors.items()}
    return {name: candidates[best.get(state.leader(name), 0)][name] for name in candidates[0]}


def _is_layer(state: CompileState, node: Node) -> bool:
    block, rule = state.blocks.get(node.name), rule_of(state.ops, node)
    is_mac = block is not None and block.quantized and rule is not None and rule.lowering is Lowering.MAC
    return is_mac and takes_vectors(node) and node.inputs[0].name in state.params and ir.is_constant(node.inputs[1])


def _errors(layer: Node, values: list[NDArray[Any]], candidates: list[QuantParams]) -> NDArray[np.float64]:
    """The squared error of the layer's output under each of the params of what it reads, relative to its power."""
    weight = np.asarray(ir.array(layer.inputs[1]), np.float32)
    by_row = weight if layer.op == "Conv" else weight.T
    wanted = -(-_VECTORS // len(values))
    x = np.concatenate([vectors(layer, weight.shape, v, wanted, i) for i, v in enumerate(values)], axis=1)
    rows = by_row.reshape(len(x), -1, x.shape[2]).transpose(0, 2, 1)
    power = _square(x @ rows) or 1.0
    return np.array([_square((_rounded(x, params) - x) @ rows) / power for params in candidates])


def _rounded(x: F32, params: QuantParams) -> F32:
    return dequantize(quantize(x, params), params)


def _square(values: F32) -> float:
    return float(np.square(values, dtype=np.float64).sum())
