"""Which layers quantization hurts: each rounding alone, carried through the rest of the float model to the outputs.

One float run cuts the model into pieces, one per layer. Then each thing that quantization rounds (the constants of a layer, or
an activation) is rounded alone, and only the pieces behind it run again. The noise of roundings that do not depend on each
other adds up, so that the noise of any choice of float layers can be predicted from these figures.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.concrete_shapes import concrete_shapes
from qcompiler.cost import shipped_table
from qcompiler.errors import UserError
from qcompiler.gates import GatedModel
from qcompiler.instrument import Watcher
from qcompiler.ir import Node
from qcompiler.perturb import Runner
from qcompiler.pipeline import Instrument, Pass, Pipeline
from qcompiler.state import CompileState, Feeds, Phase
from qcompiler.work import Accountant

F64 = NDArray[np.float64]

MACS_PER_ELEMENT = 12
"""About what it costs to convert an element between float and int8, in multiply-accumulates that int8 saves."""


@dataclass(frozen=True)
class Rounding:
    """One thing that is rounded. `layer`: the layer that it counts for; `weights`: whether it is that layer's constants, else it
    is an activation. `users`: it is rounded as long as one of these layers is quantized. `noise`: shape (outputs,), the mean
    squared error that it alone causes at each output, divided by the mean square of the output.
    """

    layer: str
    weights: bool
    users: tuple[str, ...]
    noise: F64


@dataclass(frozen=True)
class Layer:
    """A quantized layer. `cost`: its share of what it costs to leave all layers in float."""

    name: str
    op: str
    cost: float


@dataclass(frozen=True)
class Row:
    """A line of the ranking: SQNR in dB at the output that suffers most if only this layer is quantized, only its weights,
    only its result (and what it reads, if no quantized layer makes that); None where nothing changes.

    `share`: of the noise of all layers at that output; `cost`: of the cost of all layers.
    """

    layer: str
    op: str
    sqnr: float | None
    weights: float | None
    activations: float | None
    share: float
    cost: float


@dataclass(frozen=True)
class Sensitivity:
    """What all roundings do to the outputs. `outputs`: the names of the float ones."""

    outputs: tuple[str, ...]
    layers: Mapping[str, Layer]
    roundings: Sequence[Rounding]

    def noise(self, kept: Collection[str] = ()) -> F64:
        """The relative noise at each output if these layers stay float, as predicted: the sum over what is still rounded."""
        total = np.zeros(len(self.outputs))
        for rounding in self.roundings:
            if any(user not in kept for user in rounding.users):
                total += rounding.noise
        return total

    def sqnr(self, kept: Collection[str] = ()) -> float | None:
        """The predicted SQNR of the worst output in dB; None if nothing is rounded."""
        return decibel(float(self.noise(kept).max(initial=0)))

    @property
    def noisy(self) -> list[str]:
        """The layers that round something; others pass on what is rounded already."""
        makers = {rounding.layer for rounding in self.roundings}
        return [name for name in self.layers if name in makers]

    def ranking(self) -> list[Row]:
        """The layers that round something, the most harmful first."""
        everything = np.maximum(self.noise(), np.finfo(np.float64).tiny)
        parts = {name: [np.zeros(len(self.outputs)), np.zeros(len(self.outputs))] for name in self.noisy}
        for rounding in self.roundings:
            parts[rounding.layer][rounding.weights] += rounding.noise
        rows = []
        for name, (activations, weights) in parts.items():
            both = activations + weights
            worst = int(np.argmax(both))
            sqnr, of_weights, of_activations = (decibel(float(n[worst])) for n in (both, weights, activations))
            layer, share = self.layers[name], round(float(both[worst] / everything[worst]), 4)
            rows.append(Row(name, layer.op, sqnr, of_weights, of_activations, share, round(layer.cost, 4)))
        return sorted(rows, key=lambda row: np.inf if row.sqnr is None else row.sqnr)


def decibel(noise: float) -> float | None:
    """The SQNR of a relative noise, in dB with two digits; None for no noise."""
    return round(-10 * float(np.log10(noise)), 2) if noise > 0 else None


@dataclass
class FloatModel(Watcher):
    """Keeps the model as it was calibrated: passes behind that may already adapt biases to quantized weights."""

    model: onnx.ModelProto | None = None

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        """Keep the model once the ranges are known."""
        if stage.establishes is Phase.CALIBRATED:
            self.model = ir.to_proto(state.graph)


def before_qdq(pipeline: Pipeline) -> tuple[Pipeline, Pipeline]:
    """The passes before anything is written as integers, and the others. Raises UserError if there are no others."""
    for i, stage in enumerate(pipeline.passes):
        if stage.establishes is Phase.QDQ:
            return Pipeline(pipeline.passes[:i]), Pipeline(pipeline.passes[i:])
    raise UserError("the pipeline quantizes nothing", "--passes")


def sensitivity(
    state: CompileState, pipeline: Pipeline, samples: Sequence[Feeds], instruments: Sequence[Instrument] = ()
) -> Sensitivity:
    """Run the passes before Q and DQ are inserted on a state, and measure what each rounding does to the outputs.

    instruments: what else watches the passes.

    Raises UserError if the pipeline quantizes nothing or no output is float.
    """
    keeper = FloatModel()
    before_qdq(pipeline)[0].run(state, [*instruments, keeper])
    if keeper.model is None:
        raise UserError("the pipeline does not calibrate", "--passes")
    return measure(state, keeper.model, samples)


def measure(state: CompileState, float_model: onnx.ModelProto, samples: Sequence[Feeds]) -> Sensitivity:
    """Measure what each rounding that a calibrated state plans does to the outputs of `float_model`, the model in that state.

    Raises UserError if no output is float.
    """
    twin = GatedModel(state, ir.from_proto(float_model))
    runner = Runner(twin, samples)
    outputs = runner.float_outputs()
    if not outputs:
        raise UserError("no output of the model is float, so that none has an SQNR", "model")
    of_gates, of_constants = runner.noise(outputs)
    roundings = [
        Rounding(gate.layer, False, gate.users, of_gates[gate.tensor.name])
        for gate in twin.gates
        if gate.tensor.name in of_gates
    ]
    roundings += [Rounding(root, True, (root,), noise) for root, noise in of_constants.items()]
    costs = _seconds(state, list(twin.layers)) or {root: _macs(twin, runner, root) for root in twin.layers}
    total = sum(costs.values()) or 1.0
    layers = {root: Layer(root, node.op, costs[root] / total) for root, node in twin.layers.items()}
    return Sensitivity(tuple(t.name for t in _named_outputs(state, outputs)), layers, roundings)


def _named_outputs(state: CompileState, positions: Sequence[int]) -> list[ir.Tensor]:
    return [state.graph.outputs[i] for i in positions]


def _seconds(state: CompileState, layers: list[str]) -> dict[str, float] | None:
    """What each layer alone costs in float, conversions included, by the target's cost table; None if that cannot be told."""
    table, shapes = shipped_table(state.target.profile), concrete_shapes(state)
    if table is None or shapes is None:
        return None
    accountant = Accountant(state, shapes)
    all_integer = table.total(accountant.total(layers))
    without = {name: accountant.total([other for other in layers if other != name]) for name in layers}
    return {name: max(table.total(works) - all_integer, 0.0) for name, works in without.items()}


def _macs(twin: GatedModel, runner: Runner, root: str) -> float:
    """About what a layer costs in float, in multiply-accumulates that int8 saves."""
    own = sum(runner.size(gate) for gate in twin.gates if gate.made and gate.layer == root)
    elements = sum(runner.size(gate) for gate in twin.gates if root in gate.users)
    return float(own * _depth(twin.layers[root]) + MACS_PER_ELEMENT * elements)


def _depth(node: Node) -> int:
    """The multiply-accumulates for one element of the result of a Conv, Gemm or MatMul."""
    shape = ir.array(node.inputs[1]).shape if len(node.inputs) > 1 and ir.is_constant(node.inputs[1]) else ()
    if len(shape) < 2:
        return 0
    return int(np.prod(shape[1:])) if node.op == "Conv" else int(shape[0])
