"""The rules of `recompose` for normalizations over the last axis, or over channels: LayerNormalization and RMSNormalization."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qcompiler import functions, ir
from qcompiler.ir import Node, Tensor
from qcompiler.ops import op_key
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler_passes.match import NO_MATCH, collapse, made_by, reduced_axes, scalar_operand, squared, static_axis

_NORMALIZATIONS = ("LayerNormalization", "RMSNormalization", op_key("RMSNormalization", functions.DOMAIN))


def layer_normalization(rewriter: Rewriter, node: Node) -> Refusal | None:
    """(x - mean) / Sqrt(variance + epsilon) over the last axis -> LayerNormalization with a scale of ones.

    Over axis 1, as ConvNeXt (Liu et al. 2022, arXiv 2201.03545) has it, with a Transpose before and behind, where the target asks
    for it.
    """
    for centred, other in _both_orders(node):
        for axis in (-1, 1):
            nodes: list[Node] = []
            x = _centred(centred, nodes, axis)
            epsilon = None if x is None else _variance(_radicand(node, other, nodes), x, nodes, axis)
            if x is None or epsilon is None:
                continue
            if axis == -1:
                return _normalized(rewriter, node, nodes, "LayerNormalization", x, epsilon)
            return _normalized_channels(rewriter, node, nodes, x, epsilon)
    return NO_MATCH


def channel_affine(rewriter: Rewriter, node: Node) -> Refusal | None:
    """Mul by or Add of a constant per channel behind the Transpose of a normalized tensor -> the same before the Transpose."""
    for tensor, operand in _both_orders(node):
        transpose, array, shape = made_by(tensor, "Transpose"), ir.value(operand), ir.shape(tensor)
        if transpose is None or array is None or shape is None or _normalization(transpose.inputs[0]) is None:
            continue
        per_channel = array.ndim in (len(shape) - 1, len(shape)) and array.shape[1 - len(shape)] == array.size
        if transpose.attrs.get("perm") != _first(len(shape)) or not per_channel or array.size != static_axis(tensor, 1):
            continue
        if rewriter.only_user(tensor) is None:
            return Refusal("something else reads the normalized tensor", tensor.name)
        inner = rewriter.variable(f"{tensor.name}_affine", tensor.dtype, transpose.inputs[0].shape)
        flat = rewriter.constant(operand.name, array.reshape(-1))
        rewriter.node(node.op, [transpose.inputs[0], flat], [inner], origin=node)
        moved = rewriter.node("Transpose", [inner], origin=transpose, perm=_first(len(shape)))
        rewriter.take_output(moved, node.outputs[0])
        rewriter.remove(node)
        rewriter.remove(transpose)
        return None
    return NO_MATCH


def _first(rank: int) -> list[int]:
    """The permutation that moves the last axis to axis 1."""
    return [0, rank - 1, *range(1, rank - 1)]


def _normalized_channels(
    rewriter: Rewriter, root: Node, nodes: Sequence[Node], x: Tensor, epsilon: float
) -> Refusal | None:
    """Put Transpose, LayerNormalization, Transpose in the place of the nodes, where the target asks for it."""
    shape = ir.shape(x) or ()
    if "channel-norm-as-layer-norm" not in rewriter.state.target.rewrites:
        return Refusal(f"target {rewriter.state.target.name} does not ask for channel-norm-as-layer-norm", root.name)
    last = rewriter.variable(f"{x.name}_last", x.dtype, [shape[0], *shape[2:], shape[1]])
    rewriter.node("Transpose", [x], [last], origin=root, perm=[0, *range(2, len(shape)), 1])
    refusal = _normalized(rewriter, root, nodes, "LayerNormalization", last, epsilon)
    if refusal is None:
        result = last.outputs[0].outputs[0]
        normalized = rewriter.cut(result)
        normalized.shape = last.shape
        back = rewriter.node("Transpose", [normalized], origin=root, perm=_first(len(shape)))
        rewriter.take_output(back, result)
    return refusal


def shifted_normalization(rewriter: Rewriter, node: Node) -> Refusal | None:
    """x * g + (bias - mean * g), g = scale / Sqrt(variance + epsilon), as TensorFlow writes it -> LayerNormalization."""
    for product, offset in _both_orders(node):
        scaled, sub = made_by(product, "Mul"), made_by(offset, "Sub")
        shift = None if sub is None else made_by(sub.inputs[1], "Mul")
        if scaled is None or sub is None or shift is None:
            continue
        bias = ir.value(sub.inputs[0])
        for x, gain in _both_orders(scaled):
            mean = next((_mean(a) for a, b in _both_orders(shift) if b is gain), None)
            if bias is None or mean is None or mean.inputs[0] is not x:
                continue
            nodes = [scaled, sub, shift, mean]
            scale, inverse = _scaled_inverse(gain, nodes)
            epsilon = _variance(_root(_reciprocal(inverse, nodes), nodes), x, nodes)
            if epsilon is not None:
                return _normalized(rewriter, node, nodes, "LayerNormalization", x, epsilon, scale, bias)
    return NO_MATCH


def rms_normalization(rewriter: Rewriter, node: Node) -> Refusal | None:
    """x / Sqrt(mean(x * x) + epsilon) over the last axis -> RMSNormalization with a scale of ones.

    Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    for x, other in _both_orders(node):
        nodes: list[Node] = []
        found = _mean_square(_radicand(node, other, nodes), nodes)
        if found is not None and found[0] is x:
            return _normalized(rewriter, node, nodes, "RMSNormalization", x, found[1])
    return NO_MATCH


