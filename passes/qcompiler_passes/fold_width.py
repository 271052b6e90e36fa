"""fold-width: convolutions of few channels, such as that of an RGB image, read several columns as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.rewrite import Refusal, Rewriter, apply_rules
from qcompiler.state import CompileState, Phase
from qcompiler.target import Alignment
from qcompiler_passes.form_blocks import activation_bounds
from qcompiler_passes.linear import Linear, read
from qcompiler_passes.match import static_axis

WIDE = 64
"""Output channels from which a folded convolution with twice the products of one with padded channels is the slower one."""

DEAR = 1000
"""Products with zeros, per tap of the filters and pixel of the result, that take as long as reading one pixel by itself."""

MANY_TAPS = 49
"""From larger filters on, reading pixels of 4 channels is no faster than reading those of 3."""


@dataclass(frozen=True)
class FoldWidth:
    """Make convolutions read as many input channels as the target's kernels want, where the input has fewer.

    `f` neighbouring columns of `c` channels become one column of `f * c` channels. The filters grow by zeros, and each is there
    once per column of the result that f columns give; with channels last, as integer kernels want them, these columns are next
    to each other in memory. Where that would be too many products, channels of zeros are added to the input instead.
    """

    name: ClassVar[str] = "fold-width"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of convolutions rewritten."""
        return 0 if self.name in state.skip else apply_rules(Rewriter(state), {"Conv": _rule})


@dataclass(frozen=True)
class _Fold:
    """How the columns of a convolution are folded, for `width` input and `out_width` output columns.

    `columns`: of the input that become one. `repeats`: columns of the result that become one. `kernel`: taps along the folded
    width. `pads`: folded columns of zeros before and after. `added`: columns of zeros that the input needs first.
    """

    columns: int
    repeats: int
    kernel: int
    pads: tuple[int, int]
    width: int
    out_width: int
    added: int

    @property
    def folded(self) -> int:
        """Folded columns of the result."""
        return (self.width + self.added) // self.columns + sum(self.pads) - self.kernel + 1


