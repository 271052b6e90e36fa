"""Resize with interpolation, and averages whose windows differ, as arithmetic with constants: one matrix per axis.

The matrix of an axis is what the float operator itself makes of the unit matrix, so that all its modes are right. Where the
rows repeat, from a step to the next, it is a convolution whose phases are channels; else it is a product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler.runtime import run, session
from qcompiler_passes.interleave import can_interleave, interleave
from qcompiler_passes.match import static_axis

Matrix = NDArray[np.float64]

PROBE = 12
"""Steps of an axis on which rows are read off: enough for cubic interpolation to be away from the border in the middle."""


@dataclass(frozen=True)
class Periodic:
    """An axis with rows that repeat: result up * q + r is the sum of taps[r, t] * input[down * q + t - before].

    Beyond the border the input repeats its outermost values. taps: shape (up, number).
    """

    taps: Matrix
    before: int = 0
    down: int = 1

    @property
    def up(self) -> int:
        """The phases: results per step."""
        return len(self.taps)

    @property
    def behind(self) -> int:
        """The inputs needed beyond the end of an axis that is whole steps long."""
        return int(self.taps.shape[1]) - self.before - self.down

    def matrix(self, outputs: int, inputs: int) -> Matrix:
        """The matrix of an axis of that length, shape (outputs, inputs)."""
        made = np.zeros((outputs, inputs))
        for row in range(outputs):
            first = self.down * (row // self.up) - self.before
            columns = np.clip(first + np.arange(self.taps.shape[1]), 0, inputs - 1)
            np.add.at(made[row], columns, self.taps[row % self.up])
        return made


STILL = Periodic(np.ones((1, 1)))


@dataclass(frozen=True)
class _Resize:
    """A Resize along one axis: by `scale`, or to `size` elements."""

    node: Node
    opset: int
    scale: float
    size: int | None

    def matrix(self, inputs: int, to: int | None) -> Matrix:
        """What it does to an axis of that length, shape (outputs, inputs). to: the length of the result, or None to scale."""
        given = np.array([1, 1, self.scale, 1], np.float32) if to is None else np.array([1, 1, to, inputs], np.int64)
        names = ["x", "", "given"] if to is None else ["x", "", "", "given"]
        return _response("Resize", names, self.node.attrs, inputs, self.opset, {"given": given})

    def periodic(self, inputs: int | None) -> Periodic | None:
        """The taps, if rows repeat on an axis of that length, or of any; None if they do not."""
        up, down = round(self.scale), round(1 / self.scale)
        if not np.isclose(max(up, down), max(self.scale, 1 / self.scale), rtol=1e-6):
            return None
        up, down = (up, 1) if self.scale > 1 else (1, down)
        length = PROBE * down
        middle = up * PROBE // 2
        rows = self.matrix(length, PROBE * up)[middle : middle + up]
        offsets = np.flatnonzero(np.abs(rows).max(axis=0)) - down * PROBE // 2
        before, behind = max(-offsets.min(), 0), max(offsets.max(), down - 1)
        start = down * PROBE // 2 - before
        found = Periodic(rows[:, start : start + before + behind + 1], before, down)
        lengths = [down * 3, down * 5] if inputs is None else [inputs]
        return found if all(self._follows(found, n, None if inputs is None else self.size) for n in lengths) else None

    def _follows(self, found: Periodic, inputs: int, to: int | None) -> bool:
        outputs = inputs * found.up // found.down
        exact = self.matrix(inputs, to)
        return len(exact) == outputs and bool(np.allclose(exact, found.matrix(outputs, inputs), atol=1e-5))


def resize(rewriter: Rewriter, node: Node) -> Refusal | None:
    """Resize, linear or cubic -> Pad, Conv and DepthToSpace, or a product with a constant matrix per axis."""
    axes = _resized(rewriter, node)
    if isinstance(axes, Refusal):
        return axes
    x = node.inputs[0]
    sizes = [static_axis(x, i) for i in range(len(axes))]
    if (channels := sizes[1] if len(sizes) > 1 else None) is not None and not (axes[0] or axes[1]):
        found = [STILL if a is None else a.periodic(n) for a, n in zip(axes[2:], sizes[2:], strict=True)]
        periodic = [p for p in found if p is not None]
        if len(periodic) == len(found) and can_interleave([p.up for p in periodic], sizes[2:]):
            return _finish(rewriter, node, _convolve(rewriter, node, channels, periodic, sizes[2:]))
    matrices: dict[int, Matrix] = {}
    for i, (axis, inputs) in enumerate(zip(axes, sizes, strict=True)):
        if axis is None:
            continue
        if inputs is None:
            return Refusal("its size is not static, and its weights depend on it", x.name)
        matrices[i] = axis.matrix(inputs, axis.size)
    return _finish(rewriter, node, _multiply(rewriter, node, matrices, len(axes)))


def _resized(rewriter: Rewriter, node: Node) -> list[_Resize | None] | Refusal:
    """What happens along each axis: nothing, or a Resize by a constant."""
    mode, shape = node.attrs.get("mode", "nearest"), ir.shape(node.inputs[0])
    if mode == "nearest":
        return Refusal("it does not interpolate", node.name)
    if ir.type_name(node.inputs[0]) != "float32" or shape is None:
        return Refusal("it does not resize a float32 tensor of known rank", node.inputs[0].name)
    where = node.attrs.get("coordinate_transformation_mode", "half_pixel")
    if (
        where == "tf_crop_and_resize"
        or node.attrs.get("axes")
        or node.attrs.get("keep_aspect_ratio_policy")
        not in (
            None,
            "stretch",
        )
    ):
        return Refusal("tf_crop_and_resize, axes and keep_aspect_ratio_policy are not supported", node.name)
    scales, sizes = (None if (t := ir.optional_input(node, i)) is None else ir.value(t) for i in (2, 3))
    opset, axes = rewriter.state.graph.opset, list[_Resize | None]()
    for i, length in enumerate(shape):
        if scales is not None and scales.size:
            axes.append(None if scales[i] == 1 else _Resize(node, opset, float(scales[i]), None))
        elif sizes is not None and isinstance(length, int):
            size = int(sizes[i])
            axes.append(None if size == length else _Resize(node, opset, size / length, size))
        else:
            return Refusal("its scales, or its sizes, are not constants", node.name)
    return axes


def average_pool(rewriter: Rewriter, node: Node) -> Refusal | None:
    """AveragePool -> a product with a constant matrix per axis: each window has its own divisor, a product of one per axis."""
    if ir.type_name(node.inputs[0]) != "float32":
        return Refusal("it does not pool a float32 tensor", node.inputs[0].name)
    rank = len(node.attrs["kernel_shape"])
    sizes = [static_axis(node.inputs[0], 2 + i) for i in range(rank)]
    matrices = {}
    for i, inputs in enumerate(sizes):
        if inputs is None:
            return Refusal("its windows have different divisors, and its size is not static", node.inputs[0].name)
        attrs = {k: v for k, v in node.attrs.items() if k in ("auto_pad", "ceil_mode", "count_include_pad")}
        for key, other in (("kernel_shape", 1), ("strides", 1), ("dilations", 1)):
            if key in node.attrs:
                attrs[key] = [node.attrs[key][i], other]
        if "pads" in node.attrs:
            attrs["pads"] = [node.attrs["pads"][i], 0, node.attrs["pads"][rank + i], 0]
        matrices[2 + i] = _response("AveragePool", ["x"], attrs, inputs, rewriter.state.graph.opset, {})
    return _finish(rewriter, node, _multiply(rewriter, node, matrices, 2 + rank))


def _response(
    op: str, names: Sequence[str], attrs: Mapping[str, Any], inputs: int, opset: int, given: Mapping[str, NDArray[Any]]
) -> Matrix:
    """What an operator along axis 2 makes of the unit matrix, shape (outputs, inputs)."""
    node = helper.make_node(op, names, ["y"], **attrs)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, inputs, inputs])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    constants = [helper.make_tensor(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape, v) for k, v in given.items()]
    graph = helper.make_graph([node], op, [x], [y], constants)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])
    [result] = run(session(model), {"x": np.eye(inputs, dtype=np.float32)[None, None]})
    return np.asarray(result[0, 0], np.float64)


def _convolve(
    rewriter: Rewriter, node: Node, channels: int, axes: Sequence[Periodic], sizes: Sequence[int | None]
) -> Tensor:
    """Pad with the outermost values, a Conv with one filter per channel and phase, phases to their places."""
    x, ups = node.inputs[0], [a.up for a in axes]
    if any(a.before or a.behind for a in axes):
        pads = np.array([0, 0, *(a.before for a in axes), 0, 0, *(a.behind for a in axes)], np.int64)
        amounts = rewriter.constant(f"{node.name}_pads", pads)
        x = _made(rewriter.node("Pad", [x, amounts], origin=node, mode="edge"), x)
    filters = np.ones(())
    for axis in axes:
        filters = np.multiply.outer(filters, axis.taps)
    order = (*range(0, 2 * len(axes), 2), *range(1, 2 * len(axes), 2))
    filters = filters.transpose(order).reshape(-1, 1, *(a.taps.shape[1] for a in axes))
    weight = np.tile(filters, (channels, *[1] * (1 + len(axes)))).astype(np.float32)
    operands = [x, rewriter.constant(f"{node.name}_weight", weight)]
    strides = [a.down for a in axes]
    conv = rewriter.node("Conv", operands, origin=node, hint=f"{node.name}_phases", group=channels, strides=strides)
    steps = [None if n is None else n // a.down for n, a in zip(sizes, axes, strict=True)]
    return interleave(rewriter, node, _made(conv, x), channels, ups, steps)


def _multiply(rewriter: Rewriter, node: Node, matrices: Mapping[int, Matrix], rank: int) -> Tensor:
    """Products with matrices along axes, those first that leave the least."""
    x = node.inputs[0]
    for axis in sorted(matrices, key=lambda i: matrices[i].shape[0] / matrices[i].shape[1]):
        swap = [*range(rank)]
        swap[axis], swap[-1] = swap[-1], swap[axis]
        if axis != rank - 1:
            x = _made(rewriter.node("Transpose", [x], origin=node, perm=swap), x)
        matrix = rewriter.constant(f"{node.name}_axis{axis}", matrices[axis].T.astype(np.float32))
        x = _made(rewriter.node("MatMul", [x, matrix], origin=node, hint=f"{node.name}_axis{axis}"), x)
        if axis != rank - 1:
            x = _made(rewriter.node("Transpose", [x], origin=node, perm=swap), x)
    return x


def _made(node: Node, like: Tensor) -> Tensor:
    node.outputs[0].dtype = like.dtype
    return node.outputs[0]


def _finish(rewriter: Rewriter, node: Node, result: Tensor) -> Refusal | None:
    maker = ir.producer(result)
    if result is node.inputs[0] or maker is None:
        return Refusal("it does nothing", node.name)
    rewriter.take_output(maker, node.outputs[0])
    rewriter.remove(node)
    return None
