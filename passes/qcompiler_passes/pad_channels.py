"""pad-channels: numbers of channels for which the target's convolutions are fast."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Graph, Node, Tensor
from qcompiler.ops import Lowering, op_key
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler.state import CompileState, Phase
from qcompiler.target import Alignment
from qcompiler_passes.match import static_axis

SLOW_DEPTHWISE = 1.8
FAST_DEPTHWISE = 0.5
UNALIGNED = 12.0
PRODUCT = 0.003
"""Nanoseconds, as measured; only their ratios count: an element of a depthwise convolution with other kernels than the target's
best, and with these; a pixel of a dense one without them; a product of a dense one."""

ELEMENT = {"MaxPool": 1.3, "AveragePool": 1.3, "Relu": 0.0, "Clip": 0.0}
OTHER_ELEMENT = 0.4
"""Nanoseconds per element of other operators."""


@dataclass(frozen=True)
class PadChannels:
    """Give tensors between convolutions more channels, where the target's kernels for them make up for the additional work.

    The new channels are copies of others: whoever makes them has copies of its filters, so that no value appears that was not
    there. The convolutions that read them have zeros for them, so that the function stays the same.
    """

    name: ClassVar[str] = "pad-channels"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of groups of tensors padded."""
        rewriter = Rewriter(state)
        for group in () if self.name in state.skip else _groups(state):
            if rewriter.exhausted:
                break
            wanted = group.wanted(state.target.alignment)
            if wanted == group.channels:
                continue
            if group.obstacle is not None:
                rewriter.refusals.setdefault(group.members[0].name, group.obstacle)
                continue
            _pad(rewriter, group, wanted)
            rewriter.count += 1
        return rewriter.finish()


