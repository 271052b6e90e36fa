"""Replay: run a graph piece by piece over many samples, while passes change what comes later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Graph, Tensor
from qcompiler.runtime import run, session
from qcompiler.state import Feeds


class Replay:
    """Holds the values of a growing front of tensors for every sample, and only as long as a later stop reads them.

    `stops`: the tensors at which the graph will be stopped, producers before consumers. Every node before a stop runs once,
    with the constants that it has at that moment, so each stop sees all changes made to the graph before it.
    """

    def __init__(self, graph: Graph, samples: Sequence[Feeds], stops: Sequence[Tensor]) -> None:
        self._opset = graph.opset
        self._values: dict[str, list[NDArray[Any]]] = {
            t.name: [sample[t.name] for sample in samples] for t in graph.inputs
        }
        self._count = len(samples)
        front = {id(t): t for t in graph.inputs}
        self._sources: list[list[Tensor]] = []
        for stop in stops:
            self._sources.append(_sources(stop, front))
            front[id(stop)] = stop
        self._stops = list(stops)
        self._position = 0

    def advance(self) -> list[NDArray[Any]]:
        """Compute the next stop from the values at hand; return its value per sample."""
        stop, sources = self._stops[self._position], self._sources[self._position]
        if stop.name not in self._values:
            self._values[stop.name] = [values[0] for values in self.evaluate(sources, [stop])]
        self._position += 1
        result = self._values[stop.name]
        needed = {t.name for later in self._sources[self._position :] for t in later}
        self._values = {name: values for name, values in self._values.items() if name in needed}
        self._values.setdefault(stop.name, result)
        return result

    def evaluate(self, sources: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[list[NDArray[Any]]]:
        """The values of the wanted tensors per sample, computed from sources whose values are at hand."""
        runner = session(ir.submodel(sources, wanted, self._opset))
        return [run(runner, {t.name: self._values[t.name][i] for t in sources}) for i in range(self._count)]


def _sources(stop: Tensor, front: dict[int, Tensor]) -> list[Tensor]:
    """The tensors of the front from which `stop` is computed."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    stack = [stop]
    while stack:
        tensor = stack.pop()
        if id(tensor) in front:
            found[id(tensor)] = tensor
            continue
        for node in tensor.inputs:
            if id(node) not in seen:
                seen.add(id(node))
                stack += [t for t in (*node.inputs, *ir.captures(node)) if not t.is_empty()]
    return list(found.values())
