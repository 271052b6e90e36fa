"""expand-activations: HardSigmoid and HardSwish behind convolutions as arithmetic that integers do faster than a function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.rewrite import Refusal, Rewriter, Rule, apply_rules
from qcompiler.state import CompileState, Phase
from qcompiler_passes.linear import read, write

SIDE = 1 / math.sqrt(6)


@dataclass(frozen=True)
class ExpandActivations:
    """Fold the slope and the offset of a HardSigmoid into the Conv or Gemm before it, so that a Clip to 0..1 is left.

    Where the target asks for `hard-swish-as-mul`, a HardSwish behind a Conv becomes a product. With u = x / sqrt(6), made by the
    Conv itself, x * Clip(x / 6 + 1 / 2, 0, 1) is u * Clip(u + 3 / sqrt(6), 0, sqrt(6)).
    """

    name: ClassVar[str] = "expand-activations"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of activations expanded."""
        rules: dict[str, Rule] = {"HardSigmoid": hard_sigmoid, "HardSwish": hard_swish}
        return 0 if self.name in state.skip else apply_rules(Rewriter(state), rules)


def hard_sigmoid(rewriter: Rewriter, node: Node) -> Refusal | None:
    """Conv, then HardSigmoid -> Conv, then Clip."""
    alpha, beta = (float(node.attrs.get(k, default)) for k, default in (("alpha", 0.2), ("beta", 0.5)))
    if refusal := _scale_producer(rewriter, node, alpha, beta):
        return refusal
    clip = rewriter.node("Clip", [node.inputs[0], *_bounds(rewriter, 0.0, 1.0)], origin=node)
    rewriter.take_output(clip, node.outputs[0])
    rewriter.remove(node)
    return None


def hard_swish(rewriter: Rewriter, node: Node) -> Refusal | None:
    """Conv, then HardSwish -> Conv, Clip, then the product of that and of Add, Clip."""
    target = rewriter.state.target
    if "hard-swish-as-mul" not in target.rewrites:
        return Refusal(f"target {target.name} does not ask for hard-swish-as-mul", node.name)
    x = node.inputs[0]
    maker = ir.producer(x)
    if maker is None or maker.op != "Conv":
        return Refusal("no Conv makes its input", x.name)
    if refusal := _scale_producer(rewriter, node, SIDE, 0.0):
        return refusal

    def step(op: str, *inputs: Tensor) -> Tensor:
        out = rewriter.variable(f"{node.name}_{op.lower()}", x.dtype, x.shape)
        rewriter.node(op, inputs, [out], origin=node, hint=f"{node.name}_{op.lower()}")
        return out

    above = step("Clip", x, *_bounds(rewriter, -3 * SIDE))  # the product is 0 below, so the range need not hold more
    shifted = step("Add", above, rewriter.constant("offset", np.float32(3 * SIDE)))
    gate = step("Clip", shifted, *_bounds(rewriter, 0.0, 6 * SIDE))
    final = rewriter.node("Mul", [above, gate], origin=node)
    rewriter.take_output(final, node.outputs[0])
    rewriter.remove(node)
    return None


def _scale_producer(rewriter: Rewriter, node: Node, factor: float, offset: float) -> Refusal | None:
    """Let the Conv or Gemm that makes the input of `node`, for it alone, make factor * input + offset."""
    x = node.inputs[0]
    maker = ir.producer(x)
    if maker is None or maker.op not in ("Conv", "Gemm") or rewriter.only_user(x) is not node:
        return Refusal("no Conv or Gemm makes its input for it alone", x.name)
    linear = read(maker)
    if isinstance(linear, Refusal):
        return linear
    channels = linear.shape[0] * linear.shape[1]
    refusal = write(rewriter, [linear.then(np.full(channels, factor), np.full(channels, offset))])
    if refusal is None:
        rewriter.change_values(x, factor, offset)
    return refusal


def _bounds(rewriter: Rewriter, low: float, high: float | None = None) -> list[Tensor]:
    given = {"low": low} if high is None else {"low": low, "high": high}
    return [rewriter.constant(hint, np.float32(bound)) for hint, bound in given.items()]