def _both_orders(node: Node) -> Sequence[tuple[Tensor, Tensor]]:
    """The operands of a binary operator as (first, second) and (second, first)."""
    if len(node.inputs) != 2:
        return ()
    first, second = node.inputs
    return (first, second), (second, first)


def _normalized(
    rewriter: Rewriter,
    root: Node,
    nodes: Sequence[Node],
    op: str,
    x: Tensor,
    epsilon: float,
    scale: NDArray[np.float32] | None = None,
    bias: NDArray[np.float32] | None = None,
) -> Refusal | None:
    """Put a normalization of x in the place of the nodes, if the opset has it and the constants run along the last axis."""
    needed, opset = 23 if op == "RMSNormalization" else 17, rewriter.state.graph.opset
    as_function = opset < needed and opset >= functions.OPSET and op in rewriter.state.target.rewrites
    if opset < needed and not as_function:
        return Refusal(f"{op} needs opset {needed}", root.name)
    width = static_axis(x, -1)
    if width is None:
        return Refusal("the length of the last axis is not static", x.name)
    inputs = [x]
    for hint, array in (("scale", np.ones(width, np.float32) if scale is None else scale), ("bias", bias)):
        if array is None:
            continue
        if array.size not in {1, width} or array.shape[-1:] not in {(), (1,), (width,)}:
            return Refusal(f"the {hint} is not one number per element of the last axis", root.name)
        inputs.append(rewriter.constant(hint, np.broadcast_to(array.reshape(-1), width).astype(np.float32)))
    if as_function:
        return collapse(rewriter, root, nodes, op, inputs, functions.DOMAIN, epsilon=epsilon)
    return collapse(rewriter, root, nodes, op, inputs, axis=-1, epsilon=epsilon)


def _centred(tensor: Tensor, nodes: list[Node], axis: int = -1) -> Tensor | None:
    """x, if the tensor is x - ReduceMean(x) over the axis, the last one or 1."""
    sub = made_by(tensor, "Sub")
    mean = None if sub is None else _mean(sub.inputs[1], axis)
    if sub is None or mean is None or mean.inputs[0] is not sub.inputs[0]:
        return None
    nodes += [sub, mean]
    return sub.inputs[0]


def _mean(tensor: Tensor, axis: int = -1) -> Node | None:
    node = made_by(tensor, "ReduceMean")
    if node is None or not node.attrs.get("keepdims", 1):
        return None
    shape = ir.shape(node.inputs[0])
    return node if shape and reduced_axes(node) == (axis % len(shape),) else None


def _radicand(node: Node, tensor: Tensor, nodes: list[Node]) -> Tensor | None:
    """r, if the node divides by the square root of r: `node` is a Div or Mul, `tensor` its other operand."""
    if node.op == "Mul":
        return _root(_reciprocal(tensor, nodes), nodes)
    return _root(tensor, nodes) if node.inputs[1] is tensor else None


