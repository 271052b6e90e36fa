"""Instruments: what can be attached to a pipeline. Each is a few lines on before, after and failed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qcompiler import ir
from qcompiler.errors import UserError
from qcompiler.pipeline import Pass
from qcompiler.state import CompileState
from qcompiler.verify import verify


class Watcher:
    """An instrument that does nothing; subclasses replace what they need."""

    def before(self, stage: Pass, state: CompileState) -> None:
        """Called before a pass."""

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        """Called after a pass that made `count` rewrites."""

    def failed(self, stage: Pass, state: CompileState, error: Exception) -> None:
        """Called when a pass raised."""


class Verify(Watcher):
    """Checks the invariants after every pass; what fails is reported as the pass's own error."""

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        """Raise VerifyError if an invariant is broken."""
        verify(state)


@dataclass(frozen=True)
class PassTime:
    """What one pass did: rewrites, wall-clock milliseconds, and the nodes that it left."""

    name: str
    rewrites: int
    milliseconds: float
    nodes: int


@dataclass
class Timing(Watcher):
    """Measures every pass."""

    passes: list[PassTime] = field(default_factory=list)
    _start: float = 0.0

    def before(self, stage: Pass, state: CompileState) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        """Record the pass."""
        elapsed = (time.perf_counter() - self._start) * 1e3
        self.passes.append(PassTime(stage.name, count, round(elapsed, 2), len(state.graph.nodes)))


@dataclass
class Dump(Watcher):
    """Writes the model after every pass as `NN-pass.onnx`; each one runs in ONNX Runtime."""

    folder: Path
    _number: int = 0

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        """Write the model as it is now. Raises UserError if the folder cannot be written."""
        self._number += 1
        path = self.folder / f"{self._number:02d}-{stage.name}.onnx"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(ir.to_proto(state.graph, state.metadata).SerializeToString(deterministic=True))
        except OSError as error:
            raise UserError(f"cannot write the dump: {error.strerror}", str(path)) from error


@dataclass
class Operators(Watcher):
    """Keeps the operator type of every block's root, which later passes replace; arithmetic on shapes is left out."""

    of: dict[str, str] = field(default_factory=dict)

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        """Note the roots that are still there."""
        for node in state.graph.nodes:
            if node.name in state.blocks and node.name not in self.of and any(map(_may_be_float, node.outputs)):
                self.of[node.name] = node.op


def _may_be_float(tensor: ir.Tensor) -> bool:
    return tensor.dtype is None or np.dtype(tensor.dtype).kind == "f"
