"""The one door to onnx-graphsurgeon: import, export, order, consumers and constants.

graphsurgeon compares tensors by name and nodes by content, and its lists keep back links by such comparisons. So this module
rewires by identity, and nothing else in qcompiler touches the links.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from qcompiler import detached, functions, value_types

Graph = gs.Graph
Node = gs.Node
Tensor = gs.Tensor
Variable = gs.Variable
Constant = gs.Constant

G_LOGGER.severity = G_LOGGER.CRITICAL  # it prints; what matters is raised

IR_VERSION = 10
CONTRIB_DOMAIN = "com.microsoft"


def from_proto(model: onnx.ModelProto) -> Graph:
    """Import a model. qcompiler's own functions are left out: `to_proto` adds those that are used."""
    graph = gs.import_onnx(model)
    value_types.attach(graph, model.graph)
    _attach_weights(graph)
    graph.functions = [f for f in graph.functions if f.domain != functions.DOMAIN]
    return graph


def to_proto(graph: Graph, metadata: dict[str, str] | None = None) -> onnx.ModelProto:
    """Export a graph with the functions that it calls and the model metadata."""
    graph.import_domains = _import_domains(graph)
    with _detached_weights(graph):
        model = gs.export_onnx(graph, do_type_check=False)
    value_types.write(graph, model.graph)
    model.ir_version = IR_VERSION
    called = {n.op for g in all_graphs(graph) for n in g.nodes if n.domain == functions.DOMAIN}
    model.functions.extend(functions.proto(name, graph.opset) for name in sorted(called))
    for key, value in sorted((metadata or {}).items()):
        model.metadata_props.add(key=key, value=value)
    return model


def _attach_weights(graph: Graph) -> None:
    """Let the constants whose data is beside the proto hold those arrays themselves."""
    for tensor in tensors(graph):
        if isinstance(tensor, gs.Constant) and isinstance(tensor._values, LazyValues):
            lazy = tensor._values.tensor
            if detached.is_detached(lazy):
                tensor.values, tensor.data_location = detached.array_of(lazy), None


@contextmanager
def _detached_weights(graph: Graph) -> Iterator[None]:
    """While a model that is too large for a proto is exported, its large constants are references."""
    constants = [t for t in tensors(graph) if isinstance(t, gs.Constant)]
    large = [t for t in constants if isinstance(t._values, np.ndarray) and t._values.nbytes >= detached.LARGE]
    if not detached.exceeds(t._values for t in constants):
        large = []
    arrays = [np.ascontiguousarray(t.values) for t in large]
    try:
        for tensor, array in zip(large, arrays, strict=True):
            tensor.values = LazyValues(detached.refer(tensor.name, array))
        yield
    finally:
        for tensor, array in zip(large, arrays, strict=True):
            tensor.values = array


def _import_domains(graph: Graph) -> list[onnx.OperatorSetIdProto]:
    """The operator sets in use: the model's own versions, version 1 for domains that passes brought in."""
    known = {d.domain or "": d.version for d in graph.import_domains or []}
    known["" if "" in known or "ai.onnx" not in known else "ai.onnx"] = graph.opset
    used = {n.domain or "" for g in all_graphs(graph) for n in g.nodes}
    used |= {d.domain for f in graph.functions for d in f.import_domains} if graph.functions else set()
    used |= {f.domain for f in graph.functions} | {""}
    return [onnx.helper.make_opsetid(d, known.get(d, 1)) for d in sorted(used - {"ai.onnx"})]


def all_graphs(graph: Graph) -> Iterator[Graph]:
    """The graph and every subgraph in its nodes, at any depth."""
    yield graph
    for node in graph.nodes:
        for attribute in node.attrs.values():
            if isinstance(attribute, gs.Graph):
                yield from all_graphs(attribute)


def has_subgraph(node: Node) -> bool:
    """Whether the node holds a graph (If, Loop, Scan)."""
    return any(isinstance(a, gs.Graph) for a in node.attrs.values())


def captures(node: Node) -> list[Tensor]:
    """The tensors from outside that the node's subgraphs may read: all that is named, but not made, inside them."""
    found: dict[int, Tensor] = {}
    made: set[int] = set()
    for attribute in node.attrs.values():
        for inner in all_graphs(attribute) if isinstance(attribute, gs.Graph) else ():
            made.update(id(t) for t in inner.inputs)
            found.update((id(t), t) for t in inner.outputs)
            for inner_node in inner.nodes:
                made.update(id(t) for t in inner_node.outputs)
                found.update((id(t), t) for t in inner_node.inputs)
    return [tensor for key, tensor in found.items() if key not in made]


