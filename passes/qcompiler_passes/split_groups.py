"""split-groups: grouped convolutions as dense ones side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.rewrite import Refusal, Rewriter, apply_rules
from qcompiler.state import CompileState, Phase
from qcompiler_passes.form_blocks import activation_bounds
from qcompiler_passes.linear import Linear, read
from qcompiler_passes.match import static_axis

LEAST_WORK = 150
"""Pixels of the result times groups per block, from which one more convolution costs less than what it saves."""


@dataclass(frozen=True)
class SplitGroups:
    """Cut a grouped Conv into dense ones, where the target's kernels for grouped ones are slow.

    Each takes as many groups as fill a block of channels that the target is fast with; its filters are zero between groups. The
    activation behind the Conv moves into the branches, so that each result has the range that it needs.
    """

    name: ClassVar[str] = "split-groups"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of convolutions split."""
        return apply_rules(Rewriter(state), {"Conv": _rule})


def _rule(rewriter: Rewriter, node: Node) -> Refusal | None:
    target, linear = rewriter.state.target, read(node)
    if isinstance(linear, Refusal):
        return linear
    groups, outputs, inputs, _ = linear.shape
    if groups == 1 or inputs == 1:
        return Refusal("it is dense or depthwise", node.name)
    if not target.alignment.block:
        return Refusal(f"target {target.name} has kernels for grouped convolutions", node.name)
    together = _groups_per_block(groups, inputs, outputs, target.alignment.block, target.alignment.inputs)
    sizes = [static_axis(node.outputs[0], axis) for axis in range(2, linear.raw.ndim)]
    if None not in sizes and math.prod(size or 0 for size in sizes) * together < LEAST_WORK:
        return Refusal("it is too small to split", node.name)
    _split(rewriter, linear, [min(together, groups - first) for first in range(0, groups, together)])
    return None


def _groups_per_block(groups: int, inputs: int, outputs: int, block: int, unit: int) -> int:
    """The least number of groups that fill a block, and that make multiples of what kernels want."""
    least = min(-(-block // min(inputs, outputs)), groups)
    step = math.lcm(unit // math.gcd(unit, inputs), unit // math.gcd(unit, outputs))
    return min(-(-least // step) * step, groups)


def _split(rewriter: Rewriter, linear: Linear, blocks: list[int]) -> None:
    node, x, inputs = linear.node, linear.node.inputs[0], linear.shape[2]
    chain = [node]
    while (follower := rewriter.only_user(chain[-1].outputs[0])) is not None and activation_bounds(follower):
        chain.append(follower)
    result = chain[-1].outputs[0]
    parts = [x] if len(blocks) == 1 else _parts(rewriter, node, x, [count * inputs for count in blocks])
    first, results = 0, []
    for count, part in zip(blocks, parts, strict=True):
        results.append(_dense(rewriter, linear, chain, part, first, count))
        first += count
    if len(results) == 1:
        maker = ir.producer(results[0])
        assert maker is not None
    else:
        maker = rewriter.node("Concat", results, origin=node, hint=f"{node.name}_concat", axis=1)
    rewriter.take_output(maker, result)
    for done in reversed(chain):
        rewriter.remove(done)


def _parts(rewriter: Rewriter, node: Node, x: Tensor, sizes: list[int]) -> list[Tensor]:
    shape = ir.shape(x) or ()
    outs: list[Tensor] = [
        rewriter.variable(f"{x.name}_part", x.dtype, [shape[0], size, *shape[2:]] if shape else None) for size in sizes
    ]
    lengths = rewriter.constant("lengths", np.array(sizes, np.int64))
    rewriter.node("Split", [x, lengths], outs, origin=node, hint=f"{node.name}_split", axis=1)
    return outs


def _dense(rewriter: Rewriter, linear: Linear, chain: list[Node], x: Tensor, first: int, count: int) -> Tensor:
    """`count` groups from the first one on as one Conv, with copies of the activations behind it; returns the result."""
    node, (_, outputs, inputs, _) = linear.node, linear.shape
    raw = linear.raw.reshape(-1, outputs, *linear.raw.shape[1:])[first : first + count]
    weight = np.zeros((count, outputs, count, inputs, *linear.raw.shape[2:]), linear.raw.dtype)
    for group in range(count):
        weight[group, :, group] = raw[group]
    weight = weight.reshape(count * outputs, count * inputs, *linear.raw.shape[2:])
    operands = [x, rewriter.constant(node.inputs[1].name, weight)]
    if (bias := ir.optional_input(node, 2)) is not None:
        part = ir.array(bias)[first * outputs : (first + count) * outputs]
        operands.append(rewriter.constant(bias.name, part))
    for step in chain:
        attrs = {**step.attrs, "group": 1} if step is node else step.attrs
        known = ir.shape(step.outputs[0])
        shape = None if known is None else [known[0], count * outputs, *known[2:]]
        out = rewriter.variable(f"{step.outputs[0].name}_part", x.dtype, shape)
        rewriter.node(
            step.op, operands if step is node else [operands[0], *step.inputs[1:]], [out], origin=step, **attrs
        )
        operands = [out]
    return operands[0]
