"""expand-operators: operators without an integer kernel as others that have one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler import ir
from qcompiler.ir import Node
from qcompiler.rewrite import Refusal, Rewriter, Rule, apply_rules
from qcompiler.shapes import infer_shapes
from qcompiler.state import CompileState, Phase
from qcompiler_passes.interleave import conv_transpose
from qcompiler_passes.resample import average_pool, resize
from qcompiler_passes.runtime_layers import unless_kept


@dataclass(frozen=True)
class ExpandOperators:
    """Write operators, where the target asks for it, as ones that it runs in integers. They compute the same function.

    ConvTranspose becomes a Conv that makes the pixels of each phase as channels, and DepthToSpace: all with
    `conv-transpose-as-conv`, dense ones whose windows overlap evenly with `overlapping-conv-transpose-as-conv`. With
    `interpolation-as-product`, Resize becomes such a Conv or a product with a constant matrix per axis, and so does an
    AveragePool whose windows have different divisors. With `pool-as-reduce`, GlobalAveragePool of a size that is not static
    becomes ReduceMean, and GlobalMaxPool ReduceMax.
    """

    name: ClassVar[str] = "expand-operators"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of operators expanded."""
        wanted = state.target.rewrites
        rules: dict[str, Rule] = {}
        if wanted & {"conv-transpose-as-conv", "overlapping-conv-transpose-as-conv"}:
            rules["ConvTranspose"] = conv_transpose
        if "interpolation-as-product" in wanted:
            rules |= {"Resize": resize, "AveragePool": average_pool}
        if "pool-as-reduce" in wanted:
            rules |= {"GlobalAveragePool": global_average, "GlobalMaxPool": global_max}
        count = apply_rules(Rewriter(state), {op: unless_kept(rule) for op, rule in rules.items()})
        if count:
            infer_shapes(state.graph)
        return count


def global_average(rewriter: Rewriter, node: Node) -> Refusal | None:
    """GlobalAveragePool of a size that is not static -> ReduceMean."""
    shape = ir.shape(node.inputs[0])
    if shape is not None and all(isinstance(d, int) for d in shape[2:]):
        return Refusal("its size is static", node.name)
    return _reduce(rewriter, node, "ReduceMean")


def global_max(rewriter: Rewriter, node: Node) -> Refusal | None:
    """GlobalMaxPool -> ReduceMax, which runs on integers."""
    return _reduce(rewriter, node, "ReduceMax")


def _reduce(rewriter: Rewriter, node: Node, op: str) -> Refusal | None:
    rank = len(ir.shape(node.inputs[0]) or ())
    if rank < 3:
        return Refusal("its rank is not known", node.inputs[0].name)
    axes = list(range(2, rank))
    if rewriter.state.graph.opset < 18:
        return _replace(rewriter, node, rewriter.node(op, node.inputs[:1], origin=node, axes=axes, keepdims=1))
    operands = [node.inputs[0], rewriter.constant(f"{node.name}_axes", np.array(axes, np.int64))]
    return _replace(rewriter, node, rewriter.node(op, operands, origin=node, keepdims=1))


def _replace(rewriter: Rewriter, node: Node, new: Node) -> Refusal | None:
    rewriter.take_output(new, node.outputs[0])
    rewriter.remove(node)
    return None
