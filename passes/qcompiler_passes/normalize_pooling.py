"""normalize-pooling: means over space in the form that has an integer kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler import ir
from qcompiler.ir import Node
from qcompiler.rewrite import Refusal, Rewriter, Rule, apply_rules
from qcompiler.state import CompileState, Phase
from qcompiler_passes.form_blocks import activation_bounds
from qcompiler_passes.match import reduced_axes, squared, static_axis


@dataclass(frozen=True)
class NormalizePooling:
    """Turn a ReduceMean or an AveragePool over all of space into GlobalAveragePool, other AveragePools into depthwise Conv.

    The Conv is made only where the target asks for `average-pool-as-conv`, and only if all windows have the same divisor.
    A Relu or Clip behind a MaxPool moves before it, to the operator that can absorb it.
    """

    name: ClassVar[str] = "normalize-pooling"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None
    in_bodies: ClassVar[bool] = True

    def run(self, state: CompileState) -> int:
        """Return the number of nodes rewritten."""
        rules: dict[str, Rule] = {"ReduceMean": spatial_mean, "AveragePool": average_pool, "MaxPool": max_pool}
        return apply_rules(Rewriter(state), rules)


def spatial_mean(rewriter: Rewriter, node: Node) -> Refusal | None:
    """ReduceMean over all axes from 2 on -> GlobalAveragePool, and Squeeze if the axes are dropped."""
    x = node.inputs[0]
    shape, axes = ir.shape(x), reduced_axes(node)
    if shape is None or axes is None:
        return Refusal("the rank or the axes are not known", x.name)
    if not 3 <= len(shape) <= 5 or axes != tuple(range(2, len(shape))):
        return Refusal(f"it reduces axes {list(axes)} of {len(shape)}, not just all of space", node.name)
    if squared(x) is not None:
        return Refusal("it is a mean of squares, part of a normalization for which there are kernels", x.name)
    if refusal := _not_float32(node):
        return refusal
    if node.attrs.get("keepdims", 1):
        _global_average(rewriter, node)
        return None
    pooled = rewriter.variable(f"{node.name}_pooled", x.dtype, [*shape[:2], *[1] * len(axes)])
    rewriter.node("GlobalAveragePool", [x], [pooled], origin=node)
    if rewriter.state.graph.opset < 13:
        squeeze = rewriter.node("Squeeze", [pooled], origin=node, axes=list(axes))
    else:
        squeeze = rewriter.node("Squeeze", [pooled, rewriter.constant("axes", np.array(axes, np.int64))], origin=node)
    rewriter.take_output(squeeze, node.outputs[0])
    rewriter.remove(node)
    return None


def average_pool(rewriter: Rewriter, node: Node) -> Refusal | None:
    """AveragePool with one window -> GlobalAveragePool; with equal windows -> Conv, one filter of 1 / size per channel."""
    kernel = [int(k) for k in node.attrs["kernel_shape"]]
    if refusal := _not_float32(node):
        return refusal
    pads = _pads(node, kernel)
    if pads is None:
        return Refusal(f"auto_pad={node.attrs['auto_pad']} of an input whose size is not static", node.inputs[0].name)
    if not any(pads) and kernel == [static_axis(node.inputs[0], 2 + i) for i in range(len(kernel))]:
        _global_average(rewriter, node)
        return None
    if "average-pool-as-conv" not in rewriter.state.target.rewrites:
        return Refusal(f"target {rewriter.state.target.name} does not ask for average-pool-as-conv", node.name)
    channels = static_axis(node.inputs[0], 1)
    if channels is None:
        return Refusal("the number of channels is not static", node.inputs[0].name)
    if any(pads) and not node.attrs.get("count_include_pad", 0):
        return Refusal("windows at the border have smaller divisors (count_include_pad=0)", node.name)
    if node.attrs.get("ceil_mode", 0) and not _windows_fit(node, kernel, pads):
        return Refusal("ceil_mode=1 may add windows that hang over the border", node.name)
    _depthwise_conv(rewriter, node, channels, kernel, pads)
    return None


def max_pool(rewriter: Rewriter, node: Node) -> Refusal | None:
    """MaxPool, then Relu or Clip -> Relu or Clip, then MaxPool: what never decreases commutes with the maximum."""
    source, result = node.inputs[0], node.outputs[0]
    follower = rewriter.only_user(result)
    if follower is None or activation_bounds(follower) is None or len(node.outputs) > 1:
        return Refusal("no Relu or Clip alone reads the result", result.name)
    if rewriter.only_user(source) is None or ir.producer(source) is None:
        return Refusal("the input is also read elsewhere", source.name)
    final = follower.outputs[0]
    bounded = rewriter.variable(f"{follower.name}_output", source.dtype, source.shape)
    rewriter.set_input(follower, 0, source)
    rewriter.set_input(node, 0, bounded)
    rewriter.take_output(node, final)
    rewriter.take_output(follower, bounded)
    return None


def _not_float32(node: Node) -> Refusal | None:
    dtype = node.inputs[0].dtype
    known = dtype is not None and np.dtype(dtype) == np.float32
    return None if known else Refusal("only float32 tensors are rewritten", node.inputs[0].name)


def _global_average(rewriter: Rewriter, node: Node) -> None:
    new = rewriter.node("GlobalAveragePool", node.inputs[:1], origin=node)
    rewriter.take_output(new, node.outputs[0])
    rewriter.remove(node)


def _depthwise_conv(rewriter: Rewriter, node: Node, channels: int, kernel: list[int], pads: list[int]) -> None:
    filters = np.full((channels, 1, *kernel), 1 / math.prod(kernel), np.float32)
    new = rewriter.node(
        "Conv",
        [node.inputs[0], rewriter.constant(f"{node.name}_weight", filters)],
        origin=node,
        kernel_shape=kernel,
        strides=_strides(node, kernel),
        dilations=_dilations(node, kernel),
        pads=pads,
        group=channels,
    )
    rewriter.take_output(new, node.outputs[0])
    rewriter.remove(node)


def _strides(node: Node, kernel: Sequence[int]) -> list[int]:
    return [int(s) for s in node.attrs.get("strides", [1] * len(kernel))]


def _dilations(node: Node, kernel: Sequence[int]) -> list[int]:
    return [int(d) for d in node.attrs.get("dilations", [1] * len(kernel))]


def _extents(node: Node, kernel: Sequence[int]) -> list[int]:
    """The length of input that a window spans, per spatial axis."""
    return [(k - 1) * d + 1 for k, d in zip(kernel, _dilations(node, kernel), strict=True)]


def _pads(node: Node, kernel: Sequence[int]) -> list[int] | None:
    """All begins, then all ends, with auto_pad worked out; None if that needs a size that is not static."""
    mode = node.attrs.get("auto_pad", "NOTSET")
    if mode in {"NOTSET", "VALID"}:
        given = node.attrs.get("pads") if mode == "NOTSET" else None
        return [int(p) for p in given or [0] * (2 * len(kernel))]
    begins, ends = [], []
    for i, (extent, stride) in enumerate(zip(_extents(node, kernel), _strides(node, kernel), strict=True)):
        size = static_axis(node.inputs[0], 2 + i)
        if size is None:
            return None
        total = max((math.ceil(size / stride) - 1) * stride + extent - size, 0)
        begins.append(total // 2 if mode == "SAME_UPPER" else total - total // 2)
        ends.append(total - begins[-1])
    return begins + ends


def _windows_fit(node: Node, kernel: Sequence[int], pads: Sequence[int]) -> bool:
    """Whether the windows end where the padded input ends, so that rounding up adds none."""
    for i, (extent, stride) in enumerate(zip(_extents(node, kernel), _strides(node, kernel), strict=True)):
        size = static_axis(node.inputs[0], 2 + i)
        if size is None or (size + pads[i] + pads[i + len(kernel)] - extent) % stride:
            return False
    return True
