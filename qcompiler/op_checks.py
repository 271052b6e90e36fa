"""Why single nodes cannot be integer although their operator can: one function per row that asks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.integer_layers import MOST_CHANNELS
from qcompiler.ir import Node

LARGEST_SUM = 2**30
"""What sums of products may reach: half of the accumulator, of which the bias may take the other half."""

_LARGEST_PRODUCT = 255 * 127


def sums_fit(weight: NDArray[Any], axis: int) -> str | None:
    """The sums of a channel on `axis` must fit into int32, with any inputs, and scales at least half of what the range asks."""
    terms = weight.size // max(weight.shape[axis], 1)
    if terms * _LARGEST_PRODUCT <= LARGEST_SUM:
        return None
    magnitudes = np.abs(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float64))
    largest = np.maximum(magnitudes.max(axis=1, initial=0), np.finfo(np.float64).tiny)
    weights = float((2 * magnitudes.sum(axis=1) / largest).max(initial=0))
    fit = min(weights, terms) * _LARGEST_PRODUCT <= LARGEST_SUM
    return None if fit else f"its sums of {terms} products may overflow int32"


def conv(node: Node) -> str | None:
    """Weight and bias must be constants, and sums small."""
    return constant_weight(node) or sums_fit(ir.array(node.inputs[1]), 0)


def constant_weight(node: Node) -> str | None:
    """Weight and bias must be constants."""
    if not ir.is_constant(node.inputs[1]):
        return "the weight is not a constant"
    bias = ir.optional_input(node, 2)
    return None if bias is None or ir.is_constant(bias) else "the bias is not a constant"


def matmul(node: Node) -> str | None:
    """The weight must be a constant matrix, and sums small."""
    weight = ir.value(node.inputs[1])
    if weight is not None and weight.ndim != 2:
        return f"the weight has {weight.ndim} dimensions; integer kernels take 2"
    return "both factors are activations" if weight is None else sums_fit(weight, 1)


def gemm(node: Node) -> str | None:
    """Attributes must have their defaults, the bias be a vector, and sums small."""
    plain = all(node.attrs.get(k, d) == d for k, d in (("alpha", 1.0), ("beta", 1.0), ("transA", 0), ("transB", 0)))
    if not plain:
        return "alpha, beta, transA or transB are not folded away"
    bias = ir.optional_input(node, 2)
    values = None if bias is None else ir.value(bias)
    if values is not None and values.ndim > 1 and values.size != values.shape[-1]:
        return "the bias is a matrix"
    return constant_weight(node) or sums_fit(ir.array(node.inputs[1]), 1)


def nearest(node: Node) -> str | None:
    """Only elements of the input may be in the result."""
    mode, where = node.attrs.get("mode", "nearest"), node.attrs.get("coordinate_transformation_mode")
    if mode != "nearest":
        return f"Resize mode {mode} interpolates"
    return "tf_crop_and_resize fills in what it does not read" if where == "tf_crop_and_resize" else None


def finite_pad(node: Node) -> str | None:
    """What is filled in must be a finite constant."""
    fill = ir.optional_input(node, 2)
    value = 0.0 if fill is None else ir.scalar(fill)
    return None if value is not None and math.isfinite(value) else "the padding value is not a finite constant"


def constant_slope(node: Node) -> str | None:
    """The slope must be a finite constant."""
    slope = ir.value(node.inputs[1])
    known = slope is not None and all(math.isfinite(s) for s in slope.reshape(-1).tolist())
    return None if known else "the slope is not a finite constant"


def constant_axes(node: Node) -> str | None:
    """The axes must be constants, and the rank known."""
    axes = ir.optional_input(node, 1)
    if node.attrs.get("noop_with_empty_axes", 0) or ir.shape(node.inputs[0]) is None:
        return "it may reduce nothing, or its rank is not known"
    return None if axes is None or ir.is_constant(axes) else "its axes are not constants"


def one_output(node: Node) -> str | None:
    """Indices have no integer form."""
    return "the indices output is used" if len(node.outputs) > 1 and not node.outputs[1].is_empty() else None


def spatial_size(node: Node) -> str | None:
    """The number of elements must be known."""
    shape = ir.shape(node.inputs[0])
    known = shape is not None and all(isinstance(d, int) for d in shape[2:])
    return None if known else "the spatial size is not static"


def constant_bounds(node: Node) -> str | None:
    """The bounds must be constants."""
    bounds = (ir.optional_input(node, i) for i in (1, 2))
    return None if all(b is None or ir.scalar(b) is not None for b in bounds) else "the bounds are not constants"


def last_axis(node: Node) -> str | None:
    """The axis must be the last one."""
    rank = len(ir.shape(node.inputs[0]) or ())
    return None if node.attrs.get("axis", -1) in (-1, rank - 1) else "its axis is not the last one"


def layer_norm(node: Node) -> str | None:
    """Scale and bias must be constants along the last axis."""
    scale = ir.value(node.inputs[1])
    bias = ir.optional_input(node, 2)
    if scale is None or not (bias is None or ir.is_constant(bias)):
        return "its scale or bias is not a constant"
    if scale.ndim != 1 or scale.size > MOST_CHANNELS:
        return f"it normalizes over more than one axis, or over more than {MOST_CHANNELS} channels"
    if any(not t.is_empty() for t in node.outputs[1:]):
        return "the mean or the inverse deviation is used"
    return last_axis(node)
