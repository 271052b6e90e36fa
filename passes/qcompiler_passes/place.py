"""place: choose, among the blocks that can be integer, those that pay."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from qcompiler import ir
from qcompiler.concrete_shapes import concrete_shapes
from qcompiler.cost import CostTable, Work, read_table, shipped_table
from qcompiler.errors import UserError
from qcompiler.ir import Tensor
from qcompiler.state import CompileState, Phase
from qcompiler.work import Accountant
from qcompiler_passes.annotate import annotate
from qcompiler_passes.minimum_cut import Edge, source_side

OBJECTIVES = ("latency", "size", "integer")

SMALL = 1e-4
"""Seconds of inference below which there is nothing to gain or lose."""

FOR_SIZE = 0.05
"""The share of the float time that a smaller file may cost."""

ATTEMPTS = ((FOR_SIZE, 0.5), (0.0, 0.5), (0.0, 1.0))
"""What a smaller file may cost, and how much the time on two threads counts, until a placement is not slower than float."""

DOUBT = 0.1
"""The share by which a placement must be predicted to be faster than float on two threads, where predictions are worse."""

TICK = 1e-12
"""Seconds per unit of the flow network, whose capacities are integers so that the cut is exact."""

INTEGER, FLOAT = "integer", "float"


@dataclass(frozen=True)
class Place:
    """Quantize the blocks for which the predicted time of the whole model is least; between placements of about equal time, the
    one with more integers, hence the smaller file.

    The choice is a minimum cut. Each block lies on the integer or on the float side; it costs its own time there, and each tensor
    between the sides costs one conversion, however many read it. Where the table tells what two threads take, the time is the
    mean of both, as shares of the float model's times, and no placement is chosen that is predicted to be slower on either.

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
        costs = costs_of(state, self.profile)
        if costs is None:
            return 0
        able = set(costs.able)
        if self.objective == "latency" and not state.imported:
            _place(state, costs)
        placed = costs.placed()
        state.predicted = costs.float_time, costs.total(placed)
        return len(able - placed)


def costs_of(state: CompileState, profile: str = "") -> Costs | None:
    """The costs of the blocks, by the table in the file `profile`, or that of the target; None without table or shapes."""
    table = read_table(Path(profile)) if profile else shipped_table(state.target.profile)
    shapes = None if table is None else concrete_shapes(state)
    return None if table is None or shapes is None else Costs(state, Accountant(state, shapes), table)


def _place(state: CompileState, costs: Costs) -> None:
    """Send the blocks back to float that do not pay."""
    float_time = costs.float_time
    if float_time < SMALL:
        state.notes.append(
            f"an inference takes about {1e3 * float_time:.2g} ms in float: all is quantized, for the size"
        )
        return
    tried: list[frozenset[str]] = []
    for share, costs.two in ATTEMPTS:
        tried.append(costs.cheapest(share * float_time))
        if costs.slowest(tried[-1]) <= 1:
            break
    else:
        tried = [min((*tried, frozenset[str]()), key=costs.slowest)]
    annotate(state, costs.reasons(tried[-1]))


class Costs:
    """What the blocks and the conversions between them cost. `able`: the roots of all that can be integer, in order.

    `float_time`: seconds of the float model on one thread, before rewrites for the target if `account` has run. `two`: how much
    the time on two threads counts.
    """

    def __init__(self, state: CompileState, accountant: Accountant, table: CostTable) -> None:
        self.state, self.accountant, self.table = state, accountant, table
        self.able = [root for root, block in state.blocks.items() if block.quantized]
        self._able = frozenset(self.able)
        work = state.float_work or accountant.total(())
        self.float_time = table.total(work)
        self._float_time_of_two = self.float_time if table.two is None else table.two.total(work)
        self._limit_of_two = self._float_time_of_two * (1 - DOUBT)
        self.two = 0.0

    def placed(self) -> frozenset[str]:
        """The roots of the blocks that are quantized now."""
        return frozenset(root for root, block in self.state.blocks.items() if block.quantized)

    def total(self, quantized: Collection[str]) -> float:
        """The predicted seconds of one inference, on one thread."""
        return self.table.total(self.accountant.total(quantized))

    def slowest(self, quantized: Collection[str]) -> float:
        """The predicted time of an inference as a share of that of the float model, on one thread or two, whichever is more."""
        works = self.accountant.total(quantized)
        one = self.table.total(works) / self.float_time
        return one if self.table.two is None else max(one, self.table.two.total(works) / self._limit_of_two)

    def rank(self) -> tuple[float, float]:
        """How much slower than float what is placed now is predicted to be, at least 1, and its time; the least is the best."""
        placed = self.placed()
        self.two = ATTEMPTS[0][1]
        return max(1.0, self.slowest(placed)), self._time(self.accountant.total(placed))

    def _time(self, works: Sequence[Work]) -> float:
        """Seconds that count: of one thread, and of two in proportion to those of the float model."""
        one = self.table.total(works)
        if self.table.two is None:
            return one
        two = self.table.two.total(works) * self.float_time / self._float_time_of_two
        return (1 - self.two) * one + self.two * two

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
            in_float = self._time(self.accountant.floating(block)) + bonus * weights[root] / everything
            yield INTEGER, ("block", root), _ticks(in_float)
            yield ("block", root), FLOAT, _ticks(self._time(self.accountant.integer(block)))
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
            yield ("quantize", tensor.name), maker, _ticks(self._time(self.accountant.quantize(tensor)))
            for root in able:
                yield ("block", root), ("quantize", tensor.name), None
        if maker != FLOAT:
            yield maker, ("dequantize", tensor.name), _ticks(self._time(self.accountant.dequantize(tensor)))
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
        in_float = self.accountant.floating(block)
        quantized = [*self.accountant.integer(block), *self.accountant.conversions_of(block, chosen)]
        for threads, table in (("", self.table), (" on two threads", self.table.two)):
            if table is not None and table.total(quantized) > table.total(in_float):
                times = f"{1e3 * table.total(in_float):.2g} ms against {1e3 * table.total(quantized):.2g} ms"
                return f"faster in float here{threads}: {times}"
        return "faster in float here, together with its neighbours"


def _ticks(seconds: float) -> int:
    return round(seconds / TICK)
