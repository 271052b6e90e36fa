"""The rules of `recompose` for patterns that span axes: Softmax, channel shuffle."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler_passes.match import NO_MATCH, collapse, made_by, reduced_axes, static_axis


def softmax(rewriter: Rewriter, node: Node) -> Refusal | None:
    """Exp(x - ReduceMax(x)) / ReduceSum(Exp(...)) over one axis -> Softmax."""
    exp, total = made_by(node.inputs[0], "Exp"), made_by(node.inputs[1], "ReduceSum")
    if exp is None or total is None or total.inputs[0] is not node.inputs[0]:
        return NO_MATCH
    sub = made_by(exp.inputs[0], "Sub")
    top = None if sub is None else made_by(sub.inputs[1], "ReduceMax")
    if sub is None or top is None or top.inputs[0] is not sub.inputs[0]:
        return Refusal("the largest value is not taken off, so large inputs overflow", exp.name)
    axes = reduced_axes(total)
    if axes is None or len(axes) != 1 or reduced_axes(top) != axes:
        return Refusal("it does not reduce one known axis", total.name)
    if not (total.attrs.get("keepdims", 1) and top.attrs.get("keepdims", 1)):
        return Refusal("a reduced axis is dropped", total.name)
    return collapse(rewriter, node, [exp, total, sub, top], "Softmax", [sub.inputs[0]], axis=axes[0])


def channel_shuffle(rewriter: Rewriter, node: Node) -> Refusal | None:
    """Reshape, Transpose, Reshape that only permute channels -> Gather of channels, where the target asks for it.

    A Gather of one index of axis 0 may follow, as in the shuffle of ShuffleNetV2 (Ma et al. 2018, arXiv 1807.11164).
    """
    chain = _shuffle_chain(node)
    if not chain:
        return NO_MATCH
    if "channel-shuffle" not in rewriter.state.target.rewrites:
        return Refusal(f"target {rewriter.state.target.name} does not ask for channel-shuffle", node.name)
    x = chain[0].inputs[0]
    channels = _gathered_channels(chain, x)
    if channels is None:
        return Refusal("it is not a choice of whole channels", chain[0].name)
    indices = rewriter.constant("channels", channels)
    if node.op == "Reshape":
        return collapse(rewriter, node, chain, "Gather", [x, indices], axis=1)
    other = next((n for n in rewriter.users(node.inputs[0]) if n.op != "Gather"), None)
    if other is not None or any(rewriter.only_user(n.outputs[0]) is None for n in chain[:2]):
        return Refusal("something else reads the shuffled tensor", chain[2].name)
    # The parts share the chain, so it stays until the last of them is replaced.
    new = rewriter.node("Gather", [x, indices], origin=(node, *chain), axis=1)
    rewriter.take_output(new, node.outputs[0])
    rewriter.remove(node)
    return None


def _shuffle_chain(node: Node) -> list[Node]:
    """The nodes from the first Reshape on, or none."""
    chain = [node]
    wanted = ["Transpose", "Reshape"] if node.op == "Reshape" else ["Reshape", "Transpose", "Reshape"]
    if node.op == "Gather":
        index = ir.value(node.inputs[1])
        if index is None or index.ndim or node.attrs.get("axis", 0):
            return []
    for op in wanted:
        maker = made_by(chain[0].inputs[0], op)
        if maker is None:
            return []
        chain.insert(0, maker)
    return chain


def _gathered_channels(chain: list[Node], x: Tensor) -> NDArray[np.int64] | None:
    """The channel of x behind each channel of the result, found by sending the numbers of all elements through the chain.

    Unknown axes are tried with two different lengths.
    """
    shape = ir.shape(x)
    channels = static_axis(x, 1)
    if shape is None or channels is None or len(shape) < 3:
        return None
    results = []
    for primes in ((2, 3, 5, 7), (3, 5, 7, 11)):
        trial = [static_axis(x, i) or primes[i % 4] for i in range(len(shape))]
        numbers = np.arange(math.prod(trial)).reshape(trial)
        moved = _send(chain, numbers)
        if moved is None or moved.ndim != len(shape) or moved.shape[0] != trial[0]:
            return None
        first = moved.reshape(trial[0], moved.shape[1], -1)[0, :, 0] // math.prod(trial[2:])
        if np.any(first >= channels) or not np.array_equal(numbers.take(first, axis=1), moved):
            return None
        results.append(first)
        if ir.static_shape(x) is not None:
            break
    return results[0].astype(np.int64) if all(np.array_equal(r, results[0]) for r in results) else None


def _send(chain: list[Node], numbers: NDArray[np.int64]) -> NDArray[np.int64] | None:
    for node in chain:
        if node.op == "Transpose":
            numbers = numbers.transpose(node.attrs.get("perm"))
            continue
        operand = ir.value(node.inputs[1])
        if operand is None or node.attrs.get("allowzero", 0):
            return None
        try:
            if node.op == "Gather":
                numbers = numbers[int(operand)]
            else:
                target = [numbers.shape[i] if d == 0 else int(d) for i, d in enumerate(operand)]
                numbers = numbers.reshape(target)
        except (ValueError, IndexError):
            return None
    return numbers
