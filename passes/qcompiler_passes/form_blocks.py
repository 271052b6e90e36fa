"""form-blocks: group each operator with the activation that its requantize step absorbs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from qcompiler import ir
from qcompiler.ir import Node
from qcompiler.ops import Lowering, op_key
from qcompiler.rewrite import Rewriter
from qcompiler.state import Block, CompileState, Phase

_ABSORBING = {Lowering.MAC, Lowering.ADD, Lowering.MUL, Lowering.SUM}


@dataclass(frozen=True)
class FormBlocks:
    """Record which nodes run as one: Conv|Gemm|MatMul|Add|Mul|GlobalAveragePool, then Relu|Clip; chains of functions.

    The graph does not change. An activation is absorbed if nothing else reads what it reads; saturation does its work then.
    Element-wise functions in a row, with Add, Mul, … of single numbers between them, are one function with one table.
    `fuse=false` makes each node a block of its own, to measure what fusion brings.
    """

    fuse: bool = True

    name: ClassVar[str] = "form-blocks"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = Phase.FUSED

    def run(self, state: CompileState) -> int:
        """Return the number of nodes absorbed, 0 if the blocks are formed already."""
        if state.blocks:
            return 0
        rewriter = Rewriter(state)
        absorbed: set[str] = set()
        for node in state.graph.nodes:
            if node.name in absorbed:
                continue
            block = _block(rewriter, node, self.fuse)
            state.blocks[node.name] = block
            absorbed.update(block.nodes[1:])
            rewriter.count += len(block.nodes) - 1
        return rewriter.count


def _lowering(state: CompileState, node: Node) -> Lowering:
    rule = state.ops.get(op_key(node.op, node.domain))
    return Lowering.NONE if rule is None else rule.lowering


def _block(rewriter: Rewriter, root: Node, fuse: bool) -> Block:
    nodes, low, high = [root], -math.inf, math.inf
    lowering = _lowering(rewriter.state, root)
    while fuse and not rewriter.exhausted and lowering in {*_ABSORBING, Lowering.TABLE}:
        follower = rewriter.only_user(nodes[-1].outputs[0])
        if follower is None:
            break
        if lowering is Lowering.TABLE:
            if not _is_function(rewriter.state, follower):
                break
        else:
            bounds = activation_bounds(follower)
            if bounds is None:
                break
            low, high = (min(max(edge, bounds[0]), bounds[1]) for edge in (low, high))
        nodes.append(follower)
    outputs = tuple(t.name for t in nodes[-1].outputs if not t.is_empty())
    return Block(root.name, tuple(n.name for n in nodes), outputs, low, high)


def _is_function(state: CompileState, node: Node) -> bool:
    """Whether a node computes each element from one element of one tensor."""
    if op_key(node.op, node.domain) in ("Add", "Sub", "Mul", "Div"):
        rank = len(ir.shape(node.outputs[0]) or (1,))
        sizes = [(c.size, c.ndim <= rank) for t in node.inputs if (c := ir.value(t)) is not None]
        return sizes == [(1, True)]
    return _lowering(state, node) is Lowering.TABLE or activation_bounds(node) is not None


def activation_bounds(node: Node) -> tuple[float, float] | None:
    """The constant bounds of a Relu or Clip, or None for any other node."""
    if node.op == "Relu" and not node.domain:
        return 0.0, math.inf
    if node.op != "Clip" or node.domain:
        return None
    bounds = []
    for index, default in ((1, -math.inf), (2, math.inf)):
        given = ir.optional_input(node, index)
        number = default if given is None else ir.scalar(given)
        if number is None:
            return None
        bounds.append(number)
    return (bounds[0], bounds[1]) if bounds[0] <= bounds[1] else None
