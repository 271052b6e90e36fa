"""The float model in a calibrated state, with a gate wherever the compiler is going to put Q and DQ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qcompiler import ir, quant
from qcompiler.ir import Graph, Node, Tensor
from qcompiler.ops import Lowering, OpRule, Role, quantized_rule
from qcompiler.quant import QuantParams
from qcompiler.replay import pieces
from qcompiler.shift import is_shift
from qcompiler.state import Block, CompileState

Array = NDArray[Any]

LEAST_ACTIVE = 0.1
"""The least share of results inside an activation's bounds that a correction reckons with."""


@dataclass(frozen=True)
class Bounds:
    """What correct-bias needs to know of a layer: the bounds of its activation, and the axis of its channels."""

    low: float
    high: float
    axis: int


class Correction:
    """What correct-bias leaves of an error in the result of a layer. `wanted`: the float model's results, one per sample.

    Channels that are moved: results inside the activation's bounds, by the mean error over the share of these results, times
    the certainty of that mean (see correct-bias).
    """

    def __init__(self, bounds: Bounds, wanted: Sequence[Array]) -> None:
        self.bounds = bounds
        self.means = self._means(wanted)
        inside = [(x > bounds.low) & (x < bounds.high) for x in wanted]
        self.share = self._means([mask.astype(np.float32) for mask in inside]).mean(0)
        self.inside = inside if np.min(self.share, initial=1) < 1 else None

    def apply(self, given: Sequence[Array]) -> list[Array]:
        """The results, one per sample, with the mean error taken out that the other samples show: no error explains itself."""
        errors = self.means - self._means(given)
        others = max(len(errors) - 1, 1)
        mean = (errors.sum(0) - errors) / others
        doubt = errors.var(0, ddof=min(others, 1)) / others
        certainty = np.maximum(0, 1 - doubt / np.maximum(np.square(mean), np.finfo(np.float64).tiny))
        shifts = (mean * certainty / np.maximum(self.share, LEAST_ACTIVE)).astype(np.float32)
        moved = []
        for i, (y, shift) in enumerate(zip(given, shifts, strict=True)):
            step = np.expand_dims(shift, self._others(y.ndim))
            if self.inside is None:
                moved.append(y + step)
            else:
                result = y + step * self.inside[i]
                moved.append(np.clip(result, self.bounds.low, self.bounds.high, out=result))
        return moved

    def _others(self, rank: int) -> tuple[int, ...]:
        return tuple(i for i in range(rank) if i != self.bounds.axis % rank)

    def _means(self, results: Sequence[Array]) -> NDArray[np.float64]:
        """The mean of each channel: shape (samples, channels)."""
        return np.array([x.mean(self._others(x.ndim)) for x in results], np.float64)


@dataclass(frozen=True)
class Gate:
    """Where an activation is rounded, behind a quantized layer or before one. `tensor`: what its readers get; `params`: how it is
    rounded, None if that changes nothing. `layer`: the layer that makes it (`made`), or the first quantized one that reads it.
    `moved`: that layer only moves what is rounded already. `users`: it is rounded if one of these is quantized. `bounds`: of the
    layer that makes it, quantized or not, if its bias corrects errors.
    """

    tensor: Tensor
    params: QuantParams | None
    layer: str
    made: bool
    moved: bool
    users: tuple[str, ...]
    bounds: Bounds | None


