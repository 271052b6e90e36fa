"""The work of convolutions and matrix products, by the kernels that ONNX Runtime has for them on x86."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from qcompiler import ir
from qcompiler.cost import Work, far
from qcompiler.ir import Node

Shape = tuple[int, ...]

CHANNEL_BLOCK = 16
CACHED = 500_000
"""Elements of a matrix above which a product with one vector waits for memory."""

PACKED_INPUTS = 4
"""Int8 convolutions take 4 input channels at a time; with other numbers they unroll their input."""


def product(prefix: str, node: Node, shapes: Mapping[str, Shape]) -> Work:
    """The work of a Conv, ConvTranspose, Gemm or MatMul. `prefix`: `float` or `int8`. `shapes`: of all tensors, by name."""
    output = shapes[node.outputs[0].name]
    if node.op in ("Gemm", "MatMul"):
        return _matrix_product(prefix, node, output, shapes)
    weight = shapes[node.inputs[1].name]
    taps, group = math.prod(weight[2:]), int(node.attrs.get("group", 1))
    positions = math.prod(output[2:]) * output[0]
    source = math.prod(shapes[node.inputs[0].name][2:]) * output[0]
    if node.op == "ConvTranspose":
        macs = source * math.prod(weight)
        return Work(f"{prefix}.ConvTranspose", macs=float(macs), reads=0.0, writes=float(math.prod(output)))
    outs, ins = weight[0], weight[1] * group
    work = Work(f"{prefix}.{_conv_kind(prefix, outs, weight[1], group, taps)}")
    padded = _ceil(outs, CHANNEL_BLOCK)
    if work.kind.endswith("depthwise"):
        return replace(
            work,
            macs=positions * padded * taps,
            reads=source * padded,
            writes=positions * padded,
            weights=taps * padded,
            positions=positions * taps,
            far=far(work.kind, source * padded, positions * padded),
        )
    depth = ins if ins < CHANNEL_BLOCK or prefix == "int8" else _ceil(ins, CHANNEL_BLOCK)
    depth = _ceil(depth, PACKED_INPUTS) if prefix == "int8" else depth
    if group > 1:
        padded, depth = outs, ins
    unrolls = prefix == "int8" and "unaligned" in work.kind
    return replace(
        work,
        nodes=float(group) if work.kind.endswith("grouped") else 1.0,
        macs=positions * padded * depth * taps // group,
        reads=source * depth,
        writes=positions * padded,
        columns=positions * depth * taps if unrolls else 0.0,
        weights=padded * depth * taps // group,
        positions=positions * taps,
        far=far(work.kind, source * depth, positions * padded),
    )


def _matrix_product(prefix: str, node: Node, output: Shape, shapes: Mapping[str, Shape]) -> Work:
    left, right = shapes[node.inputs[0].name], shapes[node.inputs[1].name]
    is_vector = len(right) == 1  # then the result lacks the axis of the columns
    depth, columns = left[-1], 1 if is_vector else output[-1]
    rows = math.prod(output if is_vector else output[:-1])
    if not ir.is_constant(node.inputs[1]):
        kind, weights = "MatMul.activations", 0
    else:
        weights = math.prod(right)
        kind = "gemm" if rows > 1 else "gemv" if weights < CACHED else "gemv.large"
    return Work(
        f"{prefix}.{kind}",
        macs=float(rows * depth * columns),
        reads=float(rows * depth + (0 if weights else math.prod(right))),
        writes=float(rows * columns),
        weights=float(weights),
    )


def _ceil(number: int, step: int) -> int:
    return -(-number // step) * step


def _conv_kind(prefix: str, outs: int, depth: int, group: int, taps: int) -> str:
    if group > 1 and depth == 1 and outs == group:
        return "depthwise" if prefix == "float" or outs % CHANNEL_BLOCK == 0 else "unaligned.depthwise"
    if group > 1:
        blocked = depth % CHANNEL_BLOCK == 0 and (outs // group) % CHANNEL_BLOCK == 0
        return "blocked" if prefix == "float" and blocked else "grouped"
    if prefix == "float":
        return "stem" if depth < CHANNEL_BLOCK else "pointwise" if taps == 1 else "spatial"
    if depth % PACKED_INPUTS or outs % PACKED_INPUTS or outs < CHANNEL_BLOCK:
        return "unaligned.pointwise" if taps == 1 else "unaligned.spatial"
    return "pointwise" if taps == 1 else "spatial"
