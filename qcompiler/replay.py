"""Replay: run a graph piece by piece over many samples, while passes change what comes later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Graph, Node, Tensor
from qcompiler.runtime import run, session
from qcompiler.state import Feeds
from qcompiler.threads import each

FRONT_BYTES = 64_000_000
"""What a front may hold: for 32 samples, uint8 activations of 2 MB each."""

LEAST_SAMPLES = 4


@dataclass(frozen=True)
class Piece:
    """A part of a graph that runs as a whole. `reads`: what it takes from before; `makes`: what is asked for, or read later."""

    nodes: list[Node]
    reads: list[Tensor]
    makes: list[Tensor]


def pieces(stops: Sequence[Tensor]) -> list[Piece]:
    """For each stop, producers before consumers, the nodes that it needs and that no earlier stop needed."""
    found = []
    wanted: set[int] = set()
    for stop, nodes in reversed(list(zip(stops, _parts(stops), strict=True))):
        wanted.add(id(stop))
        made = {id(t): t for n in nodes for t in n.outputs if not t.is_empty()}
        read = {id(t): t for n in nodes for t in _sources(n) if id(t) not in made}
        found.append(Piece(nodes, list(read.values()), [t for key, t in made.items() if key in wanted]))
        wanted |= read.keys()
    return found[::-1]


class Replay:
    """The values of a front of tensors for every sample, which moves through the graph from stop to stop.

    `stops`: tensors, producers before consumers. Each node before a stop runs once, with the constants that it has at that
    moment, so that each stop sees all changes made to the graph before it. A value is held as long as a later piece reads it.
    Where the values of all samples take more than `limit` bytes, the last samples are let go.
    """

    def __init__(
        self, graph: Graph, samples: Sequence[Feeds], stops: Sequence[Tensor], limit: int = FRONT_BYTES
    ) -> None:
        self._opset = graph.opset
        self._stops = list(stops)
        self._limit = limit
        self._plan = pieces(self._stops)
        self._front: list[dict[str, NDArray[Any]]] = [{t.name: s[t.name] for t in graph.inputs} for s in samples]
        self._position = -1
        self._last = {t.name: i for i, stop in enumerate(self._stops) for t in (*self._plan[i].reads, stop)}

    def advance(self, taps: Sequence[Tensor] = ()) -> list[list[NDArray[Any]]]:
        """Run the piece that ends with the next stop; return, per sample, the stop's value and those of the taps.

        `taps`: tensors that depend on the stop and on constants only.
        """
        self._position += 1
        piece, stop = self._plan[self._position], self._stops[self._position]
        reads = piece.reads if piece.makes else [stop]
        wanted = [*piece.makes, *taps]
        model = ir.submodel(reads, wanted, self._opset) if wanted else None
        runner = None if model is None else session(model, consume=True, keep_float=True)

        def step(values: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
            row = [] if runner is None else run(runner, {t.name: values[t.name] for t in reads})
            values |= {t.name: value for t, value in zip(piece.makes, row, strict=False)}
            found = [values[stop.name], *row[len(piece.makes) :]]
            for name in [name for name in values if self._last.get(name, -1) <= self._position]:
                del values[name]  # at once, so that the next sample gets its memory
            return found

        found = each(step, self._front)
        self._drop_samples()
        return found

    def _drop_samples(self) -> None:
        sizes = np.cumsum([sum(value.nbytes for value in values.values()) for values in self._front])
        del self._front[max(int(np.searchsorted(sizes, self._limit, side="right")), LEAST_SAMPLES) :]


def _parts(stops: Sequence[Tensor]) -> list[list[Node]]:
    seen: set[int] = set()
    parts = []
    for stop in stops:
        piece: list[Node] = []
        stack = list(stop.inputs)
        while stack:
            node = stack.pop()
            if id(node) not in seen:
                seen.add(id(node))
                piece.append(node)
                stack += [maker for tensor in _reads(node) for maker in tensor.inputs]
        parts.append(piece)
    return parts


def _sources(node: Node) -> list[Tensor]:
    """What must be at hand for a node to run: in place of what a DequantizeLinear makes, its integers, a quarter of the bytes."""
    makers = [(t, ir.producer(t)) for t in _reads(node)]
    sources = [t if maker is None or maker.op != "DequantizeLinear" else maker.inputs[0] for t, maker in makers]
    return [t for t in sources if not ir.is_constant(t)]


def _reads(node: Node) -> list[Tensor]:
    return [t for t in (*node.inputs, *ir.captures(node)) if not t.is_empty() and not ir.is_constant(t)]
