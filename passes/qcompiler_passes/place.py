"""place: choose, among the blocks that can be integer, those that pay."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from qcompiler import ir
from qcompiler.concrete_shapes import concrete_shapes
from qcompiler.cost import CostTable, read_table, shipped_table
from qcompiler.errors import UserError
from qcompiler.ir import Tensor
from qcompiler.state import CompileState, Phase
from qcompiler.work import Accountant
from qcompiler_passes.annotate import annotate
from qcompiler_passes.minimum_cut import Edge, source_side

OBJECTIVES = ("latency", "size", "integer")

SMALL = 1e-4
"""Seconds of inference below which there is nothing to gain or lose."""

FOR_SIZE = 0.02
"""The share of the float time that a smaller file may cost."""

TICK = 1e-12
"""Seconds per unit of the flow network, whose capacities are integers so that the cut is exact."""

INTEGER, FLOAT = "integer", "float"


@dataclass(frozen=True)
class Place:
    """Quantize the blocks for which the predicted time of the whole model is least; between placements of about equal time, the
    one with more integers, hence the smaller file.

    The choice is a minimum cut. Each block lies on the integer or on the float side; it costs its own time there, and each tensor
    between the sides costs one conversion, however many read it.

    `objective`: `latency`; with `size` and `integer` all that can be integer is, and so it is in a model that
    came quantized. `profile`: a file of `qcompile profile`; without
    one the target's own is used. Without a profile or the shapes of all tensors, all that can be integer is.
    """

    objective: str = "latency"
    profile: str = ""

    name: ClassVar[str] = "place"
    requires: ClassVar[Phase] = Phase.ANNOTATED
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of blocks that went back to float. Raises UserError for a profile that cannot be read."""
        if self.objective not in OBJECTIVES:
            raise UserError(f"the objective is {', '.join(OBJECTIVES)}, not {self.objective!r}", self.name)
        if state.phase > Phase.ANNOTATED or state.predicted is not None:
            return 0
        table = read_table(Path(self.profile)) if self.profile else shipped_table(state.target.profile)
        shapes = None if table is None else concrete_shapes(state)
        if table is None or shapes is None:
            return 0
        costs = _Costs(state, Accountant(state, shapes), table)
        able = set(costs.able)
        if self.objective == "latency" and not state.imported:
            _place(state, costs)
        placed = costs.placed()
        state.predicted = costs.float_time, costs.total(placed)
        return len(able - placed)


def _place(state: CompileState, costs: _Costs) -> None:
    """Send the blocks back to float that do not pay."""
    float_time = costs.float_time
    if float_time < SMALL:
        state.notes.append(
            f"an inference takes about {1e3 * float_time:.2g} ms in float: all is quantized, for the size"
        )
        return
    for share in (FOR_SIZE, 0.0):
        chosen = costs.cheapest(share * float_time)
        annotate(state, costs.reasons(chosen))
        if costs.total(costs.placed()) <= float_time:
            return
    annotate(state, costs.reasons(frozenset()))


class _Costs:
    """What the blocks and the conversions between them cost. `able`: the roots of all that can be integer, in order.

    `float_time`: seconds of the float model, before rewrites for the target if `account` has run.
    """

    def __init__(self, state: CompileState, accountant: Accountant, table: CostTable) -> None:
        self.state, self.accountant, self.table = state, accountant, table
        self.able = [root for root, block in state.blocks.items() if block.quantized]
        self._able = frozenset(self.able)
        self.float_time = table.total(state.float_work or accountant.total(()))

    def placed(self) -> frozenset[str]:
        """The roots of the blocks that are quantized now."""
        return frozenset(root for root, block in self.state.blocks.items() if block.quantized)

    def total(self, quantized: Collection[str]) -> float:
        """The predicted seconds of one inference."""
        return self.table.total(self.accountant.total(quantized))

    def cheapest(self, bonus: float) -> frozenset[str]:
        """The roots on the integer side of the minimum cut. `bonus`: seconds that it is worth to quantize all weights."""
        integer = source_side(self._edges(bonus), INTEGER, FLOAT)
        return frozenset(root for root in self.able if ("block", root) in integer)

    def _edges(self, bonus: float) -> Iterator[Edge]:
        """(from, to, capacity): what it costs if `from` is on the integer side and `to` on the float side; None: forbidden."""
        weights = {root: self._weights(root) for root in self.able}
        everything = sum(weights.values()) or 1
        for root in self.able:
            block = self.state.blocks[root]
            in_float = self.table.total(self.accountant.floating(block)) + bonus * weights[root] / everything
            yield INTEGER, ("block", root), _ticks(in_float)
            yield ("block", root), FLOAT, _ticks(self.table.total(self.accountant.integer(block)))
            yield from self._needs(root)
        for tensor in ir.tensors(self.state.graph):
            if not ir.is_constant(tensor) and not self.accountant.is_inner(tensor):
                yield from self._conversions(tensor)

    def _needs(self, root: str) -> Iterator[Edge]:
        """Operators that are not worth a conversion are integer only if what they read is."""
        node = self.accountant.nodes[root]
        rule = self.accountant.rule(node)
        if rule is None or rule.anchor:
            return
        for index in rule.activations(node):
            maker = self._side(node.inputs[index])
            if maker != FLOAT:
                yield ("block", root), maker, None

    def _conversions(self, tensor: Tensor) -> Iterator[Edge]:
        """A conversion, whose node lies between the maker and all readers, is paid once if one reader is on the other side."""
        maker = self._side(tensor)
        nodes = {id(n): n for n in tensor.outputs}.values()
        able = [n.name for n in nodes if self.accountant.reads_integers(n, tensor, self._able)]
        if able:
            yield ("quantize", tensor.name), maker, _ticks(self.table.total(self.accountant.quantize(tensor)))
            for root in able:
                yield ("block", root), ("quantize", tensor.name), None
        if maker != FLOAT:
            yield maker, ("dequantize", tensor.name), _ticks(self.table.total(self.accountant.dequantize(tensor)))
            for root in able:
                yield ("dequantize", tensor.name), ("block", root), None
            if len(able) < len(nodes) or ir.is_output(self.state.graph, tensor):
                yield ("dequantize", tensor.name), FLOAT, None

    def _side(self, tensor: Tensor) -> Any:
        """The block that makes the tensor, or the float side where it cannot be integer."""
        maker = ir.producer(tensor)
        root = None if maker is None else self.accountant.owner.get(maker.name)
        return ("block", root) if root in self._able else FLOAT

    def _weights(self, root: str) -> int:
        return sum(array.size for t in self.accountant.nodes[root].inputs if (array := ir.value(t)) is not None)

    def reasons(self, chosen: Collection[str]) -> dict[str, str]:
        """Why the blocks that can be integer, but were not chosen, stay float."""
        back = [root for root in self.able if root not in chosen]
        return {root: self._reason(root, chosen) for root in back[: self.state.rewrite_limit]}

    def _reason(self, root: str, chosen: Collection[str]) -> str:
        block = self.state.blocks[root]
        in_float = self.table.total(self.accountant.floating(block))
        with_this = self.table.total(self.accountant.integer(block))
        neighbours = self.table.total(self.accountant.conversions_of(block, chosen))
        if with_this + neighbours <= in_float:
            return "faster in float here, together with its neighbours"
        return f"faster in float here: {1e3 * in_float:.2g} ms against {1e3 * (with_this + neighbours):.2g} ms"


def _ticks(seconds: float) -> int:
    return round(seconds / TICK)
