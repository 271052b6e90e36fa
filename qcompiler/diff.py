"""What differs between two models, as data and as text: what a pass did, if they are the dumps before and after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Graph, Node, Tensor
from qcompiler.ops import op_key
from qcompiler.text import digest

Array = NDArray[Any]

OWN_METADATA = "qcompiler."
"""Metadata that compilation writes; it says where a model came from, not what it is."""


@dataclass(frozen=True)
class NodeChange:
    """A node that is in one model only (`before` or `after` is None), or in both with `changes`, a line each."""

    name: str
    before: str | None
    after: str | None
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Values:
    """A constant: its type with the shape, and over all elements min, max and mean (None if it has no finite numbers)."""

    type: str
    min: float | None = None
    max: float | None = None
    mean: float | None = None

    def __str__(self) -> str:
        return self.type if self.min is None else f"{self.type}  {self.min:.6g} .. {self.max:.6g}  mean {self.mean:.6g}"


@dataclass(frozen=True)
class ConstantChange:
    """A constant that is in one model only, or in both with other values.

    `name`: in the first model that has it; `renamed`: in the second, if that differs. Where the shapes agree, `changed` elements
    differ, by at most `max_abs_difference`.
    """

    name: str
    renamed: str | None
    before: Values | None
    after: Values | None
    changed: int | None = None
    elements: int | None = None
    max_abs_difference: float | None = None


@dataclass(frozen=True)
class ModelDiff:
    """All differences. `interface`: lines on inputs, outputs, opsets and metadata. `same_nodes`: how many nodes are as before."""

    interface: tuple[str, ...]
    nodes: tuple[NodeChange, ...]
    constants: tuple[ConstantChange, ...]
    same_nodes: int

    def __bool__(self) -> bool:
        return bool(self.interface or self.nodes or self.constants)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"same": not self, **asdict(self)}

    def lines(self) -> Iterator[str]:
        """The text: `-` only before, `+` only after, `~` changed."""
        yield from self.interface
        if self.nodes:
            counts = [sum(_kind(n) == kind for n in self.nodes) for kind in "-+~"]
            yield "nodes: {} removed, {} added, {} changed, {} the same".format(*counts, self.same_nodes)
        for node in self.nodes:
            if node.changes:
                yield f"  ~ {node.name}"
                yield from (f"      {change}" for change in node.changes)
            else:
                yield f"  {_kind(node)} {node.name}: {node.before or node.after}"
        if self.constants:
            counts = [sum(_kind(c) == kind for c in self.constants) for kind in "-+~"]
            yield "constants: {} removed, {} added, {} changed".format(*counts)
        for constant in self.constants:
            yield from _constant_lines(constant)


def _kind(change: NodeChange | ConstantChange) -> str:
    return "+" if change.before is None else "-" if change.after is None else "~"


def _constant_lines(constant: ConstantChange) -> Iterator[str]:
    if constant.before is None or constant.after is None:
        yield f"  {_kind(constant)} {constant.name}  {constant.before or constant.after}"
        return
    count = "" if constant.changed is None else f"  {constant.changed} of {constant.elements} elements"
    far = "" if constant.max_abs_difference is None else f", by up to {constant.max_abs_difference:.6g}"
    yield f"  ~ {constant.name}{f' -> {constant.renamed}' if constant.renamed else ''}{count}{far}"
    yield f"      - {constant.before}"
    yield f"      + {constant.after}"


def diff(before: onnx.ModelProto, after: onnx.ModelProto) -> ModelDiff:
    """Compare two models: nodes by name, else by operator and first output; constants by name, else by their reader.

    The order of nodes, value types inside the graph and qcompiler's own metadata do not count.
    """
    a, b = ir.from_proto(before), ir.from_proto(after)
    pairs = _paired_nodes(_nodes(a), _nodes(b))
    partner = _paired_constants(pairs, _constants(a), _constants(b))
    nodes, same = [], 0
    for x, y in pairs:
        if x is None or y is None:
            node = x or y
            assert node is not None
            nodes.append(NodeChange(node.name, None if x is None else _text(x), None if y is None else _text(y)))
        elif changes := tuple(_changes(x, y, partner)):
            nodes.append(NodeChange(y.name, _text(x), _text(y), changes))
        else:
            same += 1
    constants = _constant_changes(_constants(a), _constants(b), partner)
    return ModelDiff(tuple(_interface(before, after, a, b)), tuple(nodes), tuple(constants), same)


def _nodes(graph: Graph) -> dict[tuple[str, int], Node]:
    """All nodes, subgraphs included, by name and by how many of that name came before."""
    seen: dict[str, int] = {}
    found = {}
    for node in (n for g in ir.all_graphs(graph) for n in g.nodes):
        count = seen[node.name] = seen.get(node.name, -1) + 1
        found[node.name, count] = node
    return found


def _paired_nodes(
    a: Mapping[tuple[str, int], Node], b: Mapping[tuple[str, int], Node]
) -> list[tuple[Node | None, Node | None]]:
    """The nodes of both models: pairs, those of the first alone, and those of the second alone, in the order of the models."""
    by_output = {_result(n): key for key, n in b.items() if key not in a or not key[0]}
    partner = {key: key for key in a if key in b and key[0]}
    for key, node in a.items():
        if key not in partner and _result(node) in by_output:
            partner[key] = by_output.pop(_result(node))
    taken = set(partner.values())
    alone = [(None, node) for key, node in b.items() if key not in taken]
    return [*((node, b[partner[key]] if key in partner else None) for key, node in a.items()), *alone]


def _result(node: Node) -> tuple[str, str]:
    """The operator and the first tensor that the node writes."""
    return op_key(node.op, node.domain), node.outputs[0].name if node.outputs else ""


def _constants(graph: Graph) -> dict[str, Array]:
    """The values of all constants by name, subgraphs included."""
    found = (t for g in ir.all_graphs(graph) for t in ir.tensors(g))
    return {t.name: known for t in found if (known := ir.value(t)) is not None}


def _paired_constants(
    pairs: Iterable[tuple[Node | None, Node | None]], a: Mapping[str, Array], b: Mapping[str, Array]
) -> dict[str, str]:
    """Constants of the first model to those of the second."""
    partner = {name: name for name in a if name in b}
    taken = set(partner)
    for x, y in pairs:
        for s, t in zip(x.inputs, y.inputs, strict=False) if x and y else ():
            if s.name in a and t.name in b and s.name not in partner and t.name not in taken:
                partner[s.name] = t.name
                taken.add(t.name)
    return partner


def _changes(a: Node, b: Node, partner: Mapping[str, str]) -> Iterator[str]:
    """How two nodes differ; constants whose values differ are told elsewhere."""
    if a.name != b.name:
        yield f"name: {a.name} -> {b.name}"
    if (old := op_key(a.op, a.domain)) != (new := op_key(b.op, b.domain)):
        yield f"operator: {old} -> {new}"
    for key in sorted({*a.attrs, *b.attrs}):
        x, y = (_attribute(node.attrs[key]) if key in node.attrs else "none" for node in (a, b))
        if x != y:
            yield f"{key}: {x} -> {y}"
    for what, xs, ys in (("input", a.inputs, b.inputs), ("output", a.outputs, b.outputs)):
        for i in range(max(len(xs), len(ys))):
            old, new = (str(tensors[i].name) if i < len(tensors) else "" for tensors in (xs, ys))
            if old != new and partner.get(old) != new:
                yield f"{what} {i}: {old or 'none'} -> {new or 'none'}"


def _attribute(value: Any) -> str:
    if isinstance(value, Graph):
        return f"graph of {len(value.nodes)} nodes"  # they are compared one by one
    known = ir.value(value) if isinstance(value, Tensor) else None
    return f"{_values(known)}  #{digest(known)[:6]}" if known is not None else str(value)


def _text(node: Node) -> str:
    inputs = ", ".join(t.name or "_" for t in node.inputs)
    outputs = ", ".join(t.name or "_" for t in node.outputs)
    return f"{outputs} = {op_key(node.op, node.domain)}({inputs})"


def _values(values: Array) -> Values:
    kind = f"{values.dtype.name}[{','.join(map(str, values.shape))}]"
    numbers = _numbers(values)
    finite = None if numbers is None else numbers[np.isfinite(numbers)]
    if finite is None or not finite.size:
        return Values(kind)
    return Values(kind, float(finite.min()), float(finite.max()), float(finite.mean()))


def _numbers(values: Array) -> NDArray[np.float64] | None:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError):  # text
        return None


def _constant_changes(
    a: Mapping[str, Array], b: Mapping[str, Array], partner: Mapping[str, str]
) -> Iterator[ConstantChange]:
    for name, old in a.items():
        if name not in partner:
            yield ConstantChange(name, None, _values(old), None)
        elif digest(old) != digest(new := b[partner[name]]):
            renamed = None if partner[name] == name else partner[name]
            yield ConstantChange(name, renamed, _values(old), _values(new), *_distance(old, new))
        elif partner[name] != name:
            continue  # another name for the same values
    taken = set(partner.values())
    yield from (ConstantChange(name, None, None, _values(new)) for name, new in b.items() if name not in taken)


def _distance(old: Array, new: Array) -> tuple[int | None, int | None, float | None]:
    """How many elements differ, of how many, and the largest difference; None where the shapes differ."""
    if old.shape != new.shape:
        return None, None, None
    x, y = _numbers(old), _numbers(new)
    if x is None or y is None:
        return int(np.count_nonzero(old != new)), old.size, None
    differs = (old != new) & ~(np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore"):
        gap = np.abs(x - y)[differs]
    finite = gap[np.isfinite(gap)]
    return int(np.count_nonzero(differs)), old.size, float(finite.max()) if finite.size else None


def _interface(before: onnx.ModelProto, after: onnx.ModelProto, a: Graph, b: Graph) -> Iterator[str]:
    for what, old, new in (("input", a.inputs, b.inputs), ("output", a.outputs, b.outputs)):
        x, y = [_declared(t) for t in old], [_declared(t) for t in new]
        yield from (f"{what} - {text}" for text in x if text not in y)
        yield from (f"{what} + {text}" for text in y if text not in x)
        if sorted(x) == sorted(y) and x != y:
            yield f"{what}s in another order: {', '.join(x)} -> {', '.join(y)}"
    opsets = [{d.domain or "ai.onnx": d.version for d in model.opset_import} for model in (before, after)]
    yield from _table_changes("opset", *opsets)
    metadata = [{p.key: p.value for p in model.metadata_props} for model in (before, after)]
    yield from _table_changes(
        "metadata", *({k: v for k, v in m.items() if not k.startswith(OWN_METADATA)} for m in metadata)
    )


def _declared(tensor: Tensor) -> str:
    dims = ir.shape(tensor)
    text = "?" if dims is None else ",".join("?" if d is None else str(d) for d in dims)
    return f"{tensor.name}: {ir.type_name(tensor)}[{text}]"


def _table_changes(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys((*old, *new)):
        if old.get(key) != new.get(key):
            yield f"{what} {key}: {old.get(key, 'none')} -> {new.get(key, 'none')}"
