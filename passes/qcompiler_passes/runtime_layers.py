"""What the modes without calibration share: which layers they take, and what is told about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.quant import F32
from qcompiler.rewrite import Refusal, Rewriter, Rule, apply_rules
from qcompiler.state import CompileState
from qcompiler_passes.linear import Linear, read

LAYERS = ("Conv", "ConvTranspose", "Gemm", "GRU", "LSTM", "MatMul", "RNN")
"""The operators that the report tells about, whether they were rewritten or not."""


def rewrite_layers(state: CompileState, rules: Mapping[str, Rule], how: str) -> int:
    """Apply the rules to nodes that no pattern keeps in float; note in the blocks what became of each layer.

    `how`: what layers are afterwards, for the report. Returns the number of rewrites.
    Blocks of other operators go: nothing is decided about them.
    """
    before = {n.name: n.op for n in state.graph.nodes}
    rewriter = Rewriter(state)
    rewrites = apply_rules(rewriter, {op: unless_kept(rule) for op, rule in rules.items()})
    left = {n.name for n in state.graph.nodes}
    for name, block in list(state.blocks.items()):
        if name in left and before[name] in LAYERS:
            refusal = state.refusals.get(name, Refusal("this mode has no kernel for it"))
            state.blocks[name] = replace(block, reason=refusal.reason)
        elif name in before:
            rewritten = name not in left and before[name] in rules
            if rewritten:
                state.blocks[name] = replace(block, quantized=True, reason=how)
            else:
                del state.blocks[name]
    return rewrites


def unless_kept(rule: Rule) -> Rule:
    """The rule for all nodes but those that stay float as the user asked."""

    def apply(rewriter: Rewriter, node: Node) -> Refusal | None:
        for pattern, reason in rewriter.state.keep_float.items():
            if any(fnmatchcase(name, pattern) for name in (node.name, *(t.name for t in node.outputs))):
                return Refusal(reason, node.name)
        return rule(rewriter, node)

    return apply


def missing_kernel(state: CompileState, key: str) -> Refusal | None:
    """A refusal if the target lacks a kernel."""
    return (
        None if key in state.target.kernels else Refusal(f"target {state.target.name} has no {key.rpartition('.')[2]}")
    )


def product(node: Node, least: int) -> Linear | Refusal:
    """A Gemm or MatMul of a float32 matrix and a constant with at least so many elements, or why it is none."""
    linear = read(node)
    if isinstance(linear, Refusal):
        return Refusal(linear.reason, linear.culprit) if ir.is_constant(node.inputs[1]) else _NO_CONSTANT
    if ir.is_constant(node.inputs[0]) or node.attrs.get("transA", 0):
        return Refusal("its left operand is a constant, or transposed", node.inputs[0].name)
    if linear.raw.dtype != np.float32 or ir.type_name(node.inputs[0]) not in ("?", "float32"):
        return Refusal(f"it computes in {linear.raw.dtype}", node.name)
    if linear.raw.size < least:
        return Refusal(f"it has fewer than {least} weights, too few to pay", node.name)
    if not np.isfinite(linear.raw).all():
        return Refusal("its weights are not finite", node.inputs[1].name)
    if linear.bias is not None and row(linear.bias, linear.shape[1]) is None:
        return Refusal("the bias is a matrix", node.name)
    rank = ir.shape(node.inputs[0])
    return Refusal("its left operand is a vector", node.name) if rank is not None and len(rank) < 2 else linear


_NO_CONSTANT = Refusal("the weight is not a constant")


def row(bias: np.ndarray[tuple[int, ...], np.dtype[np.floating]], width: int) -> F32 | None:
    """A bias as one number per output, float32, or None if it is a matrix."""
    if bias.size not in (1, width) or (bias.ndim and bias.shape[-1] != bias.size):
        return None
    return np.ascontiguousarray(np.broadcast_to(bias.reshape(-1), (width,)), dtype=np.float32)


def take_bias(rewriter: Rewriter, linear: Linear) -> tuple[F32 | None, Tensor, list[Node]]:
    """The bias of a product, with that of an Add which alone reads it; the tensor that holds the sum; the nodes replaced."""
    node = linear.node
    width, result, nodes = linear.shape[1], node.outputs[0], [node]
    bias = None if linear.bias is None else row(linear.bias, width)
    add = rewriter.only_user(result)
    if bias is not None or add is None or add.op != "Add" or add.domain:
        return bias, result, nodes
    values = ir.value(add.inputs[1] if add.inputs[0] is result else add.inputs[0])
    if values is None or values.dtype != np.float32 or values.ndim > 1:
        return bias, result, nodes
    found = row(values, width)
    return (bias, result, nodes) if found is None else (found, add.outputs[0], [node, add])


def replace_nodes(rewriter: Rewriter, nodes: list[Node], new: Node, result: Tensor) -> None:
    """Let `new` write what the last of the nodes wrote, and remove these."""
    rewriter.take_output(new, result)
    for node in reversed(nodes):
        rewriter.remove(node)
