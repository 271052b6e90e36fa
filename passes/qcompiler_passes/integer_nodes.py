"""What passes share that write integer arithmetic: the Q and DQ around a node, Requantize and Rescale."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from qcompiler import functions, ir, quant
from qcompiler.ir import Node, Tensor
from qcompiler.ops import quantized_rule
from qcompiler.quant import QuantParams
from qcompiler.rewrite import Refusal, Rewriter


def dequantized(tensor: Tensor) -> Node | None:
    """The DequantizeLinear that makes the tensor, or None."""
    maker = ir.producer(tensor)
    return maker if maker is not None and maker.op == "DequantizeLinear" else None


def quantizer(rewriter: Rewriter, tensor: Tensor) -> Node | None:
    """The QuantizeLinear that is the tensor's one reader, or None."""
    user = rewriter.only_user(tensor)
    return user if user is not None and user.op == "QuantizeLinear" else None


def requantize(
    rewriter: Rewriter, node: Node, acc: Tensor, multiplier: quant.Array, params: QuantParams, shift: int, q: Node
) -> None:
    """acc -> Requantize -> the output of the quantizer `q`, which goes."""
    spec, hint = params.spec, node.name
    zero, low, high = (np.asarray(v, spec.dtype) for v in (params.zero_point, spec.qmin, spec.qmax))
    inputs = [
        acc,
        rewriter.constant(f"{hint}_multiplier", multiplier.astype(np.int32)),
        rewriter.constant(f"{hint}_shift", np.asarray(shift, np.uint64)),
        *(rewriter.constant(f"{hint}_{k}", v) for k, v in (("zero_point", zero), ("qmin", low), ("qmax", high))),
    ]
    made = rewriter.node("Requantize", inputs, origin=node, hint=f"{hint}_requantize", domain=functions.DOMAIN)
    rewriter.take_output(made, q.outputs[0])
    rewriter.remove(q)


def operands(rewriter: Rewriter, node: Node) -> tuple[list[Tensor], list[QuantParams], Node, QuantParams] | Refusal:
    """The integer inputs of a node and their params, the quantizer behind it and its params."""
    rule = quantized_rule(rewriter.state.ops, node)
    sources = [dequantized(node.inputs[i]) for i in rule.activations(node)]
    q = quantizer(rewriter, node.outputs[0])
    integers = [s.inputs[0] for s in sources if s is not None]
    if len(integers) != len(sources) or q is None:
        return Refusal("it does not stand between DQ and Q", node.name)
    table = rewriter.state.params
    return integers, [table[t.name] for t in integers], q, table[q.outputs[0].name]


def rescale(rewriter: Rewriter, node: Node, x: Tensor, params: QuantParams, multiplier: ArrayLike) -> Tensor:
    """The int32 tensor (x - zero point) * multiplier, as a part of what `node` becomes."""
    inputs = [
        x,
        rewriter.constant(f"{x.name}_zero", np.asarray(params.zero_point, params.spec.dtype)),
        rewriter.constant(f"{x.name}_multiplier", np.asarray(multiplier, np.int32)),
    ]
    made = rewriter.node("Rescale", inputs, origin=node, hint=f"{node.name}_rescale", domain=functions.DOMAIN)
    made.outputs[0].dtype, made.outputs[0].shape = np.dtype(np.int32), x.shape
    return made.outputs[0]
