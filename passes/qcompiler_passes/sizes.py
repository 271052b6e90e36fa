"""Values of small integer tensors that exporters compute from shapes, element by element: some may be known, others not.

An element is a number, a symbol (a size that is not known but is at least 0; equal symbols are equal sizes), or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Graph, Node, Tensor
from qcompiler.shapes import kind

Element: TypeAlias = int | float | str | None
Elements: TypeAlias = NDArray[np.object_]

MAX_ELEMENTS = 64
EXACT_IN_FLOAT = 2**24


def dims(tensor: Tensor) -> Elements | None:
    """The shape of a tensor as elements, or None if its rank is unknown."""
    known = ir.shape(tensor)
    if known is None:
        return None
    return _objects([f"{tensor.name}[{i}]" if d is None else d for i, d in enumerate(known)])


def is_known(elements: Elements) -> bool:
    """Whether every element is a number."""
    return all(isinstance(e, (int, float)) for e in elements.flat)


@dataclass
class Sizes:
    """The elements of the tensors of a graph, as far as they follow from shapes and constants.

    Nothing is known before opset 13: axes and bounds were attributes then.
    """

    graph: Graph
    _found: dict[int, Elements] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.graph.nodes if self.graph.opset >= 13 else ():
            rule = None if node.domain else RULES.get(node.op)
            if rule is None or kind(node.outputs[0]) not in ("f", "i", "b"):
                continue
            found = rule(self, node)
            if found is not None and found.size <= MAX_ELEMENTS:
                self._found[id(node.outputs[0])] = found

    def of(self, tensor: Tensor) -> Elements | None:
        """The elements of a tensor, or None if nothing is known."""
        if ir.is_constant(tensor) and math.prod(tensor.shape) <= MAX_ELEMENTS and kind(tensor) in ("f", "i", "b"):
            return _objects(np.asarray(ir.value(tensor)).tolist())
        return self._found.get(id(tensor))

    def integers(self, node: Node, index: int, default: list[int] | None = None) -> list[int] | None:
        """Input `index` as a list, if all of it is known; `default` if it is left out."""
        tensor = ir.optional_input(node, index)
        if tensor is None:
            return default
        elements = self.of(tensor)
        if elements is None or not is_known(elements):
            return None
        return [int(e) for e in elements.flat]


def _objects(nested: Any) -> Elements:
    return np.array(nested, dtype=np.object_)


def _shape(sizes: Sizes, node: Node) -> Elements | None:
    elements = dims(node.inputs[0])
    return None if elements is None else elements[node.attrs.get("start", 0) : node.attrs.get("end")]


def _same(sizes: Sizes, node: Node) -> Elements | None:
    return sizes.of(node.inputs[0])


def _gather(sizes: Sizes, node: Node) -> Elements | None:
    data, indices = sizes.of(node.inputs[0]), sizes.of(node.inputs[1])
    if data is None or indices is None or not is_known(indices):
        return None
    return _objects(np.take(data, indices.astype(np.int64), axis=node.attrs.get("axis", 0)))


def _slice(sizes: Sizes, node: Node) -> Elements | None:
    data = sizes.of(node.inputs[0])
    starts, ends = sizes.integers(node, 1), sizes.integers(node, 2)
    if data is None or starts is None or ends is None:
        return None
    axes = sizes.integers(node, 3, list(range(len(starts))))
    steps = sizes.integers(node, 4, [1] * len(starts))
    if axes is None or steps is None:
        return None
    window = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        before_first = step < 0 and end < -data.shape[axis]
        window[axis] = slice(start, None if before_first else end, step)
    return data[tuple(window)]


def _concat(sizes: Sizes, node: Node) -> Elements | None:
    parts = [sizes.of(t) for t in node.inputs]
    known = [p for p in parts if p is not None]
    return np.concatenate(known, axis=node.attrs["axis"]) if len(known) == len(parts) else None


def _unsqueeze(sizes: Sizes, node: Node) -> Elements | None:
    data, axes = sizes.of(node.inputs[0]), sizes.integers(node, 1)
    return None if data is None or axes is None else _objects(np.expand_dims(data, tuple(axes)))


def _squeeze(sizes: Sizes, node: Node) -> Elements | None:
    data = sizes.of(node.inputs[0])
    axes = sizes.integers(node, 1, [])
    return None if data is None or axes is None else _objects(np.squeeze(data, tuple(axes) or None))


def _reshape(sizes: Sizes, node: Node) -> Elements | None:
    data, shape = sizes.of(node.inputs[0]), sizes.integers(node, 1)
    return None if data is None or shape is None or 0 in shape else data.reshape(shape)


def _map(function: Callable[..., Element], *arrays: Elements) -> Elements:
    return _objects(np.frompyfunc(function, len(arrays), 1)(*arrays))


def _cast(sizes: Sizes, node: Node) -> Elements | None:
    data = sizes.of(node.inputs[0])
    source, target = kind(node.inputs[0]), kind(node.outputs[0])
    if data is None or source not in ("f", "i") or target not in ("f", "i"):
        return None

    def cast(e: Element) -> Element:
        if isinstance(e, str):
            return f"int({e})" if (source, target) == ("f", "i") else e
        if e is None or (abs(e) > EXACT_IN_FLOAT and "f" in (source, target)):
            return None
        return int(e) if target == "i" else float(e)

    return _map(cast, data)


def _rounding(function: Callable[[float], int]) -> Callable[[Sizes, Node], Elements | None]:
    def rule(sizes: Sizes, node: Node) -> Elements | None:
        data = sizes.of(node.inputs[0])
        if data is None:
            return None
        name = function.__name__
        return _map(lambda e: f"{name}({e})" if isinstance(e, str) else None if e is None else float(function(e)), data)

    return rule


def _binary(symbolic: Callable[[Element, Element], Element], op: str) -> Callable[[Sizes, Node], Elements | None]:
    """A rule that computes in the type of the output, and asks `symbolic` where an operand is no number."""

    def rule(sizes: Sizes, node: Node) -> Elements | None:
        a, b = sizes.of(node.inputs[0]), sizes.of(node.inputs[1])
        if a is None or b is None:
            return None
        dtype = np.dtype(node.outputs[0].dtype)

        def compute(x: Element, y: Element) -> Element:
            if isinstance(x, (int, float)) and isinstance(y, (int, float)):
                return _number(op, x, y, dtype)
            return symbolic(x, y)

        return _map(compute, a, b)

    return rule


def _number(op: str, x: float, y: float, dtype: np.dtype[Any]) -> Element:
    if op == "div" and (y == 0 or dtype.kind == "i"):
        return None if y == 0 else int(math.copysign(abs(x) // abs(y), x * y))
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[op]
    result = function(dtype.type(x), dtype.type(y)).item()
    return result if isinstance(result, (int, float)) and math.isfinite(result) else None


def _is_size(e: Element) -> bool:
    return isinstance(e, str) or (e is not None and e >= 0)


def _add(x: Element, y: Element) -> Element:
    if 0 in (x, y):
        return y if x == 0 else x
    return "+".join(sorted(f"({e})" for e in (x, y))) if _is_size(x) and _is_size(y) else None


def _sub(x: Element, y: Element) -> Element:
    if y == 0:
        return x
    return 0 if x is not None and x == y else None


def _mul(x: Element, y: Element) -> Element:
    if 1 in (x, y):
        return y if x == 1 else x
    return "*".join(sorted(f"({e})" for e in (x, y))) if _is_size(x) and _is_size(y) else None


def _div(x: Element, y: Element) -> Element:
    if y == 1:
        return x
    return f"({x})/({y})" if isinstance(x, str) and isinstance(y, (int, float)) and y > 0 else None


def _equal(sizes: Sizes, node: Node) -> Elements | None:
    a, b = sizes.of(node.inputs[0]), sizes.of(node.inputs[1])

    def compare(x: Element, y: Element) -> bool | None:
        if x is None or y is None:
            return None
        if x == y:
            return True
        return None if (isinstance(x, str) and _is_size(y)) or (isinstance(y, str) and _is_size(x)) else False

    return None if a is None or b is None else _map(compare, a, b)


def _where(sizes: Sizes, node: Node) -> Elements | None:
    condition, a, b = (sizes.of(t) for t in node.inputs)
    if condition is None or a is None or b is None:
        return None
    return _map(lambda c, x, y: None if c is None else x if c else y, condition, a, b)


RULES: dict[str, Callable[[Sizes, Node], Elements | None]] = {
    "Add": _binary(_add, "add"),
    "Cast": _cast,
    "Ceil": _rounding(math.ceil),
    "Concat": _concat,
    "Div": _binary(_div, "div"),
    "Equal": _equal,
    "Floor": _rounding(math.floor),
    "Gather": _gather,
    "Identity": _same,
    "Mul": _binary(_mul, "mul"),
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _binary(_sub, "sub"),
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
