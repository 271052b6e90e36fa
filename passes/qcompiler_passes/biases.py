"""Layers with a bias that can take a correction, and what of their results a correction compares."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from qcompiler import ir
from qcompiler.channel_means import Channels
from qcompiler.ir import Node
from qcompiler.ops import Lowering, rule_of
from qcompiler.rewrite import Rewriter
from qcompiler.state import CompileState
from qcompiler_passes.form_blocks import activation_bounds

_POSITIONS = 14
"""Of an image, so many rows and columns count at least, if it has them: rounding errs alike everywhere."""


def layers_with_bias(state: CompileState) -> list[Node]:
    """Conv and Gemm that are quantized, or behind something that is."""
    return [n for n in _reached(state) if _has_bias_input(state, n)]


def ensure_bias(state: CompileState, layers: Iterable[Node]) -> None:
    """Give each of the layers a bias of its own with one number per channel, zero where it had none."""
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


def results(state: CompileState, layers: Iterable[Node]) -> list[Channels]:
    """What the blocks of the layers give, within the bounds of the blocks."""
    nodes = {n.name: n for n in state.graph.nodes}
    tensors = {t.name: t for n in state.graph.nodes for t in n.outputs}
    found = []
    for layer in layers:
        block, weight = state.blocks[layer.name], ir.array(layer.inputs[1])
        clipped = activation_bounds(nodes[block.nodes[-1]]) == (block.low, block.high)
        count = weight.shape[0 if layer.op == "Conv" else 1]
        name = block.outputs[0]
        found.append(
            Channels(name, count, _steps(layer, tensors[name], weight.ndim - 2), block.low, block.high, clipped)
        )
    return found


def _steps(layer: Node, result: ir.Tensor, axes: int) -> tuple[int, ...]:
    sizes = (ir.shape(result) or ())[2:]
    if axes != 2 or layer.attrs.get("auto_pad", "NOTSET") != "NOTSET":
        return (1,) * axes
    return tuple(max(size // _POSITIONS, 1) if isinstance(size, int) else 1 for size in sizes) or (1, 1)


def _has_bias_input(state: CompileState, node: Node) -> bool:
    rule = rule_of(state.ops, node)
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
