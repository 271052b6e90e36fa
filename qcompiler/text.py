"""A graph as text, one line per node, and fingerprints of arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Graph, Tensor


def format_graph(graph: Graph) -> str:
    """One line per node: `output = Op{attribute=value}(inputs)`; constants show their type and shape."""
    lines = [f"inputs: {', '.join(_declared(t) for t in graph.inputs)}"]
    for node in graph.nodes:
        attrs = ", ".join(f"{k}={_attribute(v)}" for k, v in sorted(node.attrs.items()))
        outputs = ", ".join(t.name or "_" for t in node.outputs)
        inputs = ", ".join(_operand(t) for t in node.inputs)
        domain = f"{node.domain}." if node.domain else ""
        lines.append(f"{outputs} = {domain}{node.op}{'{' + attrs + '}' if attrs else ''}({inputs})")
    return "\n".join([*lines, f"outputs: {', '.join(_declared(t) for t in graph.outputs)}"]) + "\n"


def _declared(tensor: Tensor) -> str:
    dims = ir.shape(tensor)
    return f"{tensor.name}:{ir.type_name(tensor)}{'[?]' if dims is None else _dims(dims)}"


def _dims(dims: Iterable[Any]) -> str:
    return "[" + ",".join("?" if d is None else str(d) for d in dims) + "]"


def _operand(tensor: Tensor) -> str:
    if tensor.is_empty():
        return "_"
    known = ir.value(tensor)
    if known is None:
        return tensor.name
    if known.size == 1:
        return f"{known.reshape(-1)[0]:g}"
    return f"{known.dtype.name}{_dims(known.shape)}#{digest(known)[:6]}"


def _attribute(attribute: Any) -> str:
    if isinstance(attribute, Graph):
        return f"graph<{len(attribute.nodes)} nodes>"
    if isinstance(attribute, Tensor):
        return _operand(attribute)
    return str(attribute).replace(" ", "")


def digest(values: NDArray[Any]) -> str:
    """A hexadecimal fingerprint of an array: type, shape and bytes."""
    head = f"{values.dtype.str}{values.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(values).tobytes()).hexdigest()
