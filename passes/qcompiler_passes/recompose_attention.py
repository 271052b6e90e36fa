"""The rule of `recompose` for ONNX's Attention: the products and the Softmax in it, which can be integer one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler_passes.match import static_axis

_LOWEST = np.finfo(np.float32).min


def attention(rewriter: Rewriter, node: Node) -> Refusal | None:
    """Attention(Q, K, V, mask) of shapes (batch, heads, tokens, width) -> Softmax(Q * K^T * scale + mask) * V, where the target
    asks for it.
    """
    target = rewriter.state.target
    if "attention-as-products" not in target.rewrites:
        return Refusal(f"target {target.name} does not ask for attention-as-products", node.name)
    refusal = _unfit(node)
    if refusal is not None:
        return refusal
    q, k, v = node.inputs[:3]
    masks = _masks(rewriter, node)
    if masks is None:
        return Refusal("it is causal, and the number of tokens is not static", node.name)
    width = static_axis(q, -1) or 1
    scale = float(node.attrs.get("scale", width**-0.5))
    tokens, others = (ir.shape(t) or () for t in (q, k))

    def made(op: str, inputs: list[Tensor], shape: Sequence[int | str | None], **attrs: Any) -> Tensor:
        result = rewriter.variable(f"{node.name}_{op}", np.dtype(np.float32), shape)
        rewriter.node(op, inputs, [result], origin=node, hint=f"{node.name}_{op}", **attrs)
        return result

    keys = made("Transpose", [k], [*others[:2], others[3], others[2]], perm=[0, 1, 3, 2])
    wide = [*tokens[:3], others[2]]
    scaled = made("Mul", [q, rewriter.constant(f"{node.name}_scale", np.float32(scale))], list(tokens))
    scores = made("MatMul", [scaled, keys], wide)
    for mask in masks:
        scores = made("Add", [scores, mask], wide)
    weights = made("Softmax", [scores], wide, axis=-1)
    rewriter.take_output(rewriter.node("MatMul", [weights, v], origin=node), node.outputs[0])
    rewriter.remove(node)
    return None


def _unfit(node: Node) -> Refusal | None:
    shapes = [ir.shape(t) for t in node.inputs[:3]]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return Refusal("its inputs are not known to have four axes", node.name)
    heads = {static_axis(t, 1) for t in node.inputs[:3]}
    if len(heads) != 1 or heads == {None} or static_axis(node.inputs[0], -1) is None:
        return Refusal("keys have other heads than queries, or sizes are not static", node.name)
    if any(t.dtype != np.float32 for t in node.inputs[:3]):
        return Refusal("it does not compute in float32", node.name)
    if any(not t.is_empty() for t in (*node.inputs[4:], *node.outputs[1:])):
        return Refusal("it has a cache, or gives more than attention", node.name)
    if node.attrs.get("softcap", 0.0) or node.attrs.get("softmax_precision", 1) != 1:
        return Refusal("softcap or softmax_precision is set", node.name)
    return None


def _masks(rewriter: Rewriter, node: Node) -> list[Tensor] | None:
    """What is added to scores; None if that is not known."""
    masks: list[Tensor] = []
    given = ir.optional_input(node, 3)
    if given is not None and given.dtype == np.dtype(bool):
        shown, hidden = rewriter.constant("shown", np.float32(0)), rewriter.constant("hidden", _LOWEST)
        mask = rewriter.variable("mask", np.dtype(np.float32), given.shape)
        rewriter.node("Where", [given, shown, hidden], [mask], origin=node)
        masks.append(mask)
    elif given is not None:
        masks.append(given)
    if node.attrs.get("is_causal", 0):
        lengths = [static_axis(t, 2) for t in node.inputs[:2]]
        if lengths[0] is None or lengths[1] is None:
            return None
        behind = np.triu(np.full((lengths[0], lengths[1]), _LOWEST, np.float32), 1)
        masks.append(rewriter.constant("causal", behind))
    return masks
