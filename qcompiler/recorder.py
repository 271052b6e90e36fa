"""What a report needs from a compilation while it runs: the models on the way, and the values of activations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import onnx

from qcompiler import ir
from qcompiler.instrument import Watcher
from qcompiler.ops import op_key
from qcompiler.pipeline import Pass
from qcompiler.quant import F32, QuantParams, QuantSpec
from qcompiler.state import CompileState, Phase

BINS = 40


@dataclass
class Recorder(Watcher):
    """Keeps what the page shows beside the summary: the float model, the model as it was calibrated, and the final state."""

    state: CompileState | None = None
    float_model: onnx.ModelProto | None = None
    calibrated: onnx.ModelProto | None = None
    shapes: dict[str, list[Any]] = field(default_factory=dict)
    operators: dict[str, str] = field(default_factory=dict)
    origin: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def before(self, stage: Pass, state: CompileState) -> None:
        """Keep the model as it was loaded."""
        if self.float_model is None:
            self.state, self.float_model = state, ir.to_proto(state.graph)

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        """Keep the last model in which activations are still float tensors, under the names in the tables."""
        if stage.establishes in {Phase.ANNOTATED, Phase.CALIBRATED} and state.phase <= Phase.CALIBRATED:
            self.calibrated = ir.to_proto(state.graph)
            self.shapes = {t.name: list(t.shape) for t in ir.tensors(state.graph) if t.shape is not None}
            self.operators = {n.name: op_key(n.op, n.domain) for n in state.graph.nodes}
            self.origin = {n.name: state.origin.get(n.name, (n.name,)) for n in state.graph.nodes}


@dataclass(frozen=True)
class Histogram:
    """Counts of values in equal bins from `low` to `high`, which are the least and the greatest value."""

    low: float
    high: float
    counts: tuple[int, ...]


class Values:
    """A collector that keeps the values themselves, for a histogram."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self.parts: list[F32] = []

    def observe(self, low: float, high: float, values: F32) -> None:
        """Keep the values. A value that is not finite was reported when the ranges were measured."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.parts.append(values)

    def merge(self, other: Self) -> None:
        """Keep the other's values, too."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.parts += other.parts

    def finish(self, spec: QuantSpec) -> QuantParams:
        """Raise ValueError: these values are for looking at."""
        raise ValueError("a recorder of values chooses no range")

    def histogram(self) -> Histogram | None:
        """The histogram, or None if nothing was seen."""
        if not self.parts:
            return None
        wide = self.high if self.high > self.low else self.low + 1.0
        counts, _ = np.histogram(np.concatenate(self.parts), BINS, (self.low, wide))
        return Histogram(self.low, self.high, tuple(int(n) for n in counts))
