"""The only mutator of graphs, and rules that run to a fixed point.

Names, counts, provenance, refusals and the limit of bisection live here, so that no pass has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qcompiler import ir
from qcompiler.ir import Constant, Graph, Node, Tensor, Variable
from qcompiler.ops import op_key
from qcompiler.state import CompileState, Counterpart, Refusal

__all__ = ["Refusal", "Rewriter", "Rule", "apply_rules"]


@dataclass
class Rewriter:
    """Edits one graph of a state. Nodes are appended; `finish` restores the order and drops what is dead."""

    state: CompileState
    graph: Graph = field(default=None)  # type: ignore[assignment]
    count: int = 0

    def __post_init__(self) -> None:
        self.refusals = self.state.refusals
        if self.graph is None:
            self.graph = self.state.graph
        self._graphs = list(ir.all_graphs(self.state.model or self.state.graph))
        self._tensor_names = {t.name for g in self._graphs for t in ir.tensors(g)}
        self._node_names = {n.name for g in self._graphs for n in g.nodes}
        self._own = {id(n) for n in self.graph.nodes}
        self._removed: list[Node] = []

    @property
    def exhausted(self) -> bool:
        """Whether the limit on rewrites is reached."""
        limit = self.state.rewrite_limit
        return limit is not None and self.count >= limit

    def fresh_tensor_name(self, hint: str) -> str:
        """A tensor name that no graph of the model uses."""
        return _fresh(hint, self._tensor_names)

    def variable(self, hint: str, dtype: Any = None, shape: Sequence[Any] | None = None) -> Variable:
        """A new tensor."""
        return Variable(self.fresh_tensor_name(hint), dtype=dtype, shape=shape)

    def constant(self, hint: str, values: NDArray[Any] | np.generic | float) -> Constant:
        """A new initializer."""
        return Constant(self.fresh_tensor_name(hint), np.array(values))

    def node(
        self,
        op: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor] | int = 1,
        *,
        origin: Node | Iterable[Node],
        hint: str = "",
        domain: str = "",
        **attrs: Any,
    ) -> Node:
        """Append a node that takes the place of `origin`, or of a part of it.

        outputs: tensors that have no producer yet (use `take_output` otherwise), or how many new ones to make.
        """
        sources = [origin] if isinstance(origin, Node) else list(origin)
        name = _fresh(hint or sources[0].name or op, self._node_names)
        if isinstance(outputs, int):
            outputs = [self.variable(f"{name}_output") for _ in range(outputs)]
        node = Node(op, name, attrs, list(inputs), list(outputs), domain or None)
        self.graph.nodes.append(node)
        self._own.add(id(node))
        self.state.origin[name] = self.layers(sources)
        return node

    def layers(self, nodes: Iterable[Node]) -> tuple[str, ...]:
        """The float layers behind nodes, in order, each once."""
        return tuple(dict.fromkeys(layer for n in nodes for layer in self.state.origin.get(n.name, (n.name,))))

    def adopt(self, node: Node, *sources: Node) -> None:
        """Record that `node` now also does the work of `sources`."""
        self.state.origin[node.name] = self.layers((node, *sources))

    def set_input(self, node: Node, index: int, tensor: Tensor) -> None:
        """Replace an input."""
        ir.set_input(node, index, tensor)

    def take_output(self, node: Node, tensor: Tensor, index: int = 0) -> None:
        """Make `node` the producer of `tensor`; consumers and graph outputs follow without a change."""
        ir.take_output(node, index, tensor)

    def cut(self, tensor: Tensor) -> Variable:
        """Give the producer of `tensor` a new output in its place and return that; `tensor` then has no producer."""
        maker = ir.producer(tensor)
        if maker is None:
            raise ValueError(f"tensor {tensor.name!r} has no producer")
        fresh = self.variable(f"{tensor.name}_raw", tensor.dtype, tensor.shape)
        ir.take_output(maker, next(i for i, t in enumerate(maker.outputs) if t is tensor), fresh)
        return fresh

    def relate(
        self, tensor: Tensor, source: str, factor: ArrayLike = 1.0, offset: ArrayLike = 0.0, reshaped: bool = False
    ) -> None:
        """Note that `tensor` is factor * source + offset, where `source` is the name of another tensor, there or gone.

        factor, offset: shapes that broadcast against the source. reshaped: whether the tensor has another shape than that.
        """
        was = self.state.counterparts.get(source) or Counterpart(source, np.ones(()), np.zeros(()))
        scale, shift = np.asarray(factor, np.float64), np.asarray(offset, np.float64)
        if was.reshaped and not scale.size == shift.size == 1:  # these do not fit the shape that the model had
            return
        now = Counterpart(was.source, was.factor * scale, was.offset * scale + shift, was.reshaped or reshaped)
        self.state.counterparts[tensor.name] = now

    def change_values(self, tensor: Tensor, factor: ArrayLike = 1.0, offset: ArrayLike = 0.0) -> None:
        """Give a tensor whose values become factor * values + offset another name: the old one stands for the old values.

        The tensor must be neither an input nor an output of a graph. factor, offset: shapes that broadcast against it.
        """
        old, tensor.name = tensor.name, self.fresh_tensor_name(f"{tensor.name}_scaled")
        self.relate(tensor, old, factor, offset)
        self.state.counterparts.pop(old, None)

    def replace_uses(self, old: Tensor, new: Tensor, among: Iterable[Node] | None = None) -> None:
        """Let the consumers of `old` (or those `among` them) read `new`. Graph outputs are not touched."""
        chosen = None if among is None else {id(n) for n in among}
        for node in list(old.outputs):
            if chosen is None or id(node) in chosen:
                for i, tensor in enumerate(node.inputs):
                    if tensor is old:
                        ir.set_input(node, i, new)
        if chosen is None:
            self._replace_subgraph_outputs(old, new)

    def _replace_subgraph_outputs(self, old: Tensor, new: Tensor) -> None:
        for graph in self._graphs:
            if graph is not self.graph:
                for i, tensor in enumerate(graph.outputs):
                    if tensor is old:
                        graph.outputs[i] = new

    def bypass(self, node: Node, index: int = 0) -> bool:
        """Remove a node whose output equals its input `index`. False where two graph outputs or inputs stand in the way."""
        source, result = node.inputs[index], node.outputs[0]
        if not self.is_output(result):
            self.replace_uses(result, source)
            self.remove(node)
            return True
        maker = ir.producer(source)
        if maker is None or self.is_output(source) or id(maker) not in self._own:
            return False
        self.remove(node)
        position = next(i for i, t in enumerate(maker.outputs) if t is source)
        ir.take_output(maker, position, result)
        self.replace_uses(source, result)
        return True

    def remove(self, node: Node) -> None:
        """Take a node out of the graph; its outputs must be unused or produced by another node."""
        ir.detach(node)
        self._forget(node)

    def is_output(self, tensor: Tensor) -> bool:
        """Whether the tensor is an output of the graph that is edited."""
        return ir.is_output(self.graph, tensor)

    def users(self, tensor: Tensor) -> list[Node]:
        """The nodes that read the tensor, each once; nodes inside subgraphs included."""
        return list({id(n): n for n in tensor.outputs}.values())

    def only_user(self, tensor: Tensor) -> Node | None:
        """The node that is the tensor's one consumer; None if it has several, or is an output of any graph."""
        users = self.users(tensor)
        if len(users) != 1 or any(ir.is_output(g, tensor) for g in self._graphs):
            return None
        return users[0] if id(users[0]) in self._own else None

    def finish(self) -> int:
        """Drop dead nodes, restore the order, and return the number of rewrites."""
        self.graph.nodes[:] = [n for n in self.graph.nodes if id(n) in self._own]
        for node in ir.drop_dead_nodes(self.graph):
            self._forget(node)
        ir.toposort(self.graph)
        return self.count

    def _forget(self, node: Node) -> None:
        self._own.discard(id(node))
        self._removed.append(node)  # keeps the object, hence its id, alive
        self.refusals.pop(node.name, None)


