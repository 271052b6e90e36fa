"""Masks of attention: constants that push some scores so far down that Softmax makes them 0."""

from __future__ import annotations

import numpy as np

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.quant import params_from_range
from qcompiler.rewrite import Rewriter
from qcompiler.state import CompileState

HIDDEN = -50.0
"""What adds less than this to a score hides it: exporters write -100, -1e4, -3.4e38."""

DEPTH = 12.0
"""A hidden score ends so far below the least of the others; exp(-12) is 6e-6, less than a step of 8 bits."""


def bound_masks(state: CompileState) -> int:
    """Let masks hide scores by saturation, so that they take no steps from the others; return how many did.

    Where only Softmax reads scores + mask, the range of the sum ends `DEPTH` below the least score that is not hidden. The mask
    is replaced by one that is just deep enough to carry any score there.
    """
    rewriter = Rewriter(state)
    for node in list(state.graph.nodes):
        block = state.blocks.get(node.name)
        if block is None or not block.quantized or node.op != "Add" or node.domain:
            continue
        index = next((i for i, t in enumerate(node.inputs) if ir.is_constant(t)), None)
        if index is not None and _only_softmax_reads(state, rewriter, node.outputs[0]):
            rewriter.count += _bound(state, rewriter, node, index)
    return rewriter.count  # no node comes or goes; finish would drop dead ones, which blocks still name


def _bound(state: CompileState, rewriter: Rewriter, node: Node, index: int) -> bool:
    old, scores = node.inputs[index], state.params[node.inputs[1 - index].name]
    mask = ir.array(old)
    hidden = mask < HIDDEN
    if not hidden.any() or hidden.all():
        return False
    low, high = scores.range
    shown = mask[~hidden]
    end = low + float(shown.min()) - DEPTH
    new = rewriter.constant(old.name, np.where(hidden, end - high, mask).astype(np.float32))
    rewriter.set_input(node, index, new)
    state.specs[new.name] = state.specs.pop(old.name)
    state.params.pop(old.name)
    state.params[new.name] = params_from_range(end - high, float(shown.max()), state.specs[new.name])
    leader = state.leader(node.outputs[0].name)
    params = params_from_range(end, high + float(shown.max()), state.specs[node.outputs[0].name])
    state.params |= {name: params for name in state.params if state.leader(name) == leader}
    return True


def _only_softmax_reads(state: CompileState, rewriter: Rewriter, tensor: Tensor) -> bool:
    """Whether all readers are Softmax, or pass the values on to it unchanged."""
    readers = rewriter.users(tensor)
    if not readers or rewriter.is_output(tensor):
        return False
    return all(
        (n.op == "Softmax" and not n.domain)
        or (
            state.leader(n.outputs[0].name) == state.leader(tensor.name)
            and _only_softmax_reads(state, rewriter, n.outputs[0])
        )
        for n in readers
    )
