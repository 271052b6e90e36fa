"""Passes inside the bodies of If, Loop and Scan: each is a graph of its own, and what it reads from outside is an input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from qcompiler import ir
from qcompiler.ir import Graph, Node, Tensor
from qcompiler.state import CompileState


def run_everywhere(run: Callable[[CompileState], int], state: CompileState) -> int:
    """Run a pass on the graph of a state, then on the bodies in it, at any depth; return the number of rewrites.

    The states of bodies share the tables of the whole model.
    """
    count = run(state)
    for node in list(state.graph.nodes):
        for body in _bodies(node):
            left = None if state.rewrite_limit is None else max(state.rewrite_limit - count, 0)
            inner = replace(state, graph=body, model=state.model or state.graph, rewrite_limit=left)
            with _closed(body, node):
                count += run_everywhere(run, inner)
    return count


def _bodies(node: Node) -> list[Graph]:
    return [attribute for attribute in node.attrs.values() if isinstance(attribute, Graph)]


@contextmanager
def _closed(body: Graph, owner: Node) -> Iterator[None]:
    """Put inputs in the place of the variables that a body reads from outside; constants are known inside, too."""
    mine = {id(n) for g in ir.all_graphs(body) for n in g.nodes}
    alone = Node(owner.op, owner.name, {"body": body})
    outer = [t for t in ir.captures(alone) if isinstance(t, ir.Variable) and not t.is_empty()]
    inputs = [ir.Variable(t.name, t.dtype, t.shape, t.type) for t in outer]
    for tensor, stand_in in zip(outer, inputs, strict=True):
        _replace(body, mine, tensor, stand_in)
    own = len(body.inputs)
    body.inputs.extend(inputs)
    try:
        yield
    finally:
        del body.inputs[own:]
        mine = {id(n) for g in ir.all_graphs(body) for n in g.nodes}
        for tensor, stand_in in zip(outer, inputs, strict=True):
            _replace(body, mine, stand_in, tensor)


def _replace(body: Graph, nodes: set[int], old: Tensor, new: Tensor) -> None:
    """Let those of the nodes, and the outputs of the body and of bodies in it, that read `old` read `new`."""
    for reader in [n for n in old.outputs if id(n) in nodes]:
        for i, tensor in enumerate(reader.inputs):
            if tensor is old:
                ir.set_input(reader, i, new)
    for graph in ir.all_graphs(body):
        for i, tensor in enumerate(graph.outputs):
            if tensor is old:
                graph.outputs[i] = new