def producer(tensor: Tensor) -> Node | None:
    """The node that writes the tensor, or None for inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def is_constant(tensor: Tensor) -> bool:
    """Whether the value is known."""
    return isinstance(tensor, gs.Constant)


def value(tensor: Tensor) -> NDArray[Any] | None:
    """The value of a constant tensor, or None."""
    return tensor.values if isinstance(tensor, gs.Constant) else None


def constant_proto(constant: Constant) -> onnx.TensorProto:
    """A constant as a proto; one that was not read yet stays so, for strings do not survive it."""
    lazy = constant._values
    return lazy.tensor if isinstance(lazy, LazyValues) else numpy_helper.from_array(np.asarray(lazy))


def array(tensor: Tensor) -> NDArray[Any]:
    """The value of a tensor that must be a constant. Raises TypeError for a variable."""
    known = value(tensor)
    if known is None:
        raise TypeError(f"tensor {tensor.name!r} is not a constant")
    return known


def scalar(tensor: Tensor) -> float | None:
    """The value of a constant with one element, or None."""
    known = value(tensor)
    return float(known.reshape(-1)[0]) if known is not None and known.size == 1 else None


def optional_input(node: Node, index: int) -> Tensor | None:
    """Input `index`, or None where it is left out."""
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    return node.inputs[index]


def is_output(graph: Graph, tensor: Tensor) -> bool:
    """Whether the tensor is an output of this graph."""
    return any(t is tensor for t in graph.outputs)


def set_input(node: Node, index: int, tensor: Tensor) -> None:
    """Make `tensor` the node's input `index`; back links are mended by identity."""
    old = node.inputs[index]
    list.__setitem__(node.inputs, index, tensor)
    _unlink(old.outputs, node)
    list.append(tensor.outputs, node)


def add_input(node: Node, tensor: Tensor) -> None:
    """Append an input."""
    list.append(node.inputs, tensor)
    list.append(tensor.outputs, node)


def take_output(node: Node, index: int, tensor: Tensor) -> None:
    """Make `node` the producer of `tensor` as its output `index`; the former producer loses it."""
    former = producer(tensor)
    if former is not None:
        position = next(i for i, t in enumerate(former.outputs) if t is tensor)
        list.__setitem__(former.outputs, position, gs.Variable.empty())
    old = node.outputs[index]
    _unlink(old.inputs, node)
    list.__setitem__(node.outputs, index, tensor)
    list.clear(tensor.inputs)
    list.append(tensor.inputs, node)


def detach(node: Node) -> None:
    """Cut all links of the node."""
    for tensor in node.inputs:
        _unlink(tensor.outputs, node)
    for tensor in node.outputs:
        _unlink(tensor.inputs, node)
    list.clear(node.inputs)
    list.clear(node.outputs)


def _unlink(links: list[Node], node: Node) -> None:
    for i, linked in enumerate(links):
        if linked is node:
            list.pop(links, i)
            return


def toposort(graph: Graph) -> None:
    """Order nodes so that producers come first; stable, iterative, subgraph captures included.

    The readers of each tensor get the order of the nodes, as in a graph that was just imported, so that what passes do does
    not depend on edits of the past. Raises ValueError if the graph has a cycle.
    """
    position = {id(n): i for i, n in enumerate(graph.nodes)}
    waits: list[int] = [0] * len(graph.nodes)
    feeds: list[list[int]] = [[] for _ in graph.nodes]
    for i, node in enumerate(graph.nodes):
        for tensor in {id(t): t for t in (*node.inputs, *captures(node))}.values():
            for source in tensor.inputs:
                j = position.get(id(source))
                if j is not None:
                    waits[i] += 1
                    feeds[j].append(i)
    ready = [i for i, count in enumerate(waits) if count == 0]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for j in feeds[i]:
            waits[j] -= 1
            if waits[j] == 0:
                heapq.heappush(ready, j)
    if len(order) != len(graph.nodes):
        stuck = next(n for i, n in enumerate(graph.nodes) if waits[i])
        raise ValueError(f"the graph has a cycle through node {stuck.name!r}")
    graph.nodes[:] = [graph.nodes[i] for i in order]
    _order_readers(graph)


