"""align-scales: move activation scales by a little, so that every rescale factor between them is a dyadic number."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from qcompiler.ir import Node
from qcompiler.ops import Lowering, quantized_rule
from qcompiler.state import CompileState, Phase
from qcompiler_passes.scale_solver import ScaleSolver, spatial_size


@dataclass(frozen=True)
class AlignScales:
    """Make Add, Mul and GlobalAveragePool exact in integers.

    From the outputs backwards, an operator's inputs get the float32 scales nearest to the measured ones whose factors to the
    output are multiples of 2**-12 (Add) or 2**-16 (Mul, GlobalAveragePool). Conv, Gemm and MatMul take any scale, because
    their weight scales absorb it. An operator whose scales are all fixed by others already goes back to float, with the reason.
    An Add of one number gets one scale for both tensors of which the number is a multiple, where there is a good one: it then
    only moves the zero point. Concat inputs take the output's scale if nothing else reads them, or if theirs is within
    `concat_tie` of it: nothing is left to rescale then.
    """

    concat_tie: float = 0.85

    name: ClassVar[str] = "align-scales"
    requires: ClassVar[Phase] = Phase.CALIBRATED
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of tensors whose scale moved."""
        solver = ScaleSolver(state)
        nodes = {n.name: n for n in state.graph.nodes}
        solver.bound_factors([nodes[root] for root, block in state.blocks.items() if block.quantized])
        for root, block in reversed(list(state.blocks.items())):
            if not block.quantized or root not in nodes:
                continue
            if not self._settle(solver, nodes[root], block.outputs[0]):
                state.blocks[root] = replace(block, quantized=False, reason="its scales cannot all be dyadic")
        for root, block in list(state.blocks.items()):
            if block.quantized and root in nodes and not solver.multipliers_fit(nodes[root], block.outputs[0]):
                state.blocks[root] = replace(block, quantized=False, reason="its output range is next to nothing")
        return solver.moved

    def _settle(self, solver: ScaleSolver, node: Node, output: str) -> bool:
        """Choose the scales around one operator; return whether they fit."""
        lowering, operands = quantized_rule(solver.state.ops, node).lowering, [t.name for t in node.inputs]
        if lowering is Lowering.ADD:
            return solver.shift(node, output) or solver.add(operands[0], operands[1], output)
        if lowering is Lowering.PRODUCT:
            return solver.state.specs[operands[0]].log2 or solver.mul(operands[0], operands[1], output)
        if lowering is Lowering.MUL:
            solver.gate(operands[0], operands[1], output)
            solver.settle_mean(node)
            return solver.mul(operands[0], operands[1], output)
        if lowering is Lowering.SUM:
            return solver.mean(operands[0], output, spatial_size(node))
        if lowering is Lowering.MEAN:
            return solver.mean_of_any_size(operands[0], output)
        if lowering is Lowering.SLOPE:
            return solver.prelu(operands[0], output)
        if lowering is Lowering.CONCAT:
            solver.concat(node, output, self.concat_tie)
        return True
