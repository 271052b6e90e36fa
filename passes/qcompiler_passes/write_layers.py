"""What insert-qdq writes in integers at once: LayerNorm, Softmax, attention x V, and sums with Power-of-Two Factors.

Their integer arithmetic is not that of the float operator between Q and DQ, so that there is one form of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qcompiler import functions, integer_layers, ir, quant
from qcompiler.ir import Node, Tensor
from qcompiler.ops import Lowering, quantized_rule
from qcompiler.quant import Array, QuantParams
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler_passes.integer_nodes import operands, requantize, rescale


def write_layers(rewriter: Rewriter) -> None:
    """Replace each such layer of the graph, with the Q and DQ around it, by functions on integers."""
    _quantize_masks(rewriter)
    for node in list(rewriter.graph.nodes):
        block = rewriter.state.blocks.get(node.name)
        if block is None or not block.quantized:
            continue
        write = _WRITERS.get(quantized_rule(rewriter.state.ops, node).lowering)
        found = operands(rewriter, node) if write is not None else Refusal("")
        if write is None or isinstance(found, Refusal):
            continue
        integers, params, q, result = found
        if write(rewriter, node, integers, params, q, result):
            rewriter.remove(node)


def _quantize_masks(rewriter: Rewriter) -> None:
    """Let each MaskedSoftmax that is going to be integer read its mask as integers; layers share them."""
    made: dict[int, Tensor] = {}
    for node in list(rewriter.graph.nodes):
        block = rewriter.state.blocks.get(node.name)
        if node.op != "MaskedSoftmax" or block is None or not block.quantized:
            continue
        if isinstance(operands(rewriter, node), Refusal):
            continue
        mask = node.inputs[1]
        array = ir.value(mask)
        if id(mask) not in made and array is not None:
            made[id(mask)] = rewriter.constant(f"{mask.name}_bias", integer_layers.exponent_bias(array))
        elif id(mask) not in made:
            bias = made[id(mask)] = _call(rewriter, node, "QuantizeMask", [mask], {})
            bias.dtype, bias.shape = np.dtype(np.int32), mask.shape
        rewriter.set_input(node, 1, made[id(mask)])


def _norm(
    rewriter: Rewriter, node: Node, x: Sequence[Tensor], params: Sequence[QuantParams], q: Node, y: QuantParams
) -> bool:
    gamma, bias = ir.array(node.inputs[1]), ir.optional_input(node, 2)
    beta = np.zeros_like(gamma) if bias is None else ir.array(bias)
    epsilon = float(node.attrs.get("epsilon", 1e-5))
    found = integer_layers.NormConstants.of(params[0], y, gamma, beta, epsilon)
    values = {
        "x_zero": np.asarray(params[0].zero_point, params[0].spec.dtype),
        "factors": found.factors,
        "epsilon": np.asarray(found.epsilon, np.int64),
        "gamma": found.multiplier,
        "beta": found.bias,
    }
    acc = _call(rewriter, node, "IntLayerNorm" if node.op == "LayerNormalization" else "IntRMSNorm", [x[0]], values)
    requantize(rewriter, node, acc, np.asarray(1), y, 2 * integer_layers.NORM_BITS, q)
    return True


def _softmax(
    rewriter: Rewriter, node: Node, x: Sequence[Tensor], params: Sequence[QuantParams], q: Node, y: QuantParams
) -> bool:
    values = {"rate": np.asarray(integer_layers.exponent_rate(params[0].scale), np.int32)}
    if not y.spec.log2:
        values["unit"] = np.asarray(integer_layers.softmax_rate(y.scale), np.int64)
    values["largest"] = np.asarray(y.spec.qmax, y.spec.dtype)
    masked = "Masked" if node.op == "MaskedSoftmax" else ""
    function = "LogIntSoftmax" if y.spec.log2 else "IntSoftmax"
    made = _call(rewriter, node, masked + function, [x[0], *node.inputs[1:]], values)
    maker = ir.producer(made)
    assert maker is not None
    rewriter.take_output(maker, q.outputs[0])
    rewriter.remove(q)
    return True


def _product(
    rewriter: Rewriter, node: Node, x: Sequence[Tensor], params: Sequence[QuantParams], q: Node, y: QuantParams
) -> bool:
    attention, v = params
    if not attention.spec.log2:
        return False
    zero = np.asarray(v.zero_point, v.spec.dtype)
    acc = _call(rewriter, node, "ShiftMatMul", x, {"v_zero": zero})
    multiplier, shift = integer_layers.shift_multiplier(v.scale, y.scale)
    requantize(rewriter, node, acc, np.asarray(multiplier), y, shift, q)
    return True


def _add(
    rewriter: Rewriter, node: Node, x: Sequence[Tensor], params: Sequence[QuantParams], q: Node, y: QuantParams
) -> bool:
    if not any(p.exponents for p in (*params, y)):
        return False
    factors = [np.asarray(p.scales / y.scales, np.float32) for p in params]
    if not all(np.all(quant.is_dyadic(f, quant.RATIO_SHIFT)) for f in factors):
        raise ValueError(f"{node.name}: its scale ratios are not multiples of 2**-{quant.RATIO_SHIFT}")
    terms = [
        rescale(rewriter, node, t, p, quant.multiplier(f, quant.RATIO_SHIFT))
        for t, p, f in zip(x, params, factors, strict=True)
    ]
    acc = rewriter.node("Add", terms, origin=node, hint=f"{node.name}_integer").outputs[0]
    requantize(rewriter, node, acc, np.asarray(1), y, quant.RATIO_SHIFT, q)
    return True


def _call(rewriter: Rewriter, node: Node, function: str, tensors: Sequence[Tensor], values: dict[str, Array]) -> Tensor:
    """The result of a function of tensors and constants."""
    constants = [rewriter.constant(f"{node.name}_{name}", value) for name, value in values.items()]
    made = rewriter.node(
        function, [*tensors, *constants], origin=node, hint=f"{node.name}_integer", domain=functions.DOMAIN
    )
    return made.outputs[0]


_WRITERS: dict[
    Lowering, Callable[[Rewriter, Node, Sequence[Tensor], Sequence[QuantParams], Node, QuantParams], bool]
] = {
    Lowering.ADD: _add,
    Lowering.NORM: _norm,
    Lowering.PRODUCT: _product,
    Lowering.SOFTMAX: _softmax,
}
