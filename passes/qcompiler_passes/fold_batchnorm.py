"""fold-batchnorm: batch normalization becomes part of the weights next to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler import ir
from qcompiler.ir import Node
from qcompiler.ops import op_key
from qcompiler.rewrite import Refusal, Rewriter, Rule, apply_rules
from qcompiler.state import CompileState, Phase
from qcompiler_passes.affine import Affine, Array, chains, per_channel
from qcompiler_passes.linear import fold, fold_into_producer, read, write


@dataclass(frozen=True)
class FoldBatchnorm:
    """Fold BatchNormalization into the Conv, ConvTranspose, Gemm or MatMul before it, or into all Conv, Gemm, MatMul after it.

    Behind a Relu its positive scales go to the weights before the Relu, because a * relu(x) = relu(a * x): folded into the
    weights after it instead, they would leave the tensor between with channels of very different ranges. Its shifts go on.
    Constant Add, Sub, Mul, Div between the two fold with it. After a MatMul an Add stays, as its bias. One that scales by
    nothing negative moves behind a MaxPool. `depthwise`: turn those that cannot fold (between Relu and a Conv that pads, say)
    into a depthwise 1x1 Conv, which integer arithmetic can run.
    """

    name: ClassVar[str] = "fold-batchnorm"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None
    in_bodies: ClassVar[bool] = True
    depthwise: bool = False

    def run(self, state: CompileState) -> int:
        """Return the number of BatchNormalization nodes folded."""
        rules: dict[str, Rule] = {"BatchNormalization": self._fold}
        return apply_rules(Rewriter(state), rules)

    def _fold(self, rewriter: Rewriter, node: Node) -> Refusal | None:
        found = chains(rewriter, node)
        if isinstance(found, Refusal):
            return found
        refusal = fold_into_producer(rewriter, found[0])
        if refusal is None or _hoist(rewriter, found[0]) is None:
            return None
        refusal = fold(rewriter, found)
        if refusal is None or _sink(rewriter, found[-1]) is None:
            return None
        return _depthwise(rewriter, found[-1]) if self.depthwise else refusal


_HOMOGENEOUS = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
"""Operators with f(a * x) = a * f(x) for a >= 0, channel by channel."""


def _hoist(rewriter: Rewriter, chain: Affine) -> Refusal | None:
    """Fold the positive scales of a chain into the operator before the activations and pools that it follows."""
    between, tensor, producer = [chain.source], chain.source, ir.producer(chain.source)
    while producer is not None and op_key(producer.op, producer.domain) in _HOMOGENEOUS and len(producer.outputs) == 1:
        if rewriter.only_user(tensor) is None:
            return Refusal(f"the result of {producer.op} is also read elsewhere", tensor.name)
        tensor, producer = producer.inputs[0], ir.producer(producer.inputs[0])
        between.append(tensor)
    linear = Refusal("no weights come before it") if producer is None else read(producer)
    if tensor is chain.source or isinstance(linear, Refusal) or rewriter.only_user(tensor) is None:
        return Refusal("no weights and activation of its own come before it", chain.source.name)
    channels = linear.shape[0] * linear.shape[1]
    scale = per_channel(chain.scale, linear.axis, linear.rank, channels)
    if scale is None or not chain.keeps_shape or not (scale > 0).any():
        return Refusal("the scale is not one value per channel, or nowhere positive", chain.nodes[0].name)
    refusal = write(rewriter, [linear.then(np.where(scale > 0, scale, 1.0), np.zeros_like(scale))])
    if refusal is None:
        rewriter.adopt(linear.node, *chain.nodes)
        for each in between:
            rewriter.change_values(each, np.where(chain.scale > 0, chain.scale, 1.0))
        _write_rest(rewriter, chain, np.where(chain.scale > 0, 1.0, chain.scale))
    return refusal


def _write_rest(rewriter: Rewriter, chain: Affine, scale: Array) -> None:
    """Replace a chain by what is left of it: Mul where a scale is not 1, Add where a shift is not 0."""
    tensor = chain.source
    for op, constant, neutral in (("Mul", scale, 1), ("Add", chain.shift, 0)):
        if (constant != neutral).any():
            operand = rewriter.constant(f"{chain.nodes[-1].name}_{op}", constant.astype(chain.dtype))
            tensor = rewriter.node(op, [tensor, operand], origin=chain.nodes).outputs[0]
            tensor.dtype, tensor.shape = chain.source.dtype, chain.source.shape
    last, result = ir.producer(tensor), chain.result
    assert last is not None
    if tensor is chain.source:
        last = rewriter.node("Identity", [tensor], origin=chain.nodes)
    rewriter.take_output(last, result)
    for node in chain.nodes:
        rewriter.remove(node)


def _sink(rewriter: Rewriter, batchnorm: Affine) -> Refusal | None:
    """max(a * x + b) = a * max(x) + b for a >= 0, on fewer elements and nearer to the next weights."""
    node, pool = batchnorm.nodes[0], rewriter.only_user(batchnorm.result)
    if pool is None or op_key(pool.op, pool.domain) != "MaxPool" or len(pool.outputs) > 1:
        return Refusal("no MaxPool alone reads the result", node.name)
    if (batchnorm.scale < 0).any():
        return Refusal("a negative scale turns the largest into the smallest", node.name)
    result = pool.outputs[0]
    pooled = rewriter.variable(f"{node.name}_pooled", result.dtype, result.shape)
    rewriter.set_input(pool, 0, batchnorm.source)
    rewriter.set_input(node, 0, pooled)
    rewriter.take_output(node, result)
    rewriter.take_output(pool, pooled)
    return None


def _depthwise(rewriter: Rewriter, batchnorm: Affine) -> Refusal | None:
    """A Conv with one 1x1 filter per channel."""
    node, channels, spatial = batchnorm.nodes[0], batchnorm.scale.size, batchnorm.scale.ndim - 1
    if spatial < 1:
        return Refusal("it has no spatial axes", node.name)
    weight = batchnorm.scale.reshape(channels, 1, *[1] * spatial).astype(batchnorm.dtype)
    constants = [
        rewriter.constant(f"{node.name}_weight", weight),
        rewriter.constant(f"{node.name}_bias", batchnorm.shift.reshape(-1).astype(batchnorm.dtype)),
    ]
    conv = rewriter.node(
        "Conv", [batchnorm.source, *constants], origin=node, group=channels, kernel_shape=[1] * spatial
    )
    rewriter.take_output(conv, batchnorm.result)
    rewriter.remove(node)
    return None
