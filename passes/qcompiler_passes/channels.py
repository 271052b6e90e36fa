"""Channel factors: by what the channels of a graph may be multiplied without a change of what it computes.

Every channel of every tensor has a *variable*: the factor by which a pass may multiply it. Operators tie variables (both inputs
of an Add must carry the same factor), pass them on (Relu, MaxPool, Concat, Reshape), make new ones (a Conv, whose weights can
hold any factor of its result and undo any of its input), or fix them at 1 (Sigmoid, graph outputs). So residual connections,
concatenations and channel shuffles need no treatment of their own: they are just variables that meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Graph, Node, Tensor
from qcompiler.ops import op_key
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler_passes import linear
from qcompiler_passes.linear import Linear

Ids = NDArray[np.int64]
Factors = NDArray[np.float64]

FIXED = np.zeros((), np.int64)
"""The variables of a tensor that nothing may be multiplied into: variable 0 is always 1."""


@dataclass
class Channels:
    """The variables of a graph. `follow` makes it.

    `sources`: the operators that make new variables; other operators with weights only undo factors.
    `ids`: by tensor name, variables of shape [1 or axis length, ...] that broadcasts to the tensor, or () where all are fixed.
    `layers`: the operators whose weights take in factors, with the variables of input and result, shape (channels,) each.
    `operands`: constants that are multiplied, as (node, input index, variables). `makers`: the nodes that are sources.
    `held`: why variables are fixed, where known.
    """

    sources: frozenset[str]
    ids: dict[str, Ids] = field(default_factory=dict)
    layers: list[tuple[Linear, Ids, Ids]] = field(default_factory=list)
    operands: list[tuple[Node, int, Ids]] = field(default_factory=list)
    makers: list[Node] = field(default_factory=list)
    held: dict[int, Refusal] = field(default_factory=dict)
    parents: Ids = field(default_factory=lambda: np.zeros(1, np.int64))

    def made_by(self, node: Node, count: int) -> Ids:
        """Variables for the result of an operator with weights, shape (count,): new ones if it is a source, else fixed ones."""
        if node.op not in self.sources:
            return np.zeros(count, np.int64)
        self.makers.append(node)
        return self.fresh(count)

    def fresh(self, count: int) -> Ids:
        """New variables, shape (count,)."""
        new = np.arange(len(self.parents), len(self.parents) + count)
        self.parents = np.concatenate([self.parents, new])
        return new

    def roots(self, ids: Ids) -> Ids:
        """For each variable the one that stands for all that are tied to it: 0 if it is fixed."""
        roots = self.parents[ids]
        while not np.array_equal(roots, above := self.parents[roots]):
            roots = above
        self.parents[ids] = roots  # a shorter way for the next time
        return roots

    def tie(self, a: Ids, b: Ids) -> None:
        """Let broadcast variables be equal, pair by pair."""
        while True:
            x, y = np.broadcast_arrays(self.roots(a), self.roots(b))
            if np.array_equal(x, y):
                return
            self.parents[np.maximum(x, y)] = np.minimum(
                x, y
            )  # of several pairs with the same greater one, the last: then again

    def fix(self, tensor: Tensor, reason: Refusal | None = None) -> None:
        """Forbid factors on a tensor."""
        if reason is not None:
            self.held |= dict.fromkeys(np.unique(self.roots(self.of(tensor))).tolist(), reason)
        self.tie(self.of(tensor), FIXED)

    def of(self, tensor: Tensor) -> Ids:
        """The variables of a tensor."""
        return self.ids.get(tensor.name, FIXED)

    def is_fixed(self, ids: Ids) -> bool:
        """Whether none of the variables is free."""
        return not self.roots(ids).any()

    def refusals(self) -> dict[str, Refusal]:
        """By node: why the result of a source may carry no factors."""
        tied = Refusal("its channels are tied to some that must stay as they are")
        results = ((node, self.of(node.outputs[0])) for node in self.makers)
        return {n.name: self.held.get(int(ids.flat[0]), tied) for n, ids in results if self.is_fixed(ids)}


Rule = Callable[[Channels, Node], Sequence[Ids] | None]
"""Ties the variables of a node and returns those of its outputs, or returns None: inputs and outputs are fixed then."""


def follow(graph: Graph, sources: frozenset[str], rules: Mapping[str, Rule]) -> Channels:
    """Find the variables of a graph. `sources`: the operators that make new ones; `rules`: by `op_key`."""
    found = Channels(sources)
    for node in graph.nodes:
        rule = rules.get(op_key(node.op, node.domain))
        results = None if rule is None or ir.has_subgraph(node) or _is_empty(node) else rule(found, node)
        if results is None:
            for tensor in (*node.inputs, *ir.captures(node)):
                found.fix(tensor, Refusal(f"{node.op} does not pass a factor on", node.name))
        else:
            found.ids |= {tensor.name: ids for tensor, ids in zip(node.outputs, results, strict=False)}
    for tensor in graph.outputs:
        found.fix(tensor, Refusal("the result is a graph output", tensor.name))
    return found


def _is_empty(node: Node) -> bool:
    """Whether an operand or a result has no elements, hence no channels either."""
    return any(0 in (ir.shape(t) or ()) for t in (*node.inputs, *node.outputs))


def multiply(rewriter: Rewriter, channels: Channels, factors: Factors) -> Refusal | None:
    """Multiply every channel by its factor, shape (variables,), in the constants of the graph; none if a weight overflows."""
    refusal = linear.write(rewriter, _multiplied(channels, factors))
    if refusal is not None:
        return refusal
    for node, index, ids in channels.operands:
        tensor, scale = node.inputs[index], factors[channels.roots(ids)]
        if (scale != 1).any():
            values = ir.array(tensor)
            rewriter.set_input(node, index, rewriter.constant(tensor.name, (values * scale).astype(values.dtype)))
    for tensor in list(ir.tensors(rewriter.graph)):
        scale = factors[channels.roots(channels.of(tensor))]
        if (scale != 1).any():
            rewriter.change_values(tensor, scale)
    return None


def _multiplied(channels: Channels, factors: Factors) -> Iterator[Linear]:
    """The layers whose weights change, one at a time: they may be large."""
    for layer, before, after in channels.layers:
        down, up = factors[channels.roots(before)], factors[channels.roots(after)]
        if (down != 1).any() or (up != 1).any():
            yield layer.of(1 / down, np.zeros_like(down)).then(up, np.zeros_like(up))
