"""Nodes whose output equals one of their inputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.rewrite import Refusal, Rewriter, Rule
from qcompiler.shapes import kind


def bypass_if(is_noop: Callable[[Node], bool], index: int = 0) -> Rule:
    """A rule that removes a node of which `is_noop` holds; its consumers read input `index` instead."""

    def rule(rewriter: Rewriter, node: Node) -> Refusal | None:
        if not is_noop(node):
            return Refusal("it changes its input", node.name)
        if any(t.outputs or rewriter.is_output(t) for t in node.outputs[1:]):
            return Refusal("its second output is used", node.name)
        if not rewriter.bypass(node, index):
            return Refusal("it connects a graph input or constant to a graph output", node.outputs[0].name)
        return None

    return rule


def _identity(node: Node) -> bool:
    return True


def _dropout(node: Node) -> bool:
    """In inference."""
    mode = ir.optional_input(node, 2)
    return mode is None or ir.scalar(mode) == 0


def _cast(node: Node) -> bool:
    source, target = node.inputs[0], node.outputs[0]
    return bool(kind(source) and kind(target)) and np.dtype(source.dtype) == np.dtype(target.dtype)


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether both shapes are known and equal; a dynamic axis equals itself by its name."""
    left, right = ir.shape(a), ir.shape(b)
    return left is not None and left == right and None not in left


def _keeps_shape(node: Node) -> bool:
    return same_shape(node.inputs[0], node.outputs[0])


def _transpose(node: Node) -> bool:
    perm = node.attrs.get("perm")
    dims = ir.shape(node.inputs[0])
    return list(perm) == sorted(perm) if perm else dims is not None and len(dims) <= 1


def _single_input(node: Node) -> bool:
    return len(node.inputs) == 1


def _all_equal(index: int, wanted: int) -> Callable[[Node], bool]:
    """Whether every element of the constant input `index` is `wanted`."""

    def check(node: Node) -> bool:
        tensor = ir.optional_input(node, index)
        array = None if tensor is None else ir.value(tensor)
        return array is not None and bool((array == wanted).all())

    return check


def _resize(node: Node) -> bool:
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return False
    scales = ir.optional_input(node, 2)
    return _keeps_shape(node) if scales is None else _all_equal(2, 1)(node)


def _neutral(index: int, element: float) -> Callable[[Node], bool]:
    """Whether the operand `index` is a constant full of the operation's neutral element, and does not broadcast the other."""

    def check(node: Node) -> bool:
        array = ir.value(node.inputs[index])
        if array is None or array.size > 65536 or not bool((array == element).all()):
            return False
        dims = ir.shape(node.inputs[1 - index])
        return (
            array.ndim == 0
            or same_shape(node.inputs[1 - index], node.outputs[0])
            or (array.size == 1 and dims is not None and array.ndim <= len(dims))
        )

    return check


PLAIN: dict[str, list[Rule]] = {
    "Cast": [bypass_if(_cast)],
    "Dropout": [bypass_if(_dropout)],
    "Identity": [bypass_if(_identity)],
}
"""What exporters leave behind in any model."""

FOLDED: dict[str, list[Rule]] = {
    "Add": [bypass_if(_neutral(1, 0)), bypass_if(_neutral(0, 0), 1)],
    "Concat": [bypass_if(_single_input)],
    "Div": [bypass_if(_neutral(1, 1))],
    "Expand": [bypass_if(_keeps_shape)],
    "Flatten": [bypass_if(_keeps_shape)],
    "Max": [bypass_if(_single_input)],
    "Mean": [bypass_if(_single_input)],
    "Min": [bypass_if(_single_input)],
    "Mul": [bypass_if(_neutral(1, 1)), bypass_if(_neutral(0, 1), 1)],
    "Pad": [bypass_if(_all_equal(1, 0))],
    "Reshape": [bypass_if(_keeps_shape)],
    "Resize": [bypass_if(_resize)],
    "Squeeze": [bypass_if(_keeps_shape)],
    "Sub": [bypass_if(_neutral(1, 0))],
    "Sum": [bypass_if(_single_input)],
    "Tile": [bypass_if(_all_equal(1, 1))],
    "Transpose": [bypass_if(_transpose)],
    "Unsqueeze": [bypass_if(_keeps_shape)],
}
"""What is left once constants and shapes are known. A Slice that keeps the shape may still reverse an axis, so it is not here."""