def _order_readers(graph: Graph) -> None:
    position: dict[int, int] = {}
    for i, node in enumerate(graph.nodes):
        inner = (g for a in node.attrs.values() if isinstance(a, gs.Graph) for g in all_graphs(a))
        position |= {id(n): i for g in inner for n in g.nodes}
        position[id(node)] = i
    read = {id(t): t for node in graph.nodes for t in (*node.inputs, *captures(node))}
    for tensor in read.values():
        if len(tensor.outputs) > 1:
            list.sort(tensor.outputs, key=lambda reader: position.get(id(reader), -1))


def drop_dead_nodes(graph: Graph) -> list[Node]:
    """Remove the nodes that no output depends on, subgraph captures included; return them."""
    seen: set[int] = set()
    stack: list[Tensor] = list(graph.outputs)
    own = {id(n) for n in graph.nodes}
    while stack:
        for node in stack.pop().inputs:
            if id(node) in own and id(node) not in seen:
                seen.add(id(node))
                stack.extend(node.inputs)
                stack.extend(captures(node))
    dead = [n for n in graph.nodes if id(n) not in seen]
    if dead:
        graph.nodes[:] = [n for n in graph.nodes if id(n) in seen]
        for node in dead:
            detach(node)
    return dead


def submodel(inputs: Iterable[Tensor], outputs: Iterable[Tensor], opset: int) -> onnx.ModelProto:
    """A model of copies of the nodes that lead from `inputs` to `outputs`, of any size; constants come along.

    Raises ValueError if an output also depends on a tensor that is neither an input nor a constant.
    """
    given, wanted = list(inputs), list(outputs)
    nodes = list(reversed(_nodes_between(given, wanted)))
    made: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            known = value(tensor)
            rank = None if tensor.shape is None else [None] * len(tensor.shape)
            made[id(tensor)] = (
                Variable(tensor.name, tensor.dtype, rank) if known is None else Constant(tensor.name, known)
            )
        return made[id(tensor)]

    copies = [
        Node(n.op, n.name, dict(n.attrs), [copy(t) for t in n.inputs], [copy(t) for t in n.outputs], n.domain)
        for n in nodes
    ]
    return to_proto(Graph(copies, [copy(t) for t in given], [copy(t) for t in wanted], name="submodel", opset=opset))


def _nodes_between(given: list[Tensor], wanted: list[Tensor]) -> list[Node]:
    """The nodes that the wanted tensors need, consumers first."""
    known = {id(t) for t in given}
    order: list[Node] = []
    seen: set[int] = set()
    stack: list[tuple[Node, bool]] = [(n, False) for t in wanted if id(t) not in known for n in t.inputs]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
            continue
        if id(node) in seen:
            continue
        seen.add(id(node))
        stack.append((node, True))
        for tensor in (*node.inputs, *captures(node)):
            if id(tensor) in known or is_constant(tensor) or tensor.is_empty():
                continue
            maker = producer(tensor)
            if maker is None:
                raise ValueError(f"tensor {tensor.name!r} is neither given nor constant")
            stack.append((maker, False))
    return order[::-1]


def tensors(graph: Graph) -> Iterator[Tensor]:
    """Every tensor of this graph level, once, in order of appearance."""
    seen: set[int] = set()
    groups: Iterable[Iterable[Tensor]] = (
        graph.inputs,
        *(t for n in graph.nodes for t in (n.inputs, n.outputs)),
        graph.outputs,
    )
    for group in groups:
        for tensor in group:
            if id(tensor) not in seen and not tensor.is_empty():
                seen.add(id(tensor))
                yield tensor


def type_name(tensor: Tensor) -> str:
    """The element type: NumPy's name, ONNX's for types that NumPy lacks (`bfloat16`), `?` if it is unknown or no tensor's."""
    if isinstance(tensor.dtype, int):
        return str(onnx.TensorProto.DataType.Name(tensor.dtype)).lower()
    return "?" if tensor.dtype is None else np.dtype(tensor.dtype).name


def shape(tensor: Tensor) -> tuple[int | str | None, ...] | None:
    """The static shape where known: ints, names of dynamic axes, None for unnamed ones; None if even the rank is unknown."""
    known = tensor.shape
    return None if known is None else tuple(known)


def static_shape(tensor: Tensor) -> tuple[int, ...] | None:
    """The shape if every axis is known, else None."""
    known = shape(tensor)
    if known is None or not all(isinstance(d, int) for d in known):
        return None
    return tuple(int(d) for d in known)  # type: ignore[arg-type]
