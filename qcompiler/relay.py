"""Long models as a relay of sessions: ONNX Runtime makes one in time that grows faster than the number of nodes and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import onnx

from qcompiler import runtime
from qcompiler.runtime import Feeds

SECTION = 3000
"""Nodes of a session above which two take less time."""


class Relay:
    """Runs the sections of a model one after the other, as one session would; each is a model of its own.

    The first section takes the feeds; what the others take are feeds, or outputs of sections before. `outputs`: what a run
    returns, in order. The models are consumed.
    """

    def __init__(self, sections: Sequence[onnx.ModelProto], outputs: Sequence[str]) -> None:
        self._outputs = list(outputs)
        self._takes = [[v.name for v in section.graph.input] for section in sections]
        self._makes = [[v.name for v in section.graph.output] for section in sections]
        self._sessions = [runtime.session(section, low_memory=True, consume=True) for section in sections]
        self._dead: list[list[str]] = []
        needed = set(outputs)
        for takes, makes in zip(reversed(self._takes), reversed(self._makes), strict=True):
            self._dead.append([name for name in dict.fromkeys((*takes, *makes)) if name not in needed])
            needed.update(takes)
        self._dead.reverse()

    def run(self, names: None, feeds: Feeds, /) -> list[Any]:
        """All outputs, in order, as `Session.run` gives them."""
        values = dict(feeds)
        for i, session in enumerate(self._sessions):
            if not self._makes[i]:  # nothing behind it is wanted, and ONNX Runtime does not run what has no outputs
                continue
            given = {name: values[name] for name in self._takes[i]} if i else feeds
            values |= zip(self._makes[i], session.run(names, given), strict=True)
            for name in self._dead[i]:
                values.pop(name, None)
        return [values[name] for name in self._outputs]


def relay(model: onnx.ModelProto, size: int = SECTION) -> Relay:
    """What runs a model in as many sections as it needs. The model is consumed."""
    outputs = [v.name for v in model.graph.output]
    return Relay(split(model, size), outputs)


def split(model: onnx.ModelProto, size: int = SECTION) -> list[onnx.ModelProto]:
    """Cut a model of more than `size` nodes into sections where few tensors cross, each of whose types is known.

    The first section has all inputs of the model. One with an output that no node makes stays whole.
    """
    graph = model.graph
    if len(graph.node) <= size or not {v.name for v in graph.output} <= {name for n in graph.node for name in n.output}:
        return [model]
    nodes = _by_depth(graph)
    types = {v.name: v for v in (*graph.input, *graph.value_info, *graph.output) if v.type.WhichOneof("value")}
    weights = {w.name: w for w in graph.initializer}
    last = {name: i for i, node in enumerate(nodes) for name in _reads(node)}
    wanted = {v.name for v in graph.output}
    sections = []
    start = 0
    for end in _ends(nodes, last, types.keys(), size):
        section = onnx.ModelProto(
            ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions
        )
        read = dict.fromkeys(name for node in nodes[start:end] for name in _reads(node))
        made = dict.fromkeys(name for node in nodes[start:end] for name in node.output if name)
        outer = [types[name] for name in read if name in types and name not in made and name not in weights]
        section.graph.name = graph.name
        section.graph.node.extend(nodes[start:end])
        section.graph.initializer.extend(weights[name] for name in read if name in weights)
        section.graph.input.extend(outer if start else graph.input)
        leaving = {name for name in made if name in wanted or last.get(name, -1) >= end}
        section.graph.output.extend(types.get(n, onnx.ValueInfoProto(name=n)) for n in made if n in leaving)
        section.graph.value_info.extend(types[n] for n in made if n in types and n not in leaving)
        sections.append(section)
        start = end
    return sections


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, with those in its bodies."""
    yield from node.input
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            yield from (v.name for v in body.output)
            for inner in body.node:
                yield from _reads(inner)


def _by_depth(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes in an order in which each comes soon behind what it reads."""
    depth: dict[str, int] = {}
    keys = []
    for node in graph.node:
        own = 1 + max((depth.get(name, 0) for name in _reads(node)), default=0)
        depth.update((name, own) for name in node.output if name)
        keys.append(own)
    return [graph.node[i] for i in sorted(range(len(keys)), key=keys.__getitem__)]


def _ends(nodes: Sequence[onnx.NodeProto], last: dict[str, int], typed: Any, size: int) -> Iterator[int]:
    """Where sections end: within the second half of `size` where the fewest tensors cross, or later if those have no type."""
    crossing, untyped = ([0] * (len(nodes) + 2) for _ in range(2))
    for i, node in enumerate(nodes):
        for name in node.output:
            if last.get(name, -1) > i:
                for counts in (crossing,) if name in typed else (crossing, untyped):
                    counts[i + 1] += 1
                    counts[last[name] + 1] -= 1
    crossing, untyped = list(accumulate(crossing)), list(accumulate(untyped))
    start = 0
    while len(nodes) - start > size:
        places = [i for i in range(start + max(size // 2, 1), start + size + 1) if not untyped[i]]
        later = (i for i in range(start + size + 1, len(nodes)) if not untyped[i])
        start = min(places, key=lambda i: (crossing[i], -i)) if places else next(later, len(nodes))
        if start < len(nodes):
            yield start
    yield len(nodes)
