"""The invariants of a compilation: structure, and one function per phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qcompiler import ir
from qcompiler.state import CompileState, Phase


class VerifyError(Exception):
    """A pass broke an invariant."""


def verify(state: CompileState) -> None:
    """Check the structure and the invariants of every phase reached. Raises VerifyError with the first few problems."""
    problems = list(_structure(state))
    for phase, check in CHECKS.items():
        if state.phase >= phase and not problems:
            problems += check(state)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise VerifyError("; ".join(problems[:3]) + more)


def _structure(state: CompileState) -> Iterator[str]:
    """Names are unique, every input is defined before it is read, links hold both ways, outputs exist."""
    graph = state.graph
    names: dict[str, int] = {}
    for tensor in ir.tensors(graph):
        if names.setdefault(tensor.name, id(tensor)) != id(tensor):
            yield f"two tensors are called {tensor.name!r}"
    ready = {id(t) for t in graph.inputs}
    seen: set[str] = set()
    for node in graph.nodes:
        if not node.name or node.name in seen:
            yield f"node name {node.name!r} is empty or taken ({node.op})"
        seen.add(node.name)
        for tensor in node.inputs:
            if not (tensor.is_empty() or ir.is_constant(tensor) or id(tensor) in ready):
                yield f"{node.name}: input {tensor.name!r} is not defined before it is read"
            if not any(n is node for n in tensor.outputs):
                yield f"{node.name}: tensor {tensor.name!r} does not know this reader"
        for tensor in node.outputs:
            if id(tensor) in ready:
                yield f"tensor {tensor.name!r} has two producers"
            if not tensor.is_empty():
                ready.add(id(tensor))
    for tensor in graph.outputs:
        if id(tensor) not in ready and not ir.is_constant(tensor):
            yield f"graph output {tensor.name!r} has no producer"


def _fused(state: CompileState) -> Iterator[str]:
    nodes = {n.name for n in state.graph.nodes}
    if state.phase >= Phase.QDQ:
        return
    for block in state.blocks.values():
        for name in block.nodes:
            if name not in nodes:
                yield f"block {block.root!r} names a node {name!r} that is gone"


CHECKS: dict[Phase, Callable[[CompileState], Iterator[str]]] = {Phase.FUSED: _fused}
"""The invariants that hold from a phase on."""