def _reciprocal(tensor: Tensor, nodes: list[Node]) -> Tensor | None:
    """t, if the tensor is 1 / t."""
    inverse = made_by(tensor, "Reciprocal")
    if inverse is not None:
        nodes.append(inverse)
        return inverse.inputs[0]
    inverse = made_by(tensor, "Div")
    if inverse is None or scalar_operand(inverse, 0) != 1:
        return None
    nodes.append(inverse)
    return inverse.inputs[1]


def _root(tensor: Tensor | None, nodes: list[Node]) -> Tensor | None:
    """r, if the tensor is the square root of r."""
    root = None if tensor is None else made_by(tensor, "Sqrt")
    if root is None:
        root = None if tensor is None else made_by(tensor, "Pow")
        if root is None or scalar_operand(root, 1) != 0.5:
            return None
    nodes.append(root)
    return root.inputs[0]


def _scaled_inverse(gain: Tensor, nodes: list[Node]) -> tuple[NDArray[np.float32] | None, Tensor]:
    """The constant factor of a gain, if it has one, and what it multiplies."""
    mul = made_by(gain, "Mul")
    for inverse, factor in () if mul is None else _both_orders(mul):
        scale = ir.value(factor)
        if mul is not None and scale is not None:
            nodes.append(mul)
            return scale, inverse
    return None, gain


def _mean_square(tensor: Tensor | None, nodes: list[Node], axis: int = -1) -> tuple[Tensor, float] | None:
    """t and epsilon, if the tensor is the mean of t * t plus epsilon."""
    add = None if tensor is None else made_by(tensor, "Add")
    if add is None:
        return None
    for index in (0, 1):
        epsilon, mean = scalar_operand(add, index), _mean(add.inputs[1 - index], axis)
        base = None if mean is None else squared(mean.inputs[0])
        if epsilon is not None and mean is not None and base is not None:
            nodes += [add, mean, mean.inputs[0].inputs[0]]
            return base, epsilon
    return None


def _variance(tensor: Tensor | None, x: Tensor, nodes: list[Node], axis: int = -1) -> float | None:
    """Epsilon, if the tensor is the variance of x plus epsilon."""
    found = _mean_square(tensor, nodes, axis)
    return found[1] if found is not None and _centred(found[0], nodes, axis) is x else None


def fold_affine(rewriter: Rewriter, node: Node) -> Refusal | None:
    """A normalization, then Mul by or Add of a constant per element of the last axis -> its scale and bias."""
    for index in (0, 1):
        norm, array = _normalization(node.inputs[index]), ir.value(node.inputs[1 - index])
        if norm is None or array is None or (node.op == "Add" and norm.op == "RMSNormalization"):
            continue
        constants = [ir.value(t) for t in norm.inputs[1:] if not t.is_empty()]
        scale, bias = (*constants, None)[:2]
        shape = ir.shape(norm.inputs[0])
        if node.op not in {"Mul", "Add"} or scale is None or (bias is None and len(constants) > 1):
            return NO_MATCH
        if shape is None or array.ndim > len(shape) or array.size not in {1, scale.size} or scale.ndim != 1:
            return Refusal("the constant is not one number per element of the last axis", node.inputs[1 - index].name)
        if array.size != 1 and array.shape[-1] != array.size:
            return Refusal("the constant runs along another axis", node.inputs[1 - index].name)
        if len([t for t in norm.outputs if not t.is_empty()]) > 1:
            return Refusal("the mean or the variance is an output", norm.name)
        bias = np.zeros_like(scale) if bias is None else bias
        flat = array.reshape(-1)
        folded = (
            {"scale": scale * flat, "bias": bias * flat} if node.op == "Mul" else {"scale": scale, "bias": bias + flat}
        )
        inputs = [norm.inputs[0], *(rewriter.constant(k, v) for k, v in folded.items() if k == "scale" or np.any(v))]
        return collapse(rewriter, node, [norm], norm.op, inputs, norm.domain or "", **norm.attrs)
    return NO_MATCH


def _normalization(tensor: Tensor) -> Node | None:
    node = ir.producer(tensor)
    return node if node is not None and op_key(node.op, node.domain) in _NORMALIZATIONS else None
