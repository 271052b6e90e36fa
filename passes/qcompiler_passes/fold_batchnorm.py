"""fold-batchnorm: batch normalization becomes part of the weights next to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Node
from qcompiler.ops import op_key
from qcompiler.rewrite import Refusal, Rewriter, Rule, apply_rules
from qcompiler.state import CompileState, Phase
from qcompiler_passes.affine import Affine, chains
from qcompiler_passes.linear import fold


@dataclass(frozen=True)
class FoldBatchnorm:
    """Fold BatchNormalization into the Conv, ConvTranspose, Gemm or MatMul before it, or into all Conv, Gemm, MatMul after it.

    Constant Add, Sub, Mul, Div between the two fold with it. After a MatMul an Add stays, as its bias. One that scales by
    nothing negative moves behind a MaxPool. `depthwise`: turn those that cannot fold (between Relu and a Conv that pads, say)
    into a depthwise 1x1 Conv, which integer arithmetic can run.
    """

    name: ClassVar[str] = "fold-batchnorm"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None
    depthwise: bool = False

    def run(self, state: CompileState) -> int:
        """Return the number of BatchNormalization nodes folded."""
        rules: dict[str, Rule] = {"BatchNormalization": self._fold}
        return apply_rules(Rewriter(state), rules)

    def _fold(self, rewriter: Rewriter, node: Node) -> Refusal | None:
        found = chains(rewriter, node)
        if isinstance(found, Refusal):
            return found
        refusal = fold(rewriter, found)
        if refusal is None or _sink(rewriter, found[-1]) is None:
            return None
        return _depthwise(rewriter, found[-1]) if self.depthwise else refusal


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
