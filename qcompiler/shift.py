"""Sums of a tensor and one number that cost nothing: the integers stay, and another zero point says what they mean."""

from __future__ import annotations

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.quant import QuantParams
from qcompiler.state import CompileState

TOLERANCE = 1e-5
"""How far a number may be from a multiple of the scale, relative to itself: a few float32 roundings."""


def addend(node: Node) -> float | None:
    """The number that an Add adds to everything; None for other operators and operands."""
    if node.op != "Add" or node.domain:
        return None
    values = [v for t in node.inputs if (v := ir.value(t)) is not None]
    if len(values) != 1 or values[0].size != 1:
        return None
    rank = len(ir.shape(activation(node)) or ())
    return float(values[0].flat[0]) if values[0].ndim <= rank else None


def activation(node: Node) -> Tensor:
    """The operand of an `addend`."""
    return next(t for t in node.inputs if not ir.is_constant(t))


def zero_point_behind(before: QuantParams, number: float) -> int | None:
    """The zero point of x + number for x with these params, if number is a multiple of the scale and there is such an integer."""
    steps = round(number / float(before.scale))
    behind = before.zero_point - steps
    if abs(steps * float(before.scale) - number) > TOLERANCE * abs(number):
        return None
    return behind if before.spec.qmin <= behind <= before.spec.qmax else None


def is_shift(state: CompileState, node: Node) -> bool:
    """Whether an Add of one number c only moves the zero point: x = s (q - z) gives x + c = s (q - (z - c / s)).

    So it is where both have the scale s, c is a multiple of it, and the zero points differ by c / s.
    """
    number, block = addend(node), state.blocks.get(node.name)
    if number is None or block is None or not block.quantized:
        return False
    before, after = state.params.get(activation(node).name), state.params.get(block.outputs[0])
    if before is None or after is None or before.axis is not None or after.axis is not None:
        return False
    return zero_point_behind(before, number) == after.zero_point and bool(before.scale == after.scale)
