"""Matchers for arithmetic that exporters wrote out, whatever its order and association."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.rewrite import Refusal, Rewriter, Rule

_ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Pow"}
_MAX_DEGREE = 3
_MAX_DEPTH = 8  # bounds the search where two long chains meet, as in a residual network

_LAYERS = frozenset(
    {"Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "LayerNormalization", "MatMul", "RNN", "Softmax"}
)
_MOST_NODES = 256

NO_MATCH = Refusal("no known pattern ends here")


def first_of(*rules: Rule) -> Rule:
    """The first of the rules that rewrites a node; else the first refusal that names a culprit."""

    def rule(rewriter: Rewriter, node: Node) -> Refusal | None:
        found = NO_MATCH
        for candidate in rules:
            refusal = candidate(rewriter, node)
            if refusal is None:
                return None
            found = found if found.culprit else refusal
        return found

    return rule


def near(number: float, wanted: float) -> bool:
    """Whether a constant is the wanted one, as far as exporters print digits."""
    return abs(number - wanted) <= max(1e-4 * abs(wanted), 1e-6)


def made_by(tensor: Tensor, op: str) -> Node | None:
    """The producer of the tensor if it is the standard operator `op`."""
    node = ir.producer(tensor)
    return node if node is not None and node.op == op and not node.domain else None


def is_aside(tensor: Tensor) -> bool:
    """Whether a tensor depends on no layer, or only on the shape of what layers give."""
    pending, seen = [tensor], set[int]()
    while pending:
        maker = ir.producer(pending.pop())
        if maker is None or id(maker) in seen or maker.op in ("Shape", "Size"):
            continue
        if maker.op in _LAYERS or maker.domain or ir.has_subgraph(maker) or len(seen) == _MOST_NODES:
            return False
        seen.add(id(maker))
        pending += maker.inputs
    return True


def static_axis(tensor: Tensor, axis: int) -> int | None:
    """The length of one axis, where it is known."""
    shape = ir.shape(tensor)
    if not shape or not -len(shape) <= axis < len(shape):
        return None
    length = shape[axis]
    return length if isinstance(length, int) and length > 0 else None


def scalar_operand(node: Node, index: int) -> float | None:
    """The number that input `index` of a binary operator is; None if it is none, or adds axes to the other operand."""
    if len(node.inputs) != 2:
        return None
    array, shape = ir.value(node.inputs[index]), ir.shape(node.inputs[1 - index])
    if array is None or array.size != 1 or array.ndim > (0 if shape is None else len(shape)):
        return None
    return float(array.reshape(-1)[0])


def squared(tensor: Tensor) -> Tensor | None:
    """t, if the tensor is t * t."""
    node = ir.producer(tensor)
    if node is None or node.domain or len(node.inputs) != 2:
        return None
    is_square = node.op == "Mul" and node.inputs[0] is node.inputs[1]
    return node.inputs[0] if is_square or (node.op == "Pow" and scalar_operand(node, 1) == 2) else None


def polynomial(tensor: Tensor, of: Tensor, nodes: list[Node], depth: int = _MAX_DEPTH) -> Polynomial | None:
    """The tensor as a polynomial of degree 3 or less of another one; None if it is not computed so.

    The nodes that compute it are appended to `nodes`.
    """
    if tensor is of:
        return Polynomial([0.0, 1.0])
    node = ir.producer(tensor)
    if node is None or depth == 0 or not _is_arithmetic(node):
        return None
    terms: list[Polynomial] = []
    for index, operand in enumerate(node.inputs):
        number = scalar_operand(node, index)
        term = polynomial(operand, of, nodes, depth - 1) if number is None else Polynomial([number])
        if term is None:
            return None
        terms.append(term)
    nodes.append(node)
    result = _evaluate(node.op, *terms)
    return None if result is None or result.degree() > _MAX_DEGREE else result


def _evaluate(op: str, a: Polynomial, b: Polynomial) -> Polynomial | None:
    if op == "Add":
        return a + b
    if op == "Sub":
        return a - b
    if op == "Mul":
        return a * b
    number = float(b.coef[0])
    if b.degree() > 0:
        return None
    if op == "Div":
        return a / number if number else None
    return a ** int(number) if number in {1.0, 2.0, 3.0} else None


def has_coefficients(found: Polynomial, *wanted: float) -> bool:
    """Whether the coefficients, constant term first, are near the wanted ones."""
    coefficients = [*found.coef, *[0.0] * (len(wanted) - len(found.coef))]
    return len(coefficients) == len(wanted) and all(near(c, w) for c, w in zip(coefficients, wanted, strict=True))


def source(tensor: Tensor, through: Callable[[Tensor], bool] = lambda tensor: True) -> Tensor:
    """What is left of a tensor when the arithmetic with scalars is taken off, as long as `through` lets it pass."""
    node = ir.producer(tensor)
    while node is not None and _is_arithmetic(node) and through(tensor):
        numbers = [scalar_operand(node, i) for i in (0, 1)]
        if (numbers[0] is None) == (numbers[1] is None):
            break
        tensor = node.inputs[0 if numbers[0] is None else 1]
        node = ir.producer(tensor)
    return tensor


def _is_arithmetic(node: Node) -> bool:
    return node.op in _ARITHMETIC and not node.domain and len(node.inputs) == 2


@dataclass(frozen=True)
class Product:
    """`scale` times all `factors`, computed by `nodes`."""

    scale: float
    factors: list[Tensor]
    nodes: list[Node]


def product(rewriter: Rewriter, root: Node) -> Product | None:
    """The product that a Mul, or a Div by a number, ends; factors that other nodes read too are not taken apart."""
    if not _is_product(root):
        return None
    scale, factors, nodes = 1.0, list[Tensor](), [root]
    for node in nodes:
        for index, tensor in enumerate(node.inputs):
            number, maker = scalar_operand(node, index), ir.producer(tensor)
            if number is not None:
                scale = scale / number if node.op == "Div" else scale * number
            elif maker is not None and _is_product(maker) and rewriter.only_user(tensor) is not None:
                nodes.append(maker)
            else:
                factors.append(tensor)
    return Product(scale, factors, nodes)


def _is_product(node: Node) -> bool:
    if node.domain or len(node.inputs) != 2:
        return False
    return node.op == "Mul" or (
        node.op == "Div" and bool(scalar_operand(node, 1)) and not ir.is_constant(node.inputs[0])
    )


def reduced_axes(node: Node) -> tuple[int, ...] | None:
    """The axes that a Reduce operator reduces, counted from 0 and sorted; None if they or the rank are not known."""
    shape = ir.shape(node.inputs[0])
    given = ir.optional_input(node, 1)
    array = np.array(node.attrs.get("axes", [])) if given is None else ir.value(given)
    if shape is None or array is None:
        return None
    if array.size == 0:
        return () if node.attrs.get("noop_with_empty_axes", 0) else tuple(range(len(shape)))
    return tuple(sorted({int(a) % len(shape) for a in array.reshape(-1)}))


def collapse(
    rewriter: Rewriter,
    root: Node,
    nodes: Iterable[Node],
    op: str,
    inputs: Sequence[Tensor],
    domain: str = "",
    **attrs: Any,
) -> Refusal | None:
    """Put one float32 operator in the place of `nodes`, `root` the last of them.

    Refuses if something else reads a result inside the pattern.
    """
    unique = list({id(n): n for n in (root, *nodes)}.values())
    dtype = inputs[0].dtype
    if dtype is None or np.dtype(dtype) != np.float32:
        return Refusal(f"{op} is made for float32 tensors only", inputs[0].name)
    own = {id(n) for n in unique}
    graphs = list(ir.all_graphs(rewriter.state.graph))
    for tensor in (t for n in unique if n is not root for t in n.outputs):
        if any(ir.is_output(g, tensor) for g in graphs) or any(id(n) not in own for n in tensor.outputs):
            return Refusal("something else reads a result inside the pattern", tensor.name)
    new = rewriter.node(op, inputs, origin=unique, domain=domain, **attrs)
    rewriter.take_output(new, root.outputs[0])
    for node in unique:
        rewriter.remove(node)
    return None