def _rule(rewriter: Rewriter, node: Node) -> Refusal | None:
    linear, wanted = read(node), rewriter.state.target.alignment
    if isinstance(linear, Refusal):
        return linear
    outputs, channels = linear.raw.shape[:2]
    if channels % wanted.inputs == 0 or channels > wanted.inputs:
        return Refusal(f"{channels} input channels are as many as the target wants", node.name)
    if refusal := _unfit(linear):
        return refusal
    fold = _plan(linear, wanted.inputs // math.gcd(channels, wanted.inputs))
    if fold is not None and not _is_dear(linear, fold, wanted.inputs) and _has_kernel(outputs * fold.repeats, wanted):
        _fold(rewriter, linear, fold)
        return None
    if math.prod(linear.raw.shape[2:]) > MANY_TAPS:
        return Refusal("neither wider columns nor more channels make it faster", node.name)
    if not _has_kernel(outputs, wanted):
        return Refusal(f"{outputs} output channels have no fast kernel", node.name)
    _pad_channels(rewriter, linear, wanted.inputs)
    return None


def _has_kernel(outputs: int, wanted: Alignment) -> bool:
    return outputs % wanted.outputs == 0 and outputs >= wanted.least


def _unfit(linear: Linear) -> Refusal | None:
    node = linear.node
    if linear.shape[0] != 1 or linear.raw.ndim != 4:
        return Refusal("it is not a plain convolution of images", node.name)
    if any(d != 1 for d in node.attrs.get("dilations", [])) or node.attrs.get("auto_pad", "NOTSET") != "NOTSET":
        return Refusal("it has dilations or chooses its own padding", node.name)
    if ir.type_name(node.inputs[0]) != "float32" or len(ir.shape(node.inputs[0]) or ()) != 4:
        return Refusal("the type or the rank of the input is not known", node.inputs[0].name)
    if [static_axis(node.outputs[0], axis) for axis in (2, 3)] == [1, 1]:
        return Refusal("its result is a single pixel", node.outputs[0].name)
    return None


def _pads(node: Node) -> list[int]:
    return [int(p) for p in node.attrs.get("pads") or [0, 0, 0, 0]]


def _strides(node: Node) -> list[int]:
    return [int(s) for s in node.attrs.get("strides") or [1, 1]]


def _plan(linear: Linear, factor: int) -> _Fold | None:
    """How to fold `factor` columns, or a multiple of that which the stride divides; None if sizes are not known or small."""
    node = linear.node
    sizes = [static_axis(t, axis) or 0 for t in (node.inputs[0], node.outputs[0]) for axis in (2, 3)]
    stride, begin, taps = _strides(node)[1], _pads(node)[1], linear.raw.shape[3]
    columns = math.lcm(factor, stride)
    _, width, _, out_width = sizes
    if not all(sizes) or width < columns:
        return None
    repeats = columns // stride
    added = -width % columns
    first, last = -begin // columns, ((repeats - 1) * stride + taps - 1 - begin) // columns
    kernel = last - first + 1
    end = math.ceil(out_width / repeats) + kernel - 1 - (width + added) // columns + first
    return _Fold(columns, repeats, kernel, (-first, max(end, 0)), width, out_width, added)


def _is_dear(linear: Linear, fold: _Fold, inputs: int) -> bool:
    """Whether the products with zeros cost more than folding saves."""
    outputs, channels, _, taps = linear.raw.shape
    products = fold.kernel * fold.columns * channels
    if (products - taps * channels) * outputs > DEAR * taps:
        return True
    return bool(outputs >= WIDE and products >= 2 * taps * inputs)


def _pad_channels(rewriter: Rewriter, linear: Linear, inputs: int) -> None:
    node, x = linear.node, linear.node.inputs[0]
    missing = inputs - linear.shape[2]
    padded = _pad(rewriter, node, x, axis=1, count=missing)
    weight = np.pad(linear.raw, [(0, 0), (0, missing), (0, 0), (0, 0)])
    rewriter.set_input(node, 0, padded)
    rewriter.set_input(node, 1, rewriter.constant(f"{node.name}_weight", weight))


def _pad(rewriter: Rewriter, node: Node, x: Tensor, axis: int, count: int) -> Tensor:
    shape = list(ir.shape(x) or ())
    pads = np.zeros(2 * len(shape), np.int64)
    pads[len(shape) + axis] = count
    shape[axis] = (static_axis(x, axis) or 0) + count
    out = rewriter.variable(f"{node.name}_padded", x.dtype, shape)
    rewriter.node("Pad", [x, rewriter.constant("pads", pads)], [out], origin=node, hint=f"{node.name}_pad")
    return out


def _fold(rewriter: Rewriter, linear: Linear, fold: _Fold) -> None:
    node, x = linear.node, linear.node.inputs[0]
    outputs, channels = linear.raw.shape[:2]
    if fold.added:
        x = _pad(rewriter, node, x, axis=3, count=fold.added)
    wide = _folded(rewriter, node, x, fold, channels)
    chain = [node]  # the activation is absorbed only if it stays next to the convolution
    while (follower := rewriter.only_user(chain[-1].outputs[0])) is not None and activation_bounds(follower):
        chain.append(follower)
    filters, pads, strides = _filters(linear, fold), _pads(node), _strides(node)
    rewriter.set_input(node, 0, wide)
    rewriter.set_input(node, 1, rewriter.constant(f"{node.name}_weight", filters))
    if (bias := ir.optional_input(node, 2)) is not None:
        rewriter.set_input(node, 2, rewriter.constant(bias.name, np.tile(ir.array(bias), fold.repeats)))
    node.attrs["pads"] = [pads[0], fold.pads[0], pads[2], fold.pads[1]]
    node.attrs["strides"] = [strides[0], 1]
    node.attrs["kernel_shape"] = list(filters.shape[2:])
    if fold.repeats > 1 or fold.folded > fold.out_width:
        _unfold(rewriter, chain, fold, outputs)


def _filters(linear: Linear, fold: _Fold) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The filters for folded columns: [repeats * outputs, channels * columns, rows, kernel]."""
    outputs, channels, rows, taps = linear.raw.shape
    stride, begin = _strides(linear.node)[1], _pads(linear.node)[1]
    wide = np.zeros((fold.repeats, outputs, channels, fold.columns, rows, fold.kernel), linear.raw.dtype)
    for repeat in range(fold.repeats):
        for tap in range(taps):
            column, place = divmod(repeat * stride + tap - begin, fold.columns)
            wide[repeat, :, :, place, :, column + fold.pads[0]] = linear.raw[..., tap]
    return wide.reshape(fold.repeats * outputs, channels * fold.columns, rows, fold.kernel)


def _folded(rewriter: Rewriter, node: Node, x: Tensor, fold: _Fold, channels: int) -> Tensor:
    """x as [batch, channels * columns, rows, width / columns], cut so that columns stay next to each other in memory."""
    rows, width = static_axis(x, 2) or 0, (fold.width + fold.added) // fold.columns
    cut = _reshaped(rewriter, node, x, [channels, rows, width, fold.columns])
    last = _transposed(rewriter, node, cut, [0, 2, 3, 1, 4])
    joined = _reshaped(rewriter, node, last, [rows, width, channels * fold.columns])
    return _transposed(rewriter, node, joined, [0, 3, 1, 2])


def _reshaped(rewriter: Rewriter, node: Node, x: Tensor, shape: Sequence[int]) -> Tensor:
    """x with these axes behind the batch axis."""
    out = rewriter.variable(f"{node.name}_reshaped", x.dtype, [(ir.shape(x) or (None,))[0], *shape])
    target = rewriter.constant("shape", np.array([0, *shape], np.int64))
    rewriter.node("Reshape", [x, target], [out], origin=node, hint=f"{node.name}_reshape")
    return out


def _transposed(rewriter: Rewriter, node: Node, x: Tensor, perm: Sequence[int]) -> Tensor:
    shape = ir.shape(x) or ()
    out = rewriter.variable(f"{node.name}_transposed", x.dtype, [shape[axis] for axis in perm])
    rewriter.node("Transpose", [x], [out], origin=node, hint=f"{node.name}_transpose", perm=list(perm))
    return out


def _unfold(rewriter: Rewriter, chain: Sequence[Node], fold: _Fold, outputs: int) -> None:
    """Give the results of the nodes their folded shape, and unfold the last one into the tensor that it was."""
    node, result = chain[0], chain[-1].outputs[0]
    batch, _, rows, _ = ir.shape(result) or ()
    raw = rewriter.cut(result)
    for tensor in (*(n.outputs[0] for n in chain[:-1]), raw):
        tensor.shape = [batch, outputs * fold.repeats, rows, fold.folded]
    last = _transposed(rewriter, node, raw, [0, 2, 3, 1])
    wide = _reshaped(rewriter, node, last, [static_axis(raw, 2) or 0, fold.folded * fold.repeats, outputs])
    if fold.folded * fold.repeats > fold.out_width:
        cut = rewriter.variable(f"{node.name}_cut", raw.dtype, [batch, rows, fold.out_width, outputs])
        bounds = [np.array([i], np.int64) for i in (0, fold.out_width, 2)]
        inputs = [wide, *(rewriter.constant(k, v) for k, v in zip(("start", "end", "axis"), bounds, strict=True))]
        rewriter.node("Slice", inputs, [cut], origin=node, hint=f"{node.name}_slice")
        wide = cut
    final = rewriter.node("Transpose", [wide], origin=node, hint=f"{node.name}_transpose", perm=[0, 3, 1, 2])
    rewriter.take_output(final, result)