def _fresh(hint: str, taken: set[str]) -> str:
    name, i = hint, 0
    while name in taken:
        i += 1
        name = f"{hint}_{i}"
    taken.add(name)
    return name


Rule = Callable[[Rewriter, Node], Refusal | None]
"""Rewrites the subgraph rooted at a node and returns None, or returns the reason why not."""

MAX_ROUNDS = 100


def apply_rules(rewriter: Rewriter, rules: Mapping[str, Rule | Sequence[Rule]]) -> int:
    """Apply rules by operator type (`op_key`) until none fires; return the number of rewrites.

    The last refusal of each node that is left stays in `state.refusals`. Raises RuntimeError if rules do not settle.
    """
    for _ in range(MAX_ROUNDS):
        fired = _one_round(rewriter, rules)
        rewriter.finish()
        if not fired or rewriter.exhausted:
            return rewriter.count
    raise RuntimeError(f"rules do not reach a fixed point in {MAX_ROUNDS} rounds; the last to fire rewrote {fired!r}")


def _one_round(rewriter: Rewriter, rules: Mapping[str, Rule | Sequence[Rule]]) -> str | None:
    fired = None
    for node in list(rewriter.graph.nodes):
        entry = rules.get(op_key(node.op, node.domain), ())
        name, refusals = node.name, []
        for rule in [entry] if callable(entry) else entry:
            if rewriter.exhausted or not node.outputs:
                break
            refusal = rule(rewriter, node)
            if refusal is None:
                rewriter.count += 1
                rewriter.refusals.pop(name, None)
                fired = name
                break
            refusals.append(refusal)
        else:
            if refusals:  # the last that names a culprit says most
                rewriter.refusals[name] = ([r for r in refusals if r.culprit] or refusals)[-1]
    return fired
