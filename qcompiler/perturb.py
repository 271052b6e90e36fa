"""Changes of single values, carried through the rest of a float model to its outputs."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import MutableMapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.gates import Correction, Gate, GatedModel
from qcompiler.quant import dequantize, quantize
from qcompiler.replay import Piece
from qcompiler.runtime import Session, run, session
from qcompiler.state import Feeds
from qcompiler.threads import each

Array = NDArray[Any]
F64 = NDArray[np.float64]
Values = MutableMapping[str, Array]

MAX_VALUES = 1 << 28
"""Elements of float activations that are held at the most; large models are measured on fewer samples."""


class Runner:
    """Runs the pieces of a gated model on all samples in step, so that mean errors can be corrected on the way."""

    def __init__(self, twin: GatedModel, samples: Sequence[Feeds]) -> None:
        self.twin, self.pieces = twin, twin.pieces
        self.runners = [session(twin.submodel(p.reads, p.makes)) if p.makes else None for p in self.pieces]
        self.position = {id(n): i for i, piece in enumerate(self.pieces) for n in piece.nodes}
        self.last_use = {t.name: i for i, piece in enumerate(self.pieces) for t in piece.reads}
        self.last_use |= {t.name: len(self.pieces) for t in twin.outputs}
        self.lock = Lock()
        self.values: list[dict[str, Array]] = []
        for feeds in samples:
            self.values.append(self._floats(feeds))
            if sum(np.size(value) for values in self.values for value in values.values()) > MAX_VALUES:
                break
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
        of_gates = each(lambda gate: self._of_gate(gate, outputs), gates)
        of_constants = each(lambda root: self._of_constants(root, outputs), layers)
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
