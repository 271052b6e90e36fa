"""The rules of `recompose` for patterns that span axes: LayerNormalization, Softmax, channel shuffle."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler_passes.match import NO_MATCH, collapse, made_by, reduced_axes, scalar_operand, static_axis


def layer_normalization(rewriter: Rewriter, node: Node) -> Refusal | None:
    """(x - mean) / Sqrt(variance + epsilon) over the last axis -> LayerNormalization with a scale of ones."""
    for centred, other in (node.inputs, node.inputs[::-1]) if len(node.inputs) == 2 else ():
        nodes: list[Node] = []
        x = _centred(centred, nodes)
        found = None if x is None else _variance(_radicand(node, other, nodes), x, nodes)
        if x is None or found is None:
            continue
        width = static_axis(x, -1)
        if rewriter.state.graph.opset < 17:
            return Refusal("LayerNormalization needs opset 17", node.name)
        if width is None:
            return Refusal("the length of the last axis is not static", x.name)
        scale = rewriter.constant("scale", np.ones(width, np.float32))
        return collapse(rewriter, node, nodes, "LayerNormalization", [x, scale], axis=-1, epsilon=found)
    return NO_MATCH


def _centred(tensor: Tensor, nodes: list[Node]) -> Tensor | None:
    """x, if the tensor is x - ReduceMean(x) over the last axis."""
    sub = made_by(tensor, "Sub")
    mean = None if sub is None else _last_axis_mean(sub.inputs[1])
    if sub is None or mean is None or mean.inputs[0] is not sub.inputs[0]:
        return None
    nodes += [sub, mean]
    return sub.inputs[0]


def _last_axis_mean(tensor: Tensor) -> Node | None:
    node = made_by(tensor, "ReduceMean")
    if node is None or not node.attrs.get("keepdims", 1):
        return None
    shape = ir.shape(node.inputs[0])
    return node if shape is not None and reduced_axes(node) == (len(shape) - 1,) else None


def _radicand(node: Node, tensor: Tensor, nodes: list[Node]) -> Tensor | None:
    """r, if the node divides by the square root of r: `node` is a Div or Mul, `tensor` its other operand."""
    if node.op == "Mul":
        reciprocal = made_by(tensor, "Reciprocal")
        if reciprocal is not None:
            nodes.append(reciprocal)
            tensor = reciprocal.inputs[0]
        else:
            inverse = made_by(tensor, "Div")
            if inverse is None or scalar_operand(inverse, 0) != 1:
                return None
            nodes.append(inverse)
            tensor = inverse.inputs[1]
    elif node.inputs[1] is not tensor:
        return None
    root = made_by(tensor, "Sqrt")
    if root is None:
        root = made_by(tensor, "Pow")
        if root is None or scalar_operand(root, 1) != 0.5:
            return None
    nodes.append(root)
    return root.inputs[0]


def _variance(tensor: Tensor | None, x: Tensor, nodes: list[Node]) -> float | None:
    """Epsilon, if the tensor is the variance of x plus epsilon."""
    add = None if tensor is None else made_by(tensor, "Add")
    if add is None:
        return None
    for index in (0, 1):
        epsilon, mean = scalar_operand(add, index), _last_axis_mean(add.inputs[1 - index])
        square = None if mean is None else ir.producer(mean.inputs[0])
        if epsilon is None or mean is None or square is None or square.domain:
            continue
        squared = square.op == "Pow" and scalar_operand(square, 1) == 2
        if not squared and not (square.op == "Mul" and square.inputs[0] is square.inputs[1]):
            continue
        if _centred(square.inputs[0], nodes) is x:
            nodes += [add, mean, square]
            return epsilon
    return None


def fold_affine(rewriter: Rewriter, node: Node) -> Refusal | None:
    """LayerNormalization, then Mul by or Add of a constant per element of the last axis -> its scale and bias."""
    for index in (0, 1):
        norm, array = made_by(node.inputs[index], "LayerNormalization"), ir.value(node.inputs[1 - index])
        if norm is None or array is None:
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
        return collapse(rewriter, node, [norm], "LayerNormalization", inputs, **norm.attrs)
    return NO_MATCH


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
