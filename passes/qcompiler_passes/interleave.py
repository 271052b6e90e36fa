"""ConvTranspose as a Conv: the pixels of each phase are channels, which then move to their places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.ops import Lowering, op_key
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler_passes.form_blocks import activation_bounds
from qcompiler_passes.linear import Linear, read
from qcompiler_passes.match import static_axis

END = np.iinfo(np.int64).max

LEAST_CHANNELS = 16
"""Input channels from which convolutions in int8 are faster than in float."""


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a ConvTranspose: pixel `stride * q + r` of the whole result reads input q - j through tap
    (r + stride * j) / dilation of the kernel, where that is a whole number.

    `begin`: pixels of the whole result that pads cut off. `end`: pixels from the last input pixel's first on, to the end.
    """

    kernel: int
    stride: int
    dilation: int
    begin: int
    end: int

    @property
    def taps(self) -> int:
        """The inputs that one result reads, at most."""
        return (self.kernel - 1) * self.dilation // self.stride + 1

    @property
    def pads(self) -> tuple[int, int]:
        """The pads of the Conv: it leaves out whole steps of what is cut off."""
        return self.taps - 1 - min(self.begin // self.stride, self.taps - 1), max(-(-self.end // self.stride) - 1, 0)

    @property
    def crops(self) -> tuple[int, int]:
        """The pixels that the Conv makes too many, at both ends."""
        before, behind = self.pads
        return self.begin - (self.taps - 1 - before) * self.stride, self.stride * (behind + 1) - self.end

    def phases(self) -> NDArray[np.int64]:
        """The tap of the kernel for each phase and input, shape (stride, taps), the first input first; -1: none."""
        position = np.arange(self.stride)[:, None] + self.stride * np.arange(self.taps)[::-1]
        return np.where((position % self.dilation == 0) & (position < self.kernel * self.dilation), position, -1) // (
            self.dilation
        )


def conv_transpose(rewriter: Rewriter, node: Node) -> Refusal | None:
    """ConvTranspose -> Conv, DepthToSpace, Slice. Functions of single elements behind it move to where the Conv absorbs them."""
    linear = read(node)
    if isinstance(linear, Refusal):
        return linear
    if linear.raw.dtype != np.float32:
        return Refusal(f"it computes in {linear.raw.dtype}", node.name)
    axes = _axes(node, linear)
    if isinstance(axes, Refusal):
        return axes
    target = rewriter.state.target
    if "conv-transpose-as-conv" not in target.rewrites and not _pays(linear, axes):
        return Refusal(
            f"its windows do not overlap evenly, or it is narrow: {target.name} would gain nothing", node.name
        )
    sizes = [static_axis(node.inputs[0], 2 + i) for i in range(len(axes))]
    if not can_interleave([a.stride for a in axes], sizes):
        return Refusal("its strides differ and its size is not static", node.name)
    _expand(rewriter, linear, axes)
    return None


def _pays(linear: Linear, axes: Sequence[Axis]) -> bool:
    """Whether several taps, the same number in all phases, make up for moving the pixels, and a kernel is fast so wide."""
    overlap = all(a.stride > 1 and a.taps > 1 and a.kernel == a.stride * a.taps for a in axes)
    return overlap and linear.weight.shape[0] == 1 and linear.weight.shape[2] >= LEAST_CHANNELS


def _axes(node: Node, linear: Linear) -> list[Axis] | Refusal:
    kernel = linear.raw.shape[2:]
    rank = len(kernel)
    strides, dilations = (list(node.attrs.get(k) or [1] * rank) for k in ("strides", "dilations"))
    added = list(node.attrs.get("output_padding") or [0] * rank)
    extents = [(k - 1) * d + 1 + a for k, d, a in zip(kernel, dilations, added, strict=True)]
    mode, wanted = node.attrs.get("auto_pad", "NOTSET"), node.attrs.get("output_shape")
    pads = list(node.attrs.get("pads") or [0] * 2 * rank)
    if wanted:
        sizes = [static_axis(node.inputs[0], 2 + i) for i in range(rank)]
        if None in sizes:
            return Refusal("output_shape of an input whose size is not static", node.inputs[0].name)
        totals = [
            s * ((n or 0) - 1) + e - w for s, n, e, w in zip(strides, sizes, extents, wanted[-rank:], strict=True)
        ]
        pads = _shared(totals, mode)
    elif mode != "NOTSET":
        totals = [0] * rank if mode == "VALID" else [e - s for e, s in zip(extents, strides, strict=True)]
        pads = _shared(totals, mode)
    if min(pads) < 0:
        return Refusal("its pads are negative", node.name)
    return [Axis(kernel[i], strides[i], dilations[i], pads[i], extents[i] - pads[rank + i]) for i in range(rank)]


def _shared(totals: Sequence[int], mode: str) -> list[int]:
    """Pads at all begins, then at all ends; of an odd number the larger part is at the end for SAME_UPPER only."""
    needed = [max(t, 0) for t in totals]
    begins = [t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in needed]
    return begins + [t - b for t, b in zip(needed, begins, strict=True)]


