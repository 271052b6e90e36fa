"""Replay: run a graph piece by piece over many samples, while passes change what comes later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Graph, Node, Tensor
from qcompiler.runtime import run, session
from qcompiler.state import Feeds


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
        read = {id(t): t for n in nodes for t in _reads(n) if id(t) not in made}
        found.append(Piece(nodes, list(read.values()), [t for key, t in made.items() if key in wanted]))
        wanted |= read.keys()
    return found[::-1]


class Replay:
    """The values of a front of tensors for every sample, which moves through the graph from stop to stop.

    `stops`: tensors, producers before consumers. Each node before a stop runs once, with the constants that it has at that
    moment, so that each stop sees all changes made to the graph before it. A value is held as long as a later piece reads it.
    """

    def __init__(self, graph: Graph, samples: Sequence[Feeds], stops: Sequence[Tensor]) -> None:
        self._opset = graph.opset
        self._stops = list(stops)
        self._count = len(samples)
        self._plan = pieces(self._stops)
        self._values = {t.name: [sample[t.name] for sample in samples] for t in graph.inputs}
        self._position = -1

    def advance(self) -> list[NDArray[Any]]:
        """Run the piece that ends with the next stop; return the stop's value per sample."""
        self._position += 1
        piece = self._plan[self._position]
        if piece.makes:
            rows = self.evaluate(piece.reads, piece.makes)
            self._values |= {t.name: [row[i] for row in rows] for i, t in enumerate(piece.makes)}
        stop = self._stops[self._position]
        needed = {t.name for later in self._plan[self._position + 1 :] for t in later.reads}
        needed |= {t.name for t in self._stops[self._position :]}
        self._values = {name: values for name, values in self._values.items() if name in needed}
        return self._values[stop.name]

    def evaluate(self, sources: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[list[NDArray[Any]]]:
        """The values of the wanted tensors, for each sample, computed from sources whose values are at hand."""
        runner = session(ir.submodel(sources, wanted, self._opset))
        return [run(runner, {t.name: self._values[t.name][i] for t in sources}) for i in range(self._count)]


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


def _reads(node: Node) -> list[Tensor]:
    return [t for t in (*node.inputs, *ir.captures(node)) if not t.is_empty() and not ir.is_constant(t)]
