"""Which layers quantization hurts: each rounding alone, carried through the rest of the float model to the outputs.

One float run cuts the model into pieces, one per layer. Then each thing that quantization rounds (the constants of a layer, or
an activation) is rounded alone, and only the pieces behind it run again. The noise of roundings that do not depend on each
other adds up, so that the noise of any choice of float layers can be predicted from these figures.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.errors import UserError
from qcompiler.gates import Correction, Gate, GatedModel
from qcompiler.instrument import Watcher
from qcompiler.ir import Node
from qcompiler.pipeline import Pass, Pipeline
from qcompiler.quant import dequantize, quantize
from qcompiler.replay import Piece
from qcompiler.runtime import Session, run, session
from qcompiler.state import CompileState, Feeds, Phase

Array = NDArray[Any]
F64 = NDArray[np.float64]
Values = MutableMapping[str, Array]

WORKERS = 2

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
    """A quantized layer. `cost`: about what it costs to leave it in float, in multiply-accumulates."""

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
        cost = sum(layer.cost for layer in self.layers.values()) or 1.0
        parts = {name: [np.zeros(len(self.outputs)), np.zeros(len(self.outputs))] for name in self.noisy}
        for rounding in self.roundings:
            parts[rounding.layer][rounding.weights] += rounding.noise
        rows = []
        for name, (activations, weights) in parts.items():
            both = activations + weights
            worst = int(np.argmax(both))
            sqnr, of_weights, of_activations = (decibel(float(n[worst])) for n in (both, weights, activations))
            layer, share = self.layers[name], round(float(both[worst] / everything[worst]), 4)
            rows.append(Row(name, layer.op, sqnr, of_weights, of_activations, share, round(layer.cost / cost, 4)))
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


def sensitivity(state: CompileState, pipeline: Pipeline, samples: Sequence[Feeds]) -> Sensitivity:
    """Run the passes before Q and DQ are inserted on a state, and measure what each rounding does to the outputs.

    Raises UserError if the pipeline quantizes nothing or no output is float.
    """
    keeper = FloatModel()
    before_qdq(pipeline)[0].run(state, [keeper])
    if keeper.model is None:
        raise UserError("the pipeline does not calibrate", "--passes")
    return measure(state, keeper.model, samples)


def measure(state: CompileState, float_model: onnx.ModelProto, samples: Sequence[Feeds]) -> Sensitivity:
    """Measure what each rounding that a calibrated state plans does to the outputs of `float_model`, the model in that state.

    Raises UserError if no output is float.
    """
    twin = GatedModel(state, ir.from_proto(float_model))
    runner = _Runner(twin, samples)
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
    layers = {root: Layer(root, node.op, _cost(twin, runner, root)) for root, node in twin.layers.items()}
    return Sensitivity(tuple(t.name for t in _named_outputs(state, outputs)), layers, roundings)


def _named_outputs(state: CompileState, positions: Sequence[int]) -> list[ir.Tensor]:
    return [state.graph.outputs[i] for i in positions]


def _cost(twin: GatedModel, runner: _Runner, root: str) -> float:
    """About what it costs to leave a layer in float."""
    own = sum(runner.size(gate) for gate in twin.gates if gate.made and gate.layer == root)
    elements = sum(runner.size(gate) for gate in twin.gates if root in gate.users)
    return float(own * _depth(twin.layers[root]) + MACS_PER_ELEMENT * elements)


class _Runner:
    """Runs the pieces of a gated model on all samples in step, so that mean errors can be corrected on the way."""

    def __init__(self, twin: GatedModel, samples: Sequence[Feeds]) -> None:
        self.twin, self.pieces = twin, twin.pieces
        self.runners = [session(twin.submodel(p.reads, p.makes)) if p.makes else None for p in self.pieces]
        self.position = {id(n): i for i, piece in enumerate(self.pieces) for n in piece.nodes}
        self.last_use = {t.name: i for i, piece in enumerate(self.pieces) for t in piece.reads}
        self.last_use |= {t.name: len(self.pieces) for t in twin.outputs}
        self.lock = Lock()
        self.values = [self._floats(feeds) for feeds in samples]
        self.corrections = {
            gate.tensor.name: Correction(gate.bounds, [values[gate.tensor.name] for values in self.values])
            for gate in twin.gates
            if gate.bounds is not None
        }

    def _floats(self, feeds: Feeds) -> dict[str, Array]:
        """All values of the float model at the ends of pieces."""
        values: dict[str, Array] = {t.name: feeds[t.name] for t in self.twin.graph.inputs}
        for piece, runner in zip(self.pieces, self.runners, strict=True):
            values |= _run(runner, piece, values)
        return values

    def float_outputs(self) -> list[int]:
        """The positions of the outputs that are float and not all zero."""
        names = [t.name for t in self.twin.outputs]
        return [i for i, name in enumerate(names) if any(_is_signal(values.get(name)) for values in self.values)]

    def size(self, gate: Gate) -> int:
        """The number of elements of an activation."""
        return int(np.size(self.values[0][gate.tensor.name]))

    def noise(self, outputs: Sequence[int]) -> tuple[dict[str, F64], dict[str, F64]]:
        """The relative noise at some outputs from rounding each gate, by tensor, and each layer's constants, by layer."""
        gates = [gate for gate in self.twin.gates if gate.params is not None]
        layers = list(self.twin.constants)
        with ThreadPoolExecutor(WORKERS) as pool:
            of_gates = list(pool.map(lambda gate: self._of_gate(gate, outputs), gates))
            of_constants = list(pool.map(lambda root: self._of_constants(root, outputs), layers))
        return (
            {gate.tensor.name: noise for gate, noise in zip(gates, of_gates, strict=True)},
            dict(zip(layers, of_constants, strict=True)),
        )

    def _of_gate(self, gate: Gate, outputs: Sequence[int]) -> F64:
        assert gate.params is not None
        name, params = gate.tensor.name, gate.params
        rounded = [{name: dequantize(quantize(values[name], params), params)} for values in self.values]
        return self._carry(rounded, 0, outputs)

    def _of_constants(self, root: str, outputs: Sequence[int]) -> F64:
        position = self.position[id(self.twin.layers[root])]
        piece = self.pieces[position]
        with self.lock, self.twin.rounded_constants(root):
            model = self.twin.submodel(piece.reads, piece.makes)
        runner = session(model)
        changed = [_run(runner, piece, values) for values in self.values]
        self._correct(piece, changed)
        return self._carry(changed, position + 1, outputs)

    def _carry(self, changed: list[dict[str, Array]], start: int, outputs: Sequence[int]) -> F64:
        """The relative noise at outputs that changed values, one mapping per sample, lead to. The mappings are used up."""
        for i, piece in enumerate(self.pieces[start:], start):
            if not any(t.name in changed[0] for t in piece.reads):
                continue
            for mine, values in zip(changed, self.values, strict=True):
                mine.update(_run(self.runners[i], piece, ChainMap(mine, values)))
            self._correct(piece, changed)
            dead = [t.name for t in piece.reads if self.last_use[t.name] == i]
            for mine in changed:
                for name in dead:
                    mine.pop(name, None)
        return np.array([self._noise(self.twin.outputs[i].name, changed) for i in outputs])

    def _correct(self, piece: Piece, changed: list[dict[str, Array]]) -> None:
        for name in [t.name for t in piece.makes if t.name in self.corrections]:
            moved = self.corrections[name].apply([mine[name] for mine in changed])
            for mine, values in zip(changed, moved, strict=True):
                mine[name] = values

    def _noise(self, name: str, changed: list[dict[str, Array]]) -> float:
        signal = noise = 0.0
        for mine, values in zip(changed, self.values, strict=True):
            wanted, given = values[name], mine.get(name, values[name])
            if wanted.shape == given.shape:  # else a shape that depends on the data
                finite = np.isfinite(wanted)
                signal += float(np.square(wanted[finite], dtype=np.float64).sum())
                noise += float(np.square(wanted[finite] - given[finite], dtype=np.float64).sum())
        return noise / signal if signal else 0.0


def _is_signal(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.dtype.kind == "f" and bool(np.any(values))


def _run(runner: Session | None, piece: Piece, values: Values) -> dict[str, Array]:
    """What a piece makes of values."""
    if runner is None:
        return {}
    results = run(runner, {t.name: values[t.name] for t in piece.reads})
    return dict(zip([t.name for t in piece.makes], results, strict=True))


def _depth(node: Node) -> int:
    """The multiply-accumulates for one element of the result of a Conv, Gemm or MatMul."""
    shape = ir.array(node.inputs[1]).shape if len(node.inputs) > 1 and ir.is_constant(node.inputs[1]) else ()
    if len(shape) < 2:
        return 0
    return int(np.prod(shape[1:])) if node.op == "Conv" else int(shape[0])
