"""What each operator does to the channel factors of its operands: one function per kind of operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.rewrite import Refusal
from qcompiler_passes import linear
from qcompiler_passes.channels import FIXED, Channels, Ids, Rule
from qcompiler_passes.match import static_axis

_DYNAMIC = 2
"""Stands for the length of an axis that is not static: its channels must all be alike."""


def _layer(channels: Channels, node: Node) -> Sequence[Ids] | None:
    found = linear.read(node)
    if isinstance(found, Refusal) or node.attrs.get("transA", 0):
        return None
    groups, outputs, inputs, _ = found.shape
    before = _along(channels.of(node.inputs[0]), found.axis)
    if before is None:
        return None
    after = channels.made_by(node, groups * outputs)
    channels.layers.append((found, np.broadcast_to(before, (groups * inputs,)), after))
    return [after.reshape([-1] + [1] * (-found.axis - 1))]


def _along(ids: Ids, axis: int) -> Ids | None:
    """The variables along one axis, counted from the end, if they are alike along all others."""
    if ids.ndim == 0:
        return ids
    return ids.reshape(-1) if -axis <= ids.ndim and ids.size == ids.shape[axis] else None


def _norm(channels: Channels, node: Node) -> Sequence[Ids] | None:
    scale = ir.value(node.inputs[1])
    if scale is None or scale.ndim != 1 or node.attrs.get("axis", -1) != -1 or len(node.outputs) > 1:
        return None
    bias = ir.optional_input(node, 2)
    if bias is not None and not ir.is_constant(bias):
        return None
    channels.fix(node.inputs[0])
    after = channels.made_by(node, scale.size)
    channels.operands += [(node, i, after) for i in ((1,) if bias is None else (1, 2))]
    return [after]


def _same(channels: Channels, node: Node) -> Sequence[Ids] | None:
    return [channels.of(node.inputs[0])]


def _prelu(channels: Channels, node: Node) -> Sequence[Ids] | None:
    return _same(channels, node) if ir.is_constant(node.inputs[1]) else None


def _spatial(channels: Channels, node: Node) -> Sequence[Ids] | None:
    """Operators that mix the positions of a channel, linearly or by a maximum; zeros may be padded."""
    ids = channels.of(node.inputs[0])
    rank = len(ir.shape(node.inputs[0]) or ())
    alike = ids.ndim == 0 or (rank > 2 and _along(ids, 1 - rank) is not None)
    return [ids] if alike and len(node.outputs) == 1 else None


def _pad(channels: Channels, node: Node) -> Sequence[Ids] | None:
    fill, pads = ir.optional_input(node, 2), ir.value(node.inputs[1])
    if pads is None or len(node.inputs) > 3 or (fill is not None and ir.scalar(fill) != 0):
        return None
    before, after = pads.reshape(2, -1).tolist()
    if len(before) < 3 or before[0] or after[0] or min(before[1], after[1]) < 0:
        return None
    if not before[1] and not after[1]:
        return _spatial(channels, node)
    ids, count = _along(channels.of(node.inputs[0]), 1 - len(before)), static_axis(node.inputs[0], 1)
    if ids is None or count is None or node.attrs.get("mode", "constant") != "constant" or ids.ndim == 0:
        return None
    zeros = [channels.fresh(more) for more in (before[1], after[1])]  # any factor of zero will do
    wide = np.broadcast_to(ids, (count,))
    return [np.concatenate([zeros[0], wide, zeros[1]]).reshape([-1] + [1] * (len(before) - 2))]


def _resize(channels: Channels, node: Node) -> Sequence[Ids] | None:
    before, after = (ir.shape(t) for t in (node.inputs[0], node.outputs[0]))
    reads_beyond = node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    if before is None or after is None or before[1:2] != after[1:2] or reads_beyond:
        return None
    return _spatial(channels, node)


def _add(channels: Channels, node: Node) -> Sequence[Ids] | None:
    variables = [channels.of(t) for t in node.inputs if not ir.is_constant(t)]
    if not variables:
        return None
    for ids in variables[1:]:
        channels.tie(variables[0], ids)
    both = np.broadcast_arrays(*variables)[0]
    channels.operands += [(node, i, both) for i, t in enumerate(node.inputs) if ir.is_constant(t)]
    return [both]


def _mul(channels: Channels, node: Node) -> Sequence[Ids] | None:
    """The factor of one operand is that of the product; other operands carry none."""
    ids = [channels.of(t) for t in node.inputs]
    free = [i for i, v in enumerate(ids) if not channels.is_fixed(v)]
    for i in free[1:]:
        channels.fix(node.inputs[i], Refusal("Mul takes a factor of one operand only", node.name))
    return [ids[free[0]]] if free else [FIXED]


def _div(channels: Channels, node: Node) -> Sequence[Ids] | None:
    channels.fix(node.inputs[1], Refusal("it is what Div divides by", node.name))
    return _same(channels, node)


def _matmul(channels: Channels, node: Node) -> Sequence[Ids] | None:
    """A constant weight, or the product of activations whose right operand carries factors: probabilities times values."""
    if any(ir.is_constant(t) for t in node.inputs):
        return _layer(channels, node)
    channels.fix(node.inputs[0], Refusal("MatMul takes factors of its right operand only", node.name))
    ids = channels.of(node.inputs[1])
    return [ids] if ids.ndim < 2 or ids.shape[-2] == 1 else None


def _shaped(channels: Channels, node: Node) -> Sequence[Ids] | None:
    """Reshape and the like: the variables of all elements, in the new shape; along dynamic axes all must be alike."""
    ids = channels.of(node.inputs[0])
    before, after = (ir.shape(t) for t in (node.inputs[0], node.outputs[0]))
    if ids.ndim == 0 or before is None or after is None:
        return [ids] if ids.ndim == 0 else None
    (old, old_free), (new, new_free) = _lengths(before), _lengths(after)
    total = math.lcm(math.prod(old), math.prod(new)) * (_DYNAMIC if old_free and new_free else 1)
    for sizes, free in ((old, old_free), (new, new_free)):
        if free:
            sizes[free[0]] *= total // math.prod(sizes)
    if math.prod(old) != math.prod(new):
        return None
    result = _squeezed(np.broadcast_to(ids, old).reshape(new))
    return None if any(result.shape[i] != 1 for i in new_free) else [result]


def _lengths(shape: Sequence[int | str | None]) -> tuple[list[int], list[int]]:
    """Example lengths of all axes, the first dynamic one being 1, and the positions of the dynamic axes."""
    free = [i for i, d in enumerate(shape) if not isinstance(d, int)]
    return [d if isinstance(d, int) else 1 if i == free[0] else _DYNAMIC for i, d in enumerate(shape)], free


def _squeezed(ids: Ids) -> Ids:
    """With every axis along which the variables are alike cut to length 1."""
    for axis in range(ids.ndim):
        first = ids.take([0], axis)
        if ids.shape[axis] and (ids == first).all():
            ids = first
    return ids


def _transpose(channels: Channels, node: Node) -> Sequence[Ids] | None:
    ids, shape = channels.of(node.inputs[0]), ir.shape(node.inputs[0])
    if ids.ndim == 0 or shape is None:
        return [ids] if ids.ndim == 0 else None
    full = ids.reshape([1] * (len(shape) - ids.ndim) + list(ids.shape))
    return [full.transpose(node.attrs.get("perm", range(len(shape))[::-1]))]


def _expanded(channels: Channels, tensor: Tensor, axis: int) -> Ids | None:
    """The variables of a tensor with all its axes, and all positions of one of them."""
    shape = ir.shape(tensor)
    if shape is None or not -len(shape) <= axis < len(shape) or not isinstance(shape[axis], int):
        return None
    ids = channels.of(tensor)
    full = ids.reshape([1] * (len(shape) - ids.ndim) + list(ids.shape))
    sizes = list(full.shape)
    sizes[axis] = shape[axis]
    return np.broadcast_to(full, sizes)


def _concat(channels: Channels, node: Node) -> Sequence[Ids] | None:
    axis = node.attrs["axis"]
    parts = [p for t in node.inputs if (p := _expanded(channels, t, axis)) is not None]
    if len(parts) < len(node.inputs) or any(ir.is_constant(t) for t in node.inputs):
        return None
    axis %= parts[0].ndim
    common = np.broadcast_shapes(*(p.take([0], axis).shape for p in parts))
    wide = [np.broadcast_to(p, (*common[:axis], p.shape[axis], *common[axis + 1 :])) for p in parts]
    return [np.concatenate(wide, axis)]


def _split(channels: Channels, node: Node) -> Sequence[Ids] | None:
    axis = node.attrs.get("axis", 0)
    ids = _expanded(channels, node.inputs[0], axis)
    sizes = [(ir.shape(t) or ())[axis] if ir.shape(t) else None for t in node.outputs]
    if ids is None or not all(isinstance(s, int) for s in sizes):
        return None
    ends: list[Any] = np.cumsum(np.asarray(sizes, np.int64)).tolist()
    return [_squeezed(part) for part in np.split(ids, ends[:-1], axis)]


def _gather(channels: Channels, node: Node) -> Sequence[Ids] | None:
    axis, indices = node.attrs.get("axis", 0), ir.value(node.inputs[1])
    ids = _expanded(channels, node.inputs[0], axis)
    if ids is None or indices is None or channels.of(node.inputs[0]).ndim == 0:
        return [FIXED] if channels.of(node.inputs[0]).ndim == 0 else None
    return [np.take(ids, indices, axis)]


def _slice(channels: Channels, node: Node) -> Sequence[Ids] | None:
    given = [ir.value(t) for t in node.inputs[1:]]
    ids, shape = channels.of(node.inputs[0]), ir.shape(node.inputs[0])
    if ids.ndim == 0:
        return [ids]
    if shape is None or len(given) < 3 or any(g is None for g in given):
        return None
    starts, ends, axes, *more = (np.asarray(g).tolist() for g in given)
    result = ids.reshape([1] * (len(shape) - ids.ndim) + list(ids.shape))
    for start, end, axis, step in zip(starts, ends, axes, more[0] if more else [1] * len(axes), strict=True):
        if result.shape[axis] != 1:
            result = result[(slice(None),) * (axis % len(shape)) + (slice(start, end, step),)]
    return [result]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), _layer),
    "MatMul": _matmul,
    "LayerNormalization": _norm,
    **dict.fromkeys(("Relu", "LeakyRelu", "Identity", "Neg", "Abs"), _same),
    "PRelu": _prelu,
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _spatial),
    "Pad": _pad,
    "Resize": _resize,
    **dict.fromkeys(("Add", "Sub", "Sum"), _add),
    "Mul": _mul,
    "Div": _div,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _shaped),
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Gather": _gather,
    "Slice": _slice,
    "Shape": lambda channels, node: [FIXED],
}
"""By `op_key`. Whatever is not here has fixed inputs and outputs."""
