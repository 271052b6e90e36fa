"""The rules of `recompose` for masks of attention: what a sum or a Where puts on scores before Softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qcompiler import functions, ir, op_checks
from qcompiler.ir import Node, Tensor
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler_passes.match import NO_MATCH, is_aside, made_by, static_axis

HIDDEN = -1000.0
"""A Where that puts this on a score, or less, hides it."""


def finite_mask(rewriter: Rewriter, node: Node) -> Refusal | None:
    """Softmax(x + mask) where a constant mask holds -inf -> the least finite number: the same zeros, from finite constants."""
    for index, tensor in enumerate(node.inputs):
        mask, follower = ir.value(tensor), rewriter.only_user(node.outputs[0])
        if mask is None or mask.dtype != np.float32 or follower is None or follower.op != "Softmax" or follower.domain:
            continue
        if np.isneginf(mask).any():
            finite = np.where(np.isneginf(mask), np.finfo(np.float32).min, mask)
            rewriter.set_input(node, index, rewriter.constant(tensor.name, finite))
            return None
    return NO_MATCH


@dataclass
class _Masked:
    """`scores` with all of `masks` on them, and what else computes the tensor that Softmax reads: sums, then Reshapes."""

    scores: Tensor
    masks: list[Tensor] = field(default_factory=list)
    sums: list[Node] = field(default_factory=list)
    reshapes: list[Node] = field(default_factory=list)


def masked_softmax(rewriter: Rewriter, node: Node) -> Refusal | None:
    """Softmax(scores + mask), Softmax(Where(seen, scores, -inf)) -> MaskedSoftmax(scores, mask), where the target asks for it.

    A mask depends on no layer: it is a constant, or computed from shapes and inputs. Reshapes between, which keep the last axis,
    go behind. Where a Where with -inf hides a whole row, Softmax gives NaN, and MaskedSoftmax the same number for all.
    """
    state = rewriter.state
    if "MaskedSoftmax" not in state.target.rewrites or state.model is not None or op_checks.last_axis(node):
        return NO_MATCH
    found = _Masked(node.inputs[0])
    _take_reshapes(rewriter, found)
    while _take_sum(rewriter, found) or _take_where(rewriter, found):
        pass
    if not found.masks:
        return NO_MATCH
    nodes = [node, *found.reshapes, *found.sums]
    mask = found.masks[0]
    for other in found.masks[1:]:
        mask = _float_node(rewriter, "Add", [mask, other], nodes)
    made = rewriter.node("MaskedSoftmax", [found.scores, mask], origin=nodes, hint=node.name, domain=functions.DOMAIN)
    for reshape in reversed(found.reshapes):
        made.outputs[0].dtype, made.outputs[0].shape = reshape.inputs[0].dtype, reshape.inputs[0].shape
        made = rewriter.node("Reshape", [made.outputs[0], reshape.inputs[1]], origin=nodes, **reshape.attrs)
    rewriter.take_output(made, node.outputs[0])
    for old in nodes:
        rewriter.remove(old)
    return None


def _take_reshapes(rewriter: Rewriter, found: _Masked) -> None:
    """Go back over Reshapes that keep the last axis."""
    while (maker := made_by(found.scores, "Reshape")) is not None:
        length = static_axis(maker.inputs[0], -1)
        if length is None or length != static_axis(found.scores, -1) or rewriter.only_user(found.scores) is None:
            return
        found.reshapes.append(maker)
        found.scores = maker.inputs[0]


def _take_sum(rewriter: Rewriter, found: _Masked) -> bool:
    maker = made_by(found.scores, "Add")
    if maker is None or rewriter.only_user(found.scores) is None:
        return False
    for scores, mask in (maker.inputs, maker.inputs[::-1]):
        if mask.dtype == np.float32 and is_aside(mask) and not is_aside(scores):
            found.scores, found.masks = scores, [*found.masks, mask]
            found.sums.append(maker)
            return True
    return False


def _take_where(rewriter: Rewriter, found: _Masked) -> bool:
    maker = made_by(found.scores, "Where")
    if maker is None or rewriter.only_user(found.scores) is None or found.scores.dtype != np.float32:
        return False
    condition, *branches = maker.inputs
    fills = [ir.scalar(t) for t in branches]
    hidden = next((i for i, fill in enumerate(fills) if fill is not None and fill <= HIDDEN), None)
    if hidden is None or not is_aside(condition) or is_aside(branches[1 - hidden]):
        return False
    constants = [rewriter.constant("shown", np.float32(0)), rewriter.constant("hidden", np.finfo(np.float32).min)]
    mask = _float_node(rewriter, "Where", [condition, *(constants if hidden else reversed(constants))], [maker])
    found.scores, found.masks = branches[1 - hidden], [*found.masks, mask]
    found.sums.append(maker)
    return True


def _float_node(rewriter: Rewriter, op: str, inputs: Sequence[Tensor], origin: Sequence[Node]) -> Tensor:
    made = rewriter.variable("mask", np.dtype(np.float32), None)
    rewriter.node(op, inputs, [made], origin=origin)
    return made
