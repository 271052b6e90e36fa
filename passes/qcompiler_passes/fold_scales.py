"""fold-scales: fold every DQ -> float -> Q into integer arithmetic, so that no scale is left between first Q and last DQ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler import functions, ir, quant
from qcompiler.ir import Node, Tensor
from qcompiler.ops import Lowering, quantized_rule
from qcompiler.quant import QuantParams
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler.runtime import run, session
from qcompiler.state import CompileState, Phase
from qcompiler_passes.fold_functions import fold_mean, fold_slopes
from qcompiler_passes.form_blocks import activation_bounds
from qcompiler_passes.insert_qdq import integer_bounds
from qcompiler_passes.integer_nodes import dequantized, operands, quantizer, requantize, rescale
from qcompiler_passes.scale_solver import mean_factor, spatial_size


@dataclass(frozen=True)
class FoldScales:
    """Replace scales by integer multipliers and shifts.

    The scales of an accumulator, (s_x * s_w) / s_y, become `qcompiler.Requantize` with multiplier m and shift 16; Add and Mul
    become `qcompiler.Rescale` of each operand and one Requantize; an average is a sum and a Requantize; any function of one
    tensor becomes `qcompiler.Table`, filled by running the float operator itself on the 256 dequantized inputs.
    """

    name: ClassVar[str] = "fold-scales"
    requires: ClassVar[Phase] = Phase.QDQ
    establishes: ClassVar[Phase | None] = Phase.INTEGER

    def run(self, state: CompileState) -> int:
        """Return the number of operators folded."""
        rewriter = Rewriter(state)
        for node in list(state.graph.nodes):
            if rewriter.exhausted or not node.outputs:
                continue
            fold = _fold_of(state, node)
            refusal = Refusal("") if fold is None else fold(rewriter, node)
            if refusal is None:
                rewriter.count += 1
            elif fold is not None:
                rewriter.refusals[node.name] = refusal
        return rewriter.finish()


_Fold = Callable[[Rewriter, Node], Refusal | None]


def _fold_of(state: CompileState, node: Node) -> _Fold | None:
    if node.op == "DequantizeLinear":
        is_accumulator = node.inputs[0].dtype == np.int32 and not ir.is_constant(node.inputs[0])
        return _fold_accumulator if is_accumulator else None
    block = state.blocks.get(node.name)
    if block is None or not block.quantized:
        return None
    return _FOLDS.get(quantized_rule(state.ops, node).lowering)


def _fold_accumulator(rewriter: Rewriter, node: Node) -> Refusal | None:
    q = quantizer(rewriter, node.outputs[0])
    if q is None:
        return Refusal("its result is used as a float tensor", node.outputs[0].name)
    params = rewriter.state.params[q.outputs[0].name]
    factor = np.asarray(ir.array(node.inputs[1]) / params.scale, np.float32)
    if not np.all(quant.is_dyadic(factor)):
        return Refusal("its rescale factor is not a multiple of 2**-16", node.name)
    multiplier = quant.multiplier(factor)
    if multiplier.ndim:
        multiplier = multiplier.reshape(-1, *[1] * (-1 - node.attrs["axis"]))
    requantize(rewriter, node, node.inputs[0], multiplier, params, quant.SHIFT, q)
    rewriter.remove(node)
    return None


def _fold_add(rewriter: Rewriter, node: Node) -> Refusal | None:
    found = operands(rewriter, node)
    if isinstance(found, Refusal):
        return found
    integers, params, q, result = found
    factors = [np.asarray(p.scale / result.scale, np.float32) for p in params]
    if not all(quant.is_dyadic(f, quant.RATIO_SHIFT) for f in factors):
        return Refusal("its scale ratios are not multiples of 2**-12", node.name)
    terms = [
        rescale(rewriter, node, x, p, int(quant.multiplier(f, quant.RATIO_SHIFT)))
        for x, p, f in zip(integers, params, factors, strict=True)
    ]
    acc = rewriter.node("Add", terms, origin=node, hint=f"{node.name}_integer").outputs[0]
    requantize(rewriter, node, acc, np.asarray(1), result, quant.RATIO_SHIFT, q)
    rewriter.remove(node)
    return None


def _fold_mul(rewriter: Rewriter, node: Node) -> Refusal | None:
    found = operands(rewriter, node)
    if isinstance(found, Refusal):
        return found
    integers, params, q, result = found
    factor = quant.rescale(params[0].scale, params[1].scale, result.scale)
    if not quant.is_dyadic(factor):
        return Refusal("its rescale factor is not a multiple of 2**-16", node.name)
    terms = [rescale(rewriter, node, x, p, 1) for x, p in zip(integers, params, strict=True)]
    acc = rewriter.node("Mul", terms, origin=node, hint=f"{node.name}_integer").outputs[0]
    requantize(rewriter, node, acc, quant.multiplier(factor), result, quant.SHIFT, q)
    rewriter.remove(node)
    return None


def _fold_mean(rewriter: Rewriter, node: Node) -> Refusal | None:
    size, rank = spatial_size(node), len(ir.shape(node.inputs[0]) or ())
    found = operands(rewriter, node)
    if isinstance(found, Refusal):
        return found
    integers, params, q, result = found
    factor = mean_factor(params[0].scale, result.scale, size)
    if not quant.is_dyadic(factor):
        return Refusal("its rescale factor is not a multiple of 2**-16", node.name)
    axes = rewriter.constant(f"{node.name}_axes", np.arange(2, rank, dtype=np.int64))
    centred = rescale(rewriter, node, integers[0], params[0], 1)
    acc = rewriter.node("ReduceSum", [centred, axes], origin=node, hint=f"{node.name}_integer", keepdims=1).outputs[0]
    requantize(rewriter, node, acc, quant.multiplier(factor), result, quant.SHIFT, q)
    rewriter.remove(node)
    return None


def _fold_clip(rewriter: Rewriter, node: Node) -> Refusal | None:
    bounds, found = activation_bounds(node), operands(rewriter, node)
    if isinstance(found, Refusal):
        return found
    integers, params, q, result = found
    if bounds is None or not params[0].same_as(result):
        return Refusal("its input and output have different params", node.name)
    limits = integer_bounds(result, *bounds)
    low, high = (
        rewriter.constant(f"{node.name}_{k}", np.asarray(v, result.spec.dtype))
        for k, v in zip(("low", "high"), limits, strict=True)
    )
    made = rewriter.node("Clip", [integers[0], low, high], origin=node, hint=f"{node.name}_integer")
    rewriter.take_output(made, q.outputs[0])
    rewriter.remove(q)
    rewriter.remove(node)
    return None


def _fold_table(rewriter: Rewriter, node: Node) -> Refusal | None:
    chain = [node]
    while quantizer(rewriter, chain[-1].outputs[0]) is None:
        follower = rewriter.only_user(chain[-1].outputs[0])
        if follower is None or follower.name not in rewriter.state.blocks[node.name].nodes:
            return Refusal("it does not stand between DQ and Q", node.name)
        chain.append(follower)
    dq, q = dequantized(node.inputs[0]), quantizer(rewriter, chain[-1].outputs[0])
    if dq is None or q is None:
        return Refusal("it does not stand between DQ and Q", node.name)
    if not all(ir.is_constant(t) for t in node.inputs[1:] if not t.is_empty()):
        return Refusal("an operand is not a constant", node.name)
    x = dq.inputs[0]
    _table(rewriter, node, x, rewriter.state.params[x.name], q.outputs[0])
    for done in (q, *chain):
        rewriter.remove(done)
    return None


def _table(rewriter: Rewriter, node: Node, x: Tensor, params: QuantParams, result: Tensor) -> None:
    """x -> Table -> result, filled by running what is between them on every integer."""
    model = ir.submodel([x], [result], rewriter.graph.opset)
    info = np.iinfo(params.spec.dtype)
    patterns = np.arange(info.min, info.max + 1).astype(params.spec.dtype)
    order = np.argsort(patterns.view(np.uint8))
    [filled] = run(session(model), {x.name: patterns[order].reshape(_table_shape(x))})
    inputs = [x, rewriter.constant(f"{node.name}_table", filled.reshape(-1))]
    made = rewriter.node("Table", inputs, origin=node, hint=f"{node.name}_table", domain=functions.DOMAIN)
    rewriter.take_output(made, result)
    rewriter.state.tables[made.name] = model.SerializeToString(deterministic=True)


def _table_shape(x: Tensor) -> tuple[int, ...]:
    """A shape of 256 elements with the rank of the tensor."""
    rank = len(ir.shape(x) or (1,))
    return (*([1] * (rank - 1)), 256) if rank else (256,)


def _fold_concat(rewriter: Rewriter, node: Node) -> Refusal | None:
    found = operands(rewriter, node)
    if isinstance(found, Refusal):
        return found
    integers, params, q, result = found
    parts = []
    for index, (x, p) in enumerate(zip(integers, params, strict=True)):
        if p.same_as(result):
            parts.append(x)
            continue
        dq = dequantized(node.inputs[index])
        assert dq is not None
        scaled = rewriter.variable(f"{x.name}_scaled", np.dtype(result.spec.dtype), x.shape)
        twin = ir.Node("QuantizeLinear", f"{node.name}_requantize", {}, [dq.outputs[0], *q.inputs[1:]], [scaled])
        if ir.is_constant(x):
            [values] = run(session(ir.submodel([x], [scaled], rewriter.graph.opset)), {x.name: ir.array(x)})
            part: Tensor = rewriter.constant(scaled.name, values)
        else:
            _table(rewriter, node, x, p, scaled)
            part = scaled
        ir.detach(twin)
        rewriter.state.params[part.name] = result
        parts.append(part)
    made = rewriter.node("Concat", parts, origin=node, hint=f"{node.name}_integer", **node.attrs)
    rewriter.take_output(made, q.outputs[0])
    rewriter.remove(q)
    rewriter.remove(node)
    return None


_FOLDS: dict[Lowering, _Fold] = {
    Lowering.ADD: _fold_add,
    Lowering.MUL: _fold_mul,
    Lowering.SUM: _fold_mean,
    Lowering.CLIP: _fold_clip,
    Lowering.MEAN: fold_mean,
    Lowering.SLOPE: fold_slopes,
    Lowering.TABLE: _fold_table,
    Lowering.CONCAT: _fold_concat,
}