@dataclass
class _Group:
    """Tensors, by id, that must have the same number of channels, and all nodes that make or read them."""

    channels: int
    tensors: dict[int, Tensor] = field(default_factory=dict)
    members: list[Node] = field(default_factory=list)
    obstacle: Refusal | None = None

    def holds(self, tensor: Tensor) -> bool:
        return id(tensor) in self.tensors

    def wanted(self, target: Alignment) -> int:
        """The number of channels with which the group is fastest."""
        unit = target.depthwise if any(_is_depthwise(n) for n in self.members) else _dense_unit(target)
        new = max(-(-self.channels // unit) * unit, target.least)
        if not any(n.op == "Conv" for n in self.members) or new > 2 * self.channels:
            return self.channels
        return new if sum(self._gain(n, new, target) for n in self.members) > 0 else self.channels

    def _gain(self, node: Node, new: int, target: Alignment) -> float:
        """Nanoseconds that a node saves with `new` channels."""
        more, pixels = new - self.channels, _pixels(node.outputs[0])
        if _is_depthwise(node):
            before = SLOW_DEPTHWISE if self.channels % target.depthwise else FAST_DEPTHWISE
            return pixels * (before * self.channels - FAST_DEPTHWISE * new)
        if _is_conv(node):
            outputs, inputs, *kernel = ir.array(node.inputs[1]).shape
            per_channel = inputs * self.holds(node.outputs[0]) + outputs * self.holds(node.inputs[0])
            slow = self.channels % _dense_unit(target) and pixels > 1
            return pixels * ((UNALIGNED if slow else 0.0) - float(PRODUCT * per_channel * more * math.prod(kernel)))
        return -max(pixels, _pixels(node.inputs[0])) * more * ELEMENT.get(node.op, OTHER_ELEMENT)


def _dense_unit(target: Alignment) -> int:
    return math.lcm(target.inputs, target.outputs)


def _pixels(tensor: Tensor) -> int:
    """Elements per channel; sizes that are not known count as 1."""
    return math.prod(static_axis(tensor, axis) or 1 for axis in range(2, len(ir.shape(tensor) or ())))


def _groups(state: CompileState) -> list[_Group]:
    """The groups of the tensors with a known number of channels, in the order of the graph."""
    parent: dict[int, int] = {}

    def root(key: int) -> int:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for node in state.graph.nodes:
        alike = _alike(state, node) or []
        for tensor in alike[1:]:
            parent[root(id(tensor))] = root(id(alike[0]))
    groups: dict[int, _Group] = {}
    for tensor in ir.tensors(state.graph):
        channels = static_axis(tensor, 1)
        if channels is not None and not ir.is_constant(tensor):
            groups.setdefault(root(id(tensor)), _Group(channels)).tensors[id(tensor)] = tensor
    fixed = _fixed(state.graph)
    for group in groups.values():
        _look_around(state, group, fixed)
    return list(groups.values())


def _fixed(graph: Graph) -> set[int]:
    """The tensors whose shapes are seen from outside: inputs, outputs, and what subgraphs read."""
    return {id(t) for t in (*graph.inputs, *graph.outputs, *(c for n in graph.nodes for c in ir.captures(n)))}


def _look_around(state: CompileState, group: _Group, fixed: set[int]) -> None:
    """Note who makes and reads the tensors of a group, and what of that keeps it from being padded."""
    members: dict[int, Node] = {}
    for tensor in group.tensors.values():
        if id(tensor) in fixed:
            group.obstacle = Refusal("an input, an output or a subgraph has these channels", tensor.name)
        for node in (*tensor.inputs, *tensor.outputs):
            members[id(node)] = node
            if not _is_dense(node) and _alike(state, node) is None:
                group.obstacle = Refusal(f"{node.op} cannot be padded", node.name)
    group.members = list(members.values())


def _is_dense(node: Node) -> bool:
    return _is_conv(node) and node.attrs.get("group", 1) == 1


def _is_depthwise(node: Node) -> bool:
    if not _is_conv(node) or node.attrs.get("group", 1) == 1:
        return False
    outputs, inputs = ir.array(node.inputs[1]).shape[:2]
    return bool(inputs == 1 and outputs == node.attrs["group"])


def _is_conv(node: Node) -> bool:
    return node.op == "Conv" and not node.domain and all(ir.is_constant(t) for t in node.inputs[1:])


_POOLS = {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"}


def _alike(state: CompileState, node: Node) -> list[Tensor] | None:
    """The tensors that have the same channels because of the node, or None if it does not treat each channel by itself."""
    rule = state.ops.get(op_key(node.op, node.domain))
    lowering = Lowering.NONE if rule is None else rule.lowering
    single = node.op in _POOLS or lowering in (Lowering.TABLE, Lowering.CLIP)
    if _is_depthwise(node) or (single and len(node.outputs) == 1):
        return [node.inputs[0], node.outputs[0]]
    result = node.outputs[0]
    channels, rank = static_axis(result, 1), len(ir.shape(result) or ())
    if lowering not in (Lowering.ADD, Lowering.MUL) or channels is None:
        return None
    for tensor in node.inputs:
        shape = ir.shape(tensor) or ()
        axis = _channel_axis(shape, rank)
        varies = not ir.is_constant(tensor)
        if (
            (varies and len(shape) != rank)
            or (axis is not None and shape[axis] != channels)
            or (varies and axis is None)
        ):
            return None
    return [*(t for t in node.inputs if not ir.is_constant(t)), result]


def _channel_axis(shape: Sequence[object], rank: int) -> int | None:
    """The axis of an operand that runs along the channels; None if one number serves all of them."""
    axis = len(shape) - rank + 1
    return axis if axis >= 0 and shape[axis] != 1 else None


def _pad(rewriter: Rewriter, group: _Group, count: int) -> None:
    """Pad all tensors of a group to `count` channels."""
    copies = np.arange(count) % group.channels
    for node in group.members:
        if _is_depthwise(node):
            node.attrs["group"] = count
            _take(rewriter, node, range(1, len(node.inputs)), copies, 0)
        elif _is_dense(node):
            if group.holds(node.outputs[0]):
                _take(rewriter, node, range(1, len(node.inputs)), copies, 0)
            if group.holds(node.inputs[0]):
                weight = ir.array(node.inputs[1])
                zeros = [(0, 0), (0, count - group.channels), *[(0, 0)] * (weight.ndim - 2)]
                rewriter.set_input(node, 1, rewriter.constant(node.inputs[1].name, np.pad(weight, zeros)))
        else:
            rank = len(ir.shape(node.outputs[0]) or ())
            for index, tensor in enumerate(node.inputs):
                array = ir.value(tensor)
                axis = None if array is None else _channel_axis(array.shape, rank)
                if axis is not None and array is not None and array.shape[axis] == group.channels:
                    _take(rewriter, node, [index], copies, axis)
    for tensor in group.tensors.values():
        shape = list(ir.shape(tensor) or ())
        tensor.shape = [shape[0], count, *shape[2:]]


def _take(rewriter: Rewriter, node: Node, inputs: Iterable[int], channels: NDArray[np.int64], axis: int) -> None:
    for index in inputs:
        tensor = node.inputs[index]
        if not tensor.is_empty():
            taken = np.take(ir.array(tensor), channels, axis=axis)
            rewriter.set_input(node, index, rewriter.constant(tensor.name, taken))
