"""calibrate: run the float model on the calibration data, and turn what its tensors hold into scales and zero points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import numpy as np

from qcompiler import ir
from qcompiler.channel_means import ChannelMeans
from qcompiler.collectors import Collector, MinMax
from qcompiler.errors import UserError
from qcompiler.ir import Tensor
from qcompiler.observe import SAMPLE_SIZE, observe
from qcompiler.ops import Lowering, op_key
from qcompiler.pipeline import closest
from qcompiler.quant import QuantParams, QuantSpec, params_from_range
from qcompiler.state import CompileState, Phase
from qcompiler.threads import each
from qcompiler_passes.annotate import annotate
from qcompiler_passes.biases import layers_with_bias, results


@dataclass(frozen=True)
class Calibrate:
    """Measure the range of every tensor with a spec, in one pass over the data; tied tensors are measured together.

    Values beyond the bounds of a block count as the bounds. Params that a quantized model came with are taken as they are; if it
    has gaps and there is no data, the blocks with gaps stay float.

    `collector`: the name of the way to measure. `samples_per_tensor`: about how many values of a tensor the collector sees of
    each calibration sample, besides the exact bounds. `means`: of how many samples to note the means of channels that
    `correct-bias` compares with; without them, it runs the float model for itself.
    """

    collector: str = "omse"
    samples_per_tensor: int = SAMPLE_SIZE
    means: int = 64

    name: ClassVar[str] = "calibrate"
    requires: ClassVar[Phase] = Phase.ANNOTATED
    establishes: ClassVar[Phase | None] = Phase.CALIBRATED

    def run(self, state: CompileState) -> int:
        """Return the number of tensors that got params.

        Raises UserError for an unknown collector, missing data, or a tensor whose values give no range.
        """
        if self.collector not in state.collectors:
            raise UserError(
                f"no collector is called {self.collector!r}{closest(self.collector, state.collectors)}", self.name
            )
        if self.samples_per_tensor < 1:
            raise UserError(f"samples_per_tensor must be at least 1, not {self.samples_per_tensor}", self.name)
        known = _import(state)
        codes = {name: QuantParams(s, np.ones((), np.float32)) for name, s in state.specs.items() if s.log2}
        state.params |= codes
        if state.calibration is None and state.imported:
            _leave_gaps(state)
        missing = [name for name in state.specs if name not in state.params]
        sources = _sources(state, dict.fromkeys(state.leader(name) for name in missing))
        measured = self._measure(state, [t for group in sources.values() for t in group])
        collectors = {leader: _merged([measured[t.name] for t in group]) for leader, group in sources.items()}
        params = each(lambda leader: _finished(leader, collectors[leader], state.specs[leader]), collectors)
        state.params |= zip(collectors, params, strict=True)
        for name in missing:
            state.params[name] = state.params[state.leader(name)]
        return known + len(codes) + len(missing)

    def _measure(self, state: CompileState, tensors: list[Tensor]) -> dict[str, Collector]:
        """A collector per tensor: constants are measured as they are, variables on the calibration data."""
        variables = [t.name for t in tensors if not ir.is_constant(t)]
        measured = {t.name: _of_constant(t) for t in tensors if ir.is_constant(t)}
        if variables:
            if state.calibration is None:
                raise UserError("there is no calibration data", self.name)
            make = state.collectors[self.collector]
            model = ir.to_proto(state.graph)
            limits = {name: (block.low, block.high) for block in state.blocks.values() for name in block.outputs}
            means = self._means(state)
            measured |= observe(
                model,
                variables,
                state.calibration,
                make,
                state.progress,
                sample_size=self.samples_per_tensor,
                limits=limits,
                means=means,
            )
            state.means |= {} if means is None else means.finish()
        return measured

    def _means(self, state: CompileState) -> ChannelMeans | None:
        channels = results(state, layers_with_bias(state)) if self.means and not state.imported else []
        return ChannelMeans(channels, self.means) if channels else None


def _import(state: CompileState) -> int:
    """Give tensors, and those tied to them, the params that the model came with; return how many got some."""
    before = len(state.params)
    groups: dict[str, list[str]] = {}
    for name in state.specs:
        groups.setdefault(state.leader(name), []).append(name)
    for leader, members in groups.items():
        found = [p for name in dict.fromkeys((leader, *members)) if (p := _imported(state, name)) is not None]
        if found:
            state.params |= dict.fromkeys((name for name in members if name not in state.params), found[0])
    known = len(state.params) - before
    if known:
        state.notes.append(f"trained scales: {known} of {len(state.specs)} tensors")
    return known


def _imported(state: CompileState, name: str) -> QuantParams | None:
    """The params that a tensor came with, as they are after rewrites that multiplied it by one number."""
    if name in state.imported:
        return state.imported[name]
    was = state.counterparts.get(name)
    if was is None or was.source not in state.imported or np.any(was.offset != 0):
        return None
    factor = np.unique(was.factor)
    params = state.imported[was.source]
    return params.with_scale(params.scale * factor[0]) if factor.size == 1 and factor[0] > 0 else None


def _leave_gaps(state: CompileState) -> None:
    """Without data: take the bounds of an activation as the range, and leave the blocks of other tensors in float."""
    for block in state.blocks.values():
        for name in block.outputs:
            if name in state.specs and name not in state.params and np.isfinite([block.low, block.high]).all():
                state.params[name] = params_from_range(block.low, block.high, state.specs[name])
    while gaps := {name for name in state.specs if state.leader(name) not in state.params and name not in state.params}:
        constants = {t.name for t in ir.tensors(state.graph) if ir.is_constant(t)}
        if gaps <= constants:
            return
        reasons = {root: block.reason for root, block in state.blocks.items() if not block.quantized}
        nodes = {n.name: n for n in state.graph.nodes}
        for root, block in state.blocks.items():
            tensors = {*block.outputs, *(t.name for t in nodes[root].inputs)} & gaps - constants
            if block.quantized and tensors:
                reasons[root] = f"the model has no scale for {min(tensors)!r}, and there is no calibration data"
        annotate(state, reasons)


def _sources(state: CompileState, leaders: Mapping[str, None]) -> dict[str, list[Tensor]]:
    """Leader -> the tensors to measure for it: the members that do not merely pass on the values of another member."""
    groups: dict[str, list[Tensor]] = {leader: [] for leader in leaders}
    for tensor in ir.tensors(state.graph):
        leader = state.leader(tensor.name)
        if tensor.name in state.specs and leader in groups and not _passed_on(state, tensor):
            groups[leader].append(tensor)
    return groups


def _passed_on(state: CompileState, tensor: Tensor) -> bool:
    """Whether the values of the tensor, zeros aside, are values of a tensor that shares its params."""
    maker = ir.producer(tensor)
    rule = None if maker is None else state.ops.get(op_key(maker.op, maker.domain))
    if maker is None or rule is None or rule.lowering is not Lowering.MOVE:
        return False
    source = maker.inputs[0].name
    if maker.op == "Pad" and (fill := ir.optional_input(maker, 2)) is not None and ir.scalar(fill) != 0:
        return False
    return source in state.specs and state.leader(source) == state.leader(tensor.name)


def _of_constant(tensor: Tensor) -> Collector:
    values = np.ascontiguousarray(ir.array(tensor), np.float32).reshape(-1)
    collector = MinMax()
    if values.size:
        collector.observe(float(values.min()), float(values.max()), values)
    return collector


def _finished(tensor: str, collector: Collector, spec: QuantSpec) -> QuantParams:
    try:
        return collector.finish(spec)
    except ValueError as error:
        raise UserError(f"no range for tensor {tensor!r}: {error}", "calibration data") from error


def _merged(collectors: Iterable[Collector]) -> Collector:
    def merge(a: Collector, b: Collector) -> Collector:
        a.merge(b)
        return a

    return reduce(merge, collectors)
