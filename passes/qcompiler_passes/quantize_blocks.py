"""quantize-blocks: weights of 4 or 8 bits with a scale per block; activations stay float."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.errors import UserError
from qcompiler.ir import Constant, Node, Variable
from qcompiler.quant import F32
from qcompiler.replay import Replay
from qcompiler.rewrite import Refusal, Rewriter, Rule
from qcompiler.state import CompileState, Phase
from qcompiler_passes.blockwise import gather, pack, quantize_blocks
from qcompiler_passes.linear import Linear
from qcompiler_passes.nearest_plane import damp, nearest_plane, spread
from qcompiler_passes.runtime_layers import missing_kernel, product, replace_nodes, rewrite_layers, take_bias

_KERNEL = "com.microsoft.MatMulNBits"

_VECTORS = 4
"""How many of the vectors that a layer reads are looked at, per weight of an output."""


@dataclass(frozen=True)
class QuantizeBlocks:
    """Gemm and MatMul with a large constant weight -> MatMulNBits; Gather from a large table -> GatherBlockQuantized.

    `bits`: 4 or 8. `block`: weights that share a scale, a power of 2 from 16 on. What has fewer than `least` weights stays float.
    `exact`: compute in float32; otherwise the kernel may round activations to int8, block by block, which is faster.

    With calibration data, weights are not rounded to the nearest integers but so that what the layer computes on `samples`
    samples changes least (GPTQ, see `nearest_plane`), layer after layer, each on what the rounded layers before it give.
    `damping`: what is added to the diagonal of the Hessian, relative to its mean.
    """

    bits: int = 4
    block: int = 32
    least: int = 16384
    exact: bool = False
    samples: int = 128
    damping: float = 0.01

    name: ClassVar[str] = "quantize-blocks"
    requires: ClassVar[Phase] = Phase.FUSED
    establishes: ClassVar[Phase | None] = Phase.KERNELS

    def run(self, state: CompileState) -> int:
        """Return the number of operators replaced. Raises UserError if no kernel takes such blocks."""
        if self.bits not in (4, 8):
            raise UserError(f"bits={self.bits}: kernels take 4 or 8", self.name)
        if self.block < 16 or self.block & (self.block - 1):
            raise UserError(f"block={self.block} is not a power of 2 from 16 on", self.name)
        rounded = self._rounded(state)
        rules: dict[str, Rule] = {
            "Gemm": partial(self._product, rounded),
            "MatMul": partial(self._product, rounded),
            "Gather": partial(gather, bits=self.bits, least=self.least),
            "Conv": lambda rewriter, node: Refusal("weights in blocks are for products of matrices"),
        }
        return rewrite_layers(state, rules, f"int{self.bits} weights")

    def _rounded(self, state: CompileState) -> dict[str, NDArray[np.int8]]:
        """Layer -> integers [rows, blocks, size] that suit what the layer reads; empty without calibration data."""
        if state.calibration is None or missing_kernel(state, _KERNEL) is not None:
            return {}
        graph = state.graph.copy()
        found = [(n, product(n, self.least)) for n in graph.nodes if n.op in ("Gemm", "MatMul")]
        layers = [(n, linear) for n, linear in found if isinstance(linear, Linear)]
        replay = Replay(graph, list(islice(state.calibration, self.samples)), [n.inputs[0] for n, _ in layers])
        result = {}
        for node, linear in layers:
            values = [row[0] for row in replay.advance()]
            integers, back = self._round(_rows(linear), values)
            result[node.name] = integers
            weight = back if node.attrs.get("transB", 0) else back.T
            weight = np.ascontiguousarray(weight / node.attrs.get("alpha", 1.0), np.float32)
            ir.set_input(node, 1, Constant(f"{node.name}_rounded", weight))
        return result

    def _round(self, rows: F32, values: list[NDArray[Any]]) -> tuple[NDArray[np.int8], F32]:
        """Integers for the weights in rows of a layer that reads `values`, and what they stand for."""
        nearest, scales = quantize_blocks(rows, self.bits, self.block)
        steps = np.repeat(scales, self.block, axis=1)[:, : rows.shape[1]]
        wanted = -(-_VECTORS * rows.shape[1] // len(values))
        vectors = (x.reshape(-1, x.shape[-1]) for x in values)
        picked = np.concatenate([v[spread(len(v), wanted, i)] for i, v in enumerate(vectors)])
        hessian = (picked.T @ picked / len(picked))[None]
        damp(hessian, self.damping)
        low = -(2 ** (self.bits - 1))
        integers = nearest_plane(rows[None], steps[None], hessian, low, -low - 1)[0]
        padded = np.zeros((len(rows), nearest.shape[1] * self.block), np.int8)
        padded[:, : rows.shape[1]] = integers
        return padded.reshape(nearest.shape), integers * steps

    def _product(self, rounded: dict[str, NDArray[np.int8]], rewriter: Rewriter, node: Node) -> Refusal | None:
        linear = product(node, self.least)
        refusal = linear if isinstance(linear, Refusal) else missing_kernel(rewriter.state, _KERNEL)
        if refusal is not None or isinstance(linear, Refusal):
            return refusal
        rows = _rows(linear)
        integers, scales = quantize_blocks(rows, self.bits, self.block)
        integers = rounded.get(node.name, integers)
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


def _rows(linear: Linear) -> F32:
    """The weights of a product, one row per output."""
    return np.ascontiguousarray(linear.weight[0, :, :, 0], np.float32)
