"""quantize-blocks: weights of 4 or 8 bits with a scale per block; activations stay float."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from qcompiler.errors import UserError
from qcompiler.ir import Node, Variable
from qcompiler.rewrite import Refusal, Rewriter, Rule
from qcompiler.state import CompileState, Phase
from qcompiler_passes.blockwise import gather, pack, quantize_blocks
from qcompiler_passes.runtime_layers import missing_kernel, product, replace_nodes, rewrite_layers, take_bias

_KERNEL = "com.microsoft.MatMulNBits"


@dataclass(frozen=True)
class QuantizeBlocks:
    """Gemm and MatMul with a large constant weight -> MatMulNBits; Gather from a large table -> GatherBlockQuantized.

    `bits`: 4 or 8. `block`: weights that share a scale, a power of 2 from 16 on. What has fewer than `least` weights stays float.
    `exact`: compute in float32; otherwise the kernel may round activations to int8, block by block, which is faster.
    """

    bits: int = 4
    block: int = 32
    least: int = 16384
    exact: bool = False

    name: ClassVar[str] = "quantize-blocks"
    requires: ClassVar[Phase] = Phase.FUSED
    establishes: ClassVar[Phase | None] = Phase.KERNELS

    def run(self, state: CompileState) -> int:
        """Return the number of operators replaced. Raises UserError if no kernel takes such blocks."""
        if self.bits not in (4, 8):
            raise UserError(f"bits={self.bits}: kernels take 4 or 8", self.name)
        if self.block < 16 or self.block & (self.block - 1):
            raise UserError(f"block={self.block} is not a power of 2 from 16 on", self.name)
        rules: dict[str, Rule] = {
            "Gemm": self._product,
            "MatMul": self._product,
            "Gather": partial(gather, bits=self.bits, least=self.least),
            "Conv": lambda rewriter, node: Refusal("weights in blocks are for products of matrices"),
        }
        return rewrite_layers(state, rules, f"int{self.bits} weights")

    def _product(self, rewriter: Rewriter, node: Node) -> Refusal | None:
        linear = product(node, self.least)
        refusal = linear if isinstance(linear, Refusal) else missing_kernel(rewriter.state, _KERNEL)
        if refusal is not None or isinstance(linear, Refusal):
            return refusal
        rows = np.ascontiguousarray(linear.weight[0, :, :, 0], np.float32)
        integers, scales = quantize_blocks(rows, self.bits, self.block)
        bias, result, nodes = take_bias(rewriter, linear)
        name = node.inputs[1].name
        weight = rewriter.constant(f"{name}_blocks", pack(integers, self.bits))
        inputs = [node.inputs[0], weight, rewriter.constant(f"{name}_scales", scales.reshape(-1))]
        if bias is not None:
            inputs += [Variable.empty(), Variable.empty(), rewriter.constant(f"{node.name}_bias", bias)]
        attrs = {"K": rows.shape[1], "N": rows.shape[0], "bits": self.bits, "block_size": self.block}
        attrs |= {"accuracy_level": 1 if self.exact else 4}
        domain, op = _KERNEL.rsplit(".", maxsplit=1)
        new = rewriter.node(op, inputs, origin=nodes, hint=node.name, domain=domain, **attrs)
        replace_nodes(rewriter, nodes, new, result)
        return None
