"""lower-integer: run multiply-accumulate operators and data movers on the integers between Q and DQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qcompiler import ir, quant
from qcompiler.ir import Node, Tensor
from qcompiler.ops import Lowering, quantized_rule
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler.state import CompileState, Phase
from qcompiler_passes.integer_nodes import dequantized, quantizer


@dataclass(frozen=True)
class LowerInteger:
    """Conv becomes ConvInteger, Gemm and MatMul become MatMulInteger, each with an int32 bias and a DequantizeLinear of the
    accumulator; Reshape, MaxPool and the like read and write the integers themselves. `fold-scales` does the rest.
    """

    name: ClassVar[str] = "lower-integer"
    requires: ClassVar[Phase] = Phase.QDQ
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of operators lowered."""
        rewriter = Rewriter(state)
        for node in list(state.graph.nodes):
            block = state.blocks.get(node.name)
            if block is None or not block.quantized or rewriter.exhausted:
                continue
            lowering = quantized_rule(state.ops, node).lowering
            if lowering in (Lowering.MAC, Lowering.PRODUCT):
                refusal = _lower_mac(rewriter, node)
            elif lowering is Lowering.MOVE:
                refusal = _lower_mover(rewriter, node)
            else:
                continue
            if refusal is None:
                rewriter.count += 1
            else:
                rewriter.refusals[node.name] = refusal
        return rewriter.finish()


def _lower_mac(rewriter: Rewriter, node: Node) -> Refusal | None:
    sources = [dequantized(t) for t in node.inputs[:2]]
    x, w = sources
    if x is None or w is None:
        return Refusal("its operands are not quantized", node.name)
    bias = ir.optional_input(node, 2)
    scale = np.asarray(ir.array(x.inputs[1]) * ir.array(w.inputs[1]), np.float32)
    weight = ir.value(w.inputs[0])
    zero = w.inputs[2]
    if weight is not None:
        zero = rewriter.constant(f"{node.name}_w_zero_point", np.zeros((), weight.dtype))
    op, attrs = ("ConvInteger", dict(node.attrs)) if node.op == "Conv" else ("MatMulInteger", {})
    out = node.outputs[0]
    acc = rewriter.variable(f"{node.name}_acc", np.dtype(np.int32), out.shape)
    operands = [x.inputs[0], w.inputs[0], x.inputs[2], zero]
    rewriter.node(op, operands, [acc], origin=node, hint=f"{node.name}_integer", **attrs)
    spatial = 0 if weight is None else weight.ndim - 2
    if bias is not None:
        biased = rewriter.variable(f"{node.name}_biased", np.dtype(np.int32), out.shape)
        rewriter.node(
            "Add", [acc, _bias(rewriter, node, bias, spatial)], [biased], origin=node, hint=f"{node.name}_bias"
        )
        acc = biased
    axis: dict[str, Any] = {"axis": -1 - spatial} if scale.ndim else {}
    dq_inputs = [acc, rewriter.constant(f"{node.name}_acc_scale", scale)]
    dq = rewriter.node("DequantizeLinear", dq_inputs, origin=node, hint=f"{node.name}_acc_dequantize", **axis)
    rewriter.take_output(dq, out)
    rewriter.remove(node)
    return None


def _bias(rewriter: Rewriter, node: Node, bias: Tensor, spatial: int) -> Tensor:
    source = dequantized(bias)
    assert source is not None
    integers = ir.array(source.inputs[0])
    shape = (1, -1, *([1] * spatial)) if node.op == "Conv" else (-1,)
    return rewriter.constant(f"{node.name}_bias_q", integers.reshape(shape))


def _lower_mover(rewriter: Rewriter, node: Node) -> Refusal | None:
    data = dequantized(node.inputs[0])
    quantizers = [quantizer(rewriter, t) for t in node.outputs]
    if data is None or any(q is None for q in quantizers):
        return Refusal("it does not stand between DQ and Q", node.name)
    params = rewriter.state.params[data.inputs[0].name]
    if not all(params.same_as(rewriter.state.params[q.outputs[0].name]) for q in quantizers if q is not None):
        return Refusal("its input and output have different params", node.name)
    inputs = [data.inputs[0], *node.inputs[1:]]
    if node.op == "Pad":
        given = ir.optional_input(node, 2)
        fill = quant.quantize(np.zeros(()) if given is None else ir.array(given).reshape(()), params)
        inputs[2:3] = [rewriter.constant(f"{node.name}_fill", fill)]
    moved = rewriter.node(node.op, inputs, len(node.outputs), origin=node, domain=node.domain or "", **node.attrs)
    for index, q in enumerate(quantizers):
        assert q is not None
        result = q.outputs[0]
        rewriter.take_output(moved, result, index)
        rewriter.remove(q)
    rewriter.remove(node)
    return None