def _expand(rewriter: Rewriter, linear: Linear, axes: Sequence[Axis]) -> None:
    node, strides = linear.node, [a.stride for a in axes]
    groups, outputs, inputs, _ = linear.weight.shape
    phases = math.prod(strides)
    operands = [node.inputs[0], rewriter.constant(f"{node.name}_weight", _weight(linear, axes))]
    if (bias := ir.optional_input(node, 2)) is not None:
        operands.append(rewriter.constant(bias.name, np.repeat(ir.array(bias).reshape(-1), phases)))
    pads = [a.pads[end] for end in (0, 1) for a in axes]
    chain = [rewriter.node("Conv", operands, origin=node, hint=f"{node.name}_phases", pads=pads, group=groups)]
    functions = _functions_behind(rewriter, node)
    for step in functions:
        inputs = [chain[-1].outputs[0], *step.inputs[1:]]
        chain.append(rewriter.node(step.op, inputs, origin=step, domain=step.domain or "", **step.attrs))
    for made in chain:
        made.outputs[0].dtype = node.inputs[0].dtype
    sizes = [static_axis(node.inputs[0], 2 + i) for i in range(len(axes))]
    steps = [None if n is None else n + sum(a.pads) - a.taps + 1 for n, a in zip(sizes, axes, strict=True)]
    moved = interleave(rewriter, node, chain[-1].outputs[0], groups * outputs, strides, steps)
    last = ir.producer(_crop(rewriter, node, moved, [a.crops for a in axes]))
    assert last is not None
    rewriter.take_output(last, (functions or [node])[-1].outputs[0])
    for done in (*reversed(functions), node):
        rewriter.remove(done)


def _weight(linear: Linear, axes: Sequence[Axis]) -> NDArray[np.float32]:
    """The weight of the Conv, channels of the result outside, phases inside: (channels * phases, inputs, *taps)."""
    groups, outputs, inputs, _ = linear.weight.shape
    weight = linear.weight.reshape(groups * outputs, inputs, *linear.raw.shape[2:])
    for i, axis in enumerate(axes):
        phases = axis.phases()
        behind = [1] * (len(axes) - 1 - i)
        weight = np.take(weight, phases, axis=2 + 2 * i) * (phases >= 0).reshape(*phases.shape, *behind)
    rank = len(axes)
    order = (0, *(2 + 2 * i for i in range(rank)), 1, *(3 + 2 * i for i in range(rank)))
    taps = [a.taps for a in axes]
    return np.ascontiguousarray(weight.transpose(order).reshape(-1, inputs, *taps), np.float32)


def _functions_behind(rewriter: Rewriter, node: Node) -> list[Node]:
    """The functions of single elements that follow a node, and nothing else reads what is between."""
    found: list[Node] = []
    while (follower := rewriter.only_user((found or [node])[-1].outputs[0])) is not None:
        rule = rewriter.state.ops.get(op_key(follower.op, follower.domain))
        is_table = rule is not None and rule.lowering is Lowering.TABLE and len(follower.inputs) == 1
        if not is_table and activation_bounds(follower) is None:
            break
        found.append(follower)
    return found


def can_interleave(factors: Sequence[int], sizes: Sequence[int | None]) -> bool:
    """Whether pixels can move to their places: by DepthToSpace, or by Reshape to shapes that are known."""
    return len(factors) == 1 or (len(factors) == 2 and len(set(factors)) == 1) or None not in sizes


def interleave(
    rewriter: Rewriter, origin: Node, x: Tensor, channels: int, factors: Sequence[int], sizes: Sequence[int | None]
) -> Tensor:
    """Channels of `x` that are phases, those of the last axis innermost, become pixels: (N, channels, *(sizes * factors)).

    sizes: the spatial sizes of `x`, which `can_interleave` accepts.
    """
    if math.prod(factors) == 1:
        return x
    if len(factors) == 2 and factors[0] == factors[1]:
        made = rewriter.node("DepthToSpace", [x], origin=origin, blocksize=factors[0], mode="CRD")
        return made.outputs[0]
    rank = len(factors)
    known = [-1 if n is None else n for n in sizes]
    order = [0, 1, *(axis for i in range(rank) for axis in (2 + rank + i, 2 + i))]
    merged = [-1 if n is None else n * f for n, f in zip(sizes, factors, strict=True)]

    def reshape(tensor: Tensor, shape: Sequence[int]) -> Tensor:
        wanted = rewriter.constant(f"{origin.name}_shape", np.array(shape, np.int64))
        return rewriter.node("Reshape", [tensor, wanted], origin=origin).outputs[0]

    apart = reshape(x, [0, channels, *factors, *known])
    moved = rewriter.node("Transpose", [apart], origin=origin, perm=order).outputs[0]
    return reshape(moved, [0, channels, *merged])


def _crop(rewriter: Rewriter, origin: Node, x: Tensor, crops: Sequence[tuple[int, int]]) -> Tensor:
    """Cut pixels off at the begin and the end of each spatial axis."""
    cut = [(2 + i, before, -behind or END) for i, (before, behind) in enumerate(crops) if before or behind]
    if not cut:
        return x
    axes, starts, ends = (np.array(column, np.int64) for column in zip(*cut, strict=True))
    bounds = [
        rewriter.constant(f"{origin.name}_{k}", v) for k, v in (("starts", starts), ("ends", ends), ("axes", axes))
    ]
    return rewriter.node("Slice", [x, *bounds], origin=origin).outputs[0]
