"""Weights in blocks of a row, each with a scale of its own: the layout of MatMulNBits and GatherBlockQuantized."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Node
from qcompiler.quant import F32
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler_passes.runtime_layers import missing_kernel

GATHER = "com.microsoft.GatherBlockQuantized"

_FRACTIONS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76)
"""Candidates for a scale, as fractions of the one that clips nothing."""


def quantize_blocks(rows: F32, bits: int, size: int) -> tuple[NDArray[np.int8], F32]:
    """Integers [rows, blocks, size] from -2**(bits-1) on, and float32 scales [rows, blocks]; the last block is filled with zeros.

    The largest value of a block goes to the end of the range that has one integer more, by a negative scale if need be; of
    some fractions of that scale, the one with the least squared error is taken.
    """
    count = -(-rows.shape[1] // size)
    padded = np.zeros((len(rows), count * size), np.float32)
    padded[:, : rows.shape[1]] = rows
    blocks = padded.reshape(len(rows), count, size)
    low = -(2 ** (bits - 1))
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]
    widest = np.where(extreme == 0, np.float32(1), extreme / np.float32(low))
    best, least = widest, np.full(widest.shape, np.inf, np.float32)
    for fraction in _FRACTIONS if bits < 8 else ():
        scale = (widest * np.float32(fraction)).astype(np.float32)
        error = np.square(_round(blocks, scale, low) * scale[..., None] - blocks).sum(axis=2)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return _round(blocks, best, low).astype(np.int8), best


def _round(blocks: F32, scale: F32, low: int) -> F32:
    rounded: F32 = np.clip(np.rint(blocks / scale[..., None]), low, -low - 1)
    return rounded


def pack(integers: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """uint8 with the middle at 2**(bits-1); of 4 bits, two to a byte, the first in the low half."""
    unsigned = (integers.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    packed: NDArray[np.uint8] = unsigned if bits == 8 else unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    return packed


def gather(rewriter: Rewriter, node: Node, bits: int, least: int) -> Refusal | None:
    """Gather of rows of a large constant matrix -> GatherBlockQuantized: each block has a scale, and rows come out as floats."""
    table = ir.value(node.inputs[0])
    if table is None or table.ndim != 2 or table.dtype != np.float32 or table.size < least or node.attrs.get("axis", 0):
        return Refusal("it does not choose rows of a large matrix of constants", node.inputs[0].name)
    size = next((size for size in ((128, 64, 32, 16) if bits == 8 else (32, 16)) if table.shape[1] % size == 0), 0)
    if not size or not np.isfinite(table).all():
        return Refusal("rows are no multiple of 16, or not finite", node.inputs[0].name)
    refusal = missing_kernel(rewriter.state, GATHER)
    if refusal is not None:
        return refusal
    integers, scales = quantize_blocks(table, bits, size)
    data = rewriter.constant(f"{node.inputs[0].name}_blocks", pack(integers, bits).reshape(len(table), -1))
    steps = rewriter.constant(f"{node.inputs[0].name}_scales", scales)
    attrs: dict[str, Any] = {"bits": bits, "block_size": size, "gather_axis": 0, "quantize_axis": 1}
    domain, op = GATHER.rsplit(".", maxsplit=1)
    new = rewriter.node(op, [data, node.inputs[1], steps], origin=node, domain=domain, **attrs)
    rewriter.take_output(new, node.outputs[0])
    rewriter.remove(node)
    return None