class GatedModel:
    """A float model in which an Identity stands for each pair of Q and DQ, cut into pieces behind each of them.

    `layers`: the roots of quantized blocks, by name; `gates` in the order of the graph; `outputs` in the model's order;
    `constants`: layer -> position of an input -> what that constant is rounded to.
    """

    def __init__(self, state: CompileState, graph: Graph) -> None:
        """`graph` is changed."""
        self.state, self.graph = state, graph
        nodes = {n.name: n for n in graph.nodes}
        self.layers = {root: nodes[root] for root, b in state.blocks.items() if b.quantized and root in nodes}
        self.outputs: list[Tensor] = list(graph.outputs)
        self._made = {name: root for root in self.layers for name in state.blocks[root].outputs}
        corrected = [nodes[root] for root in state.blocks if root in state.corrected and root in nodes]
        self._bounds = {
            name: _bounds(state.blocks[n.name], n) for n in corrected for name in state.blocks[n.name].outputs
        }
        self._moved = {name for root in self.layers if self._passes_on(root) for name in state.blocks[root].outputs}
        self.gates = self._add_gates()
        ir.toposort(graph)
        self.constants = {root: found for root in self.layers if (found := self._rounded_constants(root))}
        stops = {id(t): t for t in (*(gate.tensor for gate in self.gates), *self.outputs) if t.inputs}
        self.pieces = pieces(list(stops.values()))
        self.gate_of = {gate.tensor.name: gate for gate in self.gates}

    def submodel(self, reads: Sequence[Tensor], makes: Sequence[Tensor]) -> onnx.ModelProto:
        """A part of the graph, as it is now."""
        return ir.submodel(reads, makes, self.graph.opset)

    @contextmanager
    def rounded_constants(self, root: str) -> Iterator[None]:
        """While this lasts, the constants of a layer are rounded."""
        node = self.layers[root]
        before = {i: node.inputs[i] for i in self.constants[root]}
        for i, values in self.constants[root].items():
            ir.set_input(node, i, ir.Constant(f"{before[i].name}_rounded", values))
        yield
        for i, tensor in before.items():
            ir.set_input(node, i, tensor)

    def _rule(self, node: Node) -> OpRule:
        return quantized_rule(self.state.ops, node)

    def _rounded_constants(self, root: str) -> dict[int, Array]:
        node, rule = self.layers[root], self._rule(self.layers[root])
        found = {}
        for i, tensor in enumerate(node.inputs):
            params, values = self.state.params.get(tensor.name), ir.value(tensor)
            if params is not None and values is not None and rule.role(i) in (Role.ACT, Role.WEIGHT):
                rounded = self.state.integers.get(tensor.name)
                found[i] = quant.dequantize(quant.quantize(values, params) if rounded is None else rounded, params)
        return found

    def _add_gates(self) -> list[Gate]:
        gates = [self._gate(t) for t in list(ir.tensors(self.graph)) if not ir.is_constant(t) and not t.is_empty()]
        order = {t.name: i for i, t in enumerate(ir.tensors(self.graph))}
        found = {gate.tensor.name: gate for gate in gates if gate}
        for name in sorted(found, key=lambda name: -order[name]):
            for source in self._sources(found[name]):
                if source in found:
                    users = dict.fromkeys([*found[source].users, *found[name].users])
                    found[source] = replace(found[source], users=tuple(users))
        return sorted(found.values(), key=lambda gate: order[gate.tensor.name])

    def _sources(self, gate: Gate) -> list[str]:
        """The tensors whose rounded values a gate passes on: they stay rounded as long as this one would be."""
        if not gate.moved:
            return []
        node = self.layers[gate.layer]
        return [node.inputs[i].name for i in self._rule(node).activations(node)]

    def _gate(self, tensor: Tensor) -> Gate | None:
        """Put an Identity behind a tensor: for all readers if a quantized or corrected layer makes it, else for integer ones."""
        maker, params = self._made.get(tensor.name), self.state.params.get(tensor.name)
        integer = {id(n): n for n in tensor.outputs if params is not None and self._reads_integers(n, tensor)}
        users = tuple(dict.fromkeys([*([maker] if maker else []), *(n.name for n in integer.values())]))
        bounds = self._bounds.get(tensor.name)
        if not users and bounds is None:
            return None
        behind = ir.Variable(f"{tensor.name}_rounded", tensor.dtype, tensor.shape)
        everywhere = maker is not None or bounds is not None
        for node in list(tensor.outputs) if everywhere else integer.values():
            for i, given in enumerate(node.inputs):
                if given is tensor:
                    ir.set_input(node, i, behind)
        self.graph.nodes.append(ir.Node("Identity", f"{tensor.name}_gate", {}, [tensor], [behind]))
        if everywhere:
            self.outputs = [behind if t is tensor else t for t in self.outputs]
        moved = tensor.name in self._moved
        rounding = None if moved or not users else params
        return Gate(behind, rounding, users[0] if users else "", maker is not None, moved, users, bounds)

    def _reads_integers(self, node: Node, tensor: Tensor) -> bool:
        if node.name not in self.layers:
            return False
        return any(node.inputs[i] is tensor for i in self._rule(node).activations(node))

    def _passes_on(self, root: str) -> bool:
        """Whether the layer only moves values that are rounded already."""
        node, rule = self.layers[root], self._rule(self.layers[root])
        if is_shift(self.state, node):
            return True
        leaders = {self.state.leader(node.inputs[i].name) for i in rule.activations(node)}
        own = {self.state.leader(name) for name in self.state.blocks[root].outputs}
        return rule.lowering in (Lowering.MOVE, Lowering.CONCAT) and leaders == own


def _bounds(block: Block, root: Node) -> Bounds:
    return Bounds(block.low, block.high, 1 if root.op == "Conv" else -1)
