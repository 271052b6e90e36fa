"""Means and PRelu on integers: how they stand between Q and DQ, and their integer form. The arithmetic: `integer_functions`."""

from __future__ import annotations

import numpy as np

from qcompiler import functions, integer_functions, ir, quant
from qcompiler.ir import Node, Tensor
from qcompiler.ops import Lowering, quantized_rule
from qcompiler.quant import QuantParams
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler_passes.integer_nodes import dequantized, operands, quantizer, requantize, rescale
from qcompiler_passes.match import reduced_axes


def count_in_steps(rewriter: Rewriter) -> None:
    """Let means between DQ and Q compute in units of their input's steps: float32 is exact there.

    An Identity before the DQ and one behind the Q stand for the change of scale.
    """
    for node in list(rewriter.graph.nodes):
        block = rewriter.state.blocks.get(node.name)
        if block is None or not block.quantized:
            continue
        if quantized_rule(rewriter.state.ops, node).lowering is Lowering.MEAN:
            found = operands(rewriter, node)
            if not isinstance(found, Refusal):
                [x], [p_x], q, p_y = found
                _count(rewriter, node, x, p_x, q, p_y)


def _count(rewriter: Rewriter, node: Node, x: Tensor, p_x: QuantParams, q: Node, p_y: QuantParams) -> None:
    y, table = q.outputs[0], rewriter.state.params
    counted, mean = (rewriter.variable(f"{t.name}_steps", t.dtype, t.shape) for t in (x, y))
    table[counted.name], table[mean.name] = p_x.with_scale(1.0), p_y.with_scale(p_y.scale / p_x.scale)
    rewriter.node("Identity", [x], [counted], origin=node, hint=f"{node.name}_count")
    zero = np.asarray(p_x.zero_point, p_x.spec.dtype)
    scales = [np.ones((), np.float32), table[mean.name].scale]
    one, step = (rewriter.constant(f"{t.name}_scale", s) for t, s in zip((counted, mean), scales, strict=True))
    numbers = rewriter.variable(f"{counted.name}_dq", np.dtype(np.float32), x.shape)
    inputs = [counted, one, rewriter.constant(f"{counted.name}_zero_point", zero)]
    rewriter.node("DequantizeLinear", inputs, [numbers], origin=node, hint=f"{node.name}_dequantize")
    rewriter.set_input(node, 0, numbers)
    rewriter.set_input(q, 1, step)
    rewriter.take_output(rewriter.node("Identity", [mean], origin=node, hint=f"{node.name}_scale"), y)
    rewriter.take_output(q, mean)


def round_slopes(rewriter: Rewriter, node: Node, p_x: QuantParams, p_y: QuantParams) -> None:
    """Give a PRelu the slopes that its integer form has."""
    slope = integer_functions.rounded_slope(ir.array(node.inputs[1]), float(p_x.scale), float(p_y.scale))
    rewriter.set_input(node, 1, rewriter.constant(node.inputs[1].name, slope))


def fold_mean(rewriter: Rewriter, node: Node) -> Refusal | None:
    """Identity, DQ, ReduceMean, Q, Identity -> ReduceSum and Divide."""
    dq, q, axes = dequantized(node.inputs[0]), quantizer(rewriter, node.outputs[0]), reduced_axes(node)
    count = None if dq is None else ir.producer(dq.inputs[0])
    back = None if q is None else rewriter.only_user(q.outputs[0])
    if count is None or q is None or back is None or axes is None:
        return Refusal("it does not stand between DQ and Q", node.name)
    p_x, p_y = (rewriter.state.params[t.name] for t in (count.outputs[0], q.outputs[0]))
    bits = integer_functions.halvings(float(p_x.scale), float(p_y.scale))
    if bits is None:
        return Refusal("the scale of the mean is not 2**-n of its input's", node.name)
    x, keep = count.inputs[0], node.attrs.get("keepdims", 1)
    wanted = rewriter.constant(f"{node.name}_axes", np.asarray(axes, np.int64))
    centred = rescale(rewriter, node, x, p_x, 1)
    acc = rewriter.node("ReduceSum", [centred, wanted], origin=node, hint=f"{node.name}_sum", keepdims=keep).outputs[0]
    shape = rewriter.node("Shape", [x], origin=node).outputs[0]
    lengths = rewriter.node("Gather", [shape, wanted], origin=node, axis=0).outputs[0]
    size = rewriter.node("ReduceProd", [lengths], origin=node, keepdims=0).outputs[0]
    zero, low, high = (np.asarray(v, p_y.spec.dtype) for v in (p_y.zero_point, p_y.spec.qmin, p_y.spec.qmax))
    given = {"factor": np.asarray(2**bits, np.int64), "zero_point": zero, "qmin": low, "qmax": high}
    inputs = [acc, size, *(rewriter.constant(f"{node.name}_{k}", v) for k, v in given.items())]
    made = rewriter.node("Divide", inputs, origin=node, hint=f"{node.name}_divide", domain=functions.DOMAIN)
    rewriter.take_output(made, back.outputs[0])
    for done in (back, q, node):
        rewriter.remove(done)
    return None


def fold_slopes(rewriter: Rewriter, node: Node) -> Refusal | None:
    """DQ, PRelu, Q -> Slopes and Requantize."""
    found, slope = operands(rewriter, node), ir.value(node.inputs[1])
    if isinstance(found, Refusal) or slope is None:
        return found if isinstance(found, Refusal) else Refusal("its slope is not a constant", node.name)
    [x], [p_x], q, p_y = found
    above = integer_functions.upper_slope(float(p_x.scale), float(p_y.scale))
    if above is None:
        return Refusal("the ratio of its scales is no multiple of 2**-12 without ties", node.name)
    below = integer_functions.lower_slopes(slope, float(p_x.scale), float(p_y.scale))
    given = {
        "zero": np.asarray(p_x.zero_point, p_x.spec.dtype),
        "above": np.asarray(above, np.int32),
        "below": below.astype(np.int32),
    }
    inputs = [x, *(rewriter.constant(f"{node.name}_{k}", v) for k, v in given.items())]
    acc = rewriter.node("Slopes", inputs, origin=node, domain=functions.DOMAIN).outputs[0]
    acc.dtype, acc.shape = np.dtype(np.int32), x.shape
    requantize(rewriter, node, acc, np.asarray(1), p_y, quant.RATIO_SHIFT, q)
    rewriter.remove(node)
    return None
