"""The model-local functions of the integer form: standard ONNX integer operators under a clear name.

ONNX Runtime inlines them when it loads a model. `onnx.reference` runs them as they are, but for Table: its GatherElements takes
no more than 64 entries.
"""

from __future__ import annotations

from functools import cache

import onnx
from onnx import parser

from qcompiler import float_functions, integer_functions, layer_functions

DOMAIN = "qcompiler"

OPSET = 17
"""The oldest opset in which the functions have this meaning; newer ones did not change the operators in them."""

_HEAD = f'<domain: "qcompiler", opset_import: ["" : {OPSET}]>'

_BODIES = {
    # The product is made positive by 2**62, because ONNX shifts only unsigned integers; 2**62 >> shift is taken off again.
    # Clip comes before that, on unsigned integers too: ONNX Runtime's Clip, Min and Max compare the lower halves of int64 as
    # signed numbers on x86, so that 2**31 passes for less than 0.
    "Requantize": """
Requantize (acc, multiplier, shift, zero_point, qmin, qmax) => (y) {
    one = Constant <value = uint64 {1}> ()
    base = Constant <value = uint64 {4611686018427387904}> ()
    wide = Cast <to = 7> (acc)
    factor = Cast <to = 7> (multiplier)
    product = Mul (wide, factor)
    base_signed = Cast <to = 7> (base)
    lifted = Add (product, base_signed)
    bits = Cast <to = 13> (lifted)
    floor = BitShift <direction = "RIGHT"> (bits, shift)
    floor_half = BitShift <direction = "RIGHT"> (floor, one)
    floor_even = BitShift <direction = "LEFT"> (floor_half, one)
    odd = Sub (floor, floor_even)
    step = BitShift <direction = "LEFT"> (one, shift)
    half = BitShift <direction = "RIGHT"> (step, one)
    below_half = Sub (half, one)
    nudge = Add (below_half, odd)
    nudged = Add (bits, nudge)
    rounded = BitShift <direction = "RIGHT"> (nudged, shift)
    base_shifted = BitShift <direction = "RIGHT"> (base, shift)
    base_back = Cast <to = 7> (base_shifted)
    zero = Cast <to = 7> (zero_point)
    offset = Sub (base_back, zero)
    low = Cast <to = 7> (qmin)
    high = Cast <to = 7> (qmax)
    low_lifted = Add (low, offset)
    high_lifted = Add (high, offset)
    low_bits = Cast <to = 13> (low_lifted)
    high_bits = Cast <to = 13> (high_lifted)
    clipped = Clip (rounded, low_bits, high_bits)
    clipped_signed = Cast <to = 7> (clipped)
    value = Sub (clipped_signed, offset)
    y = CastLike (value, zero_point)
}""",
    "Rescale": """
Rescale (q, zero_point, multiplier) => (acc) {
    wide = Cast <to = 6> (q)
    zero = Cast <to = 6> (zero_point)
    centred = Sub (wide, zero)
    acc = Mul (centred, multiplier)
}""",
    # A negative index counts from the end, so one table serves int8 and uint8. GatherElements would be faster in ONNX Runtime,
    # but onnx.reference cannot run it with more than 64 entries.
    "Table": """
Table (q, table) => (y) {
    index = Cast <to = 6> (q)
    y = Gather (table, index)
}""",
}

_DOCS = {
    "Requantize": "clamp(RNE(acc * multiplier * 2**-shift) + zero_point, qmin, qmax); acc int32, multiplier int32, shift uint64",
    "Rescale": "(q - zero_point) * multiplier in int32",
    "Table": "table[q]: 256 entries, indexed by the bit pattern of q",
}


@cache
def _parsed(name: str) -> bytes:
    bodies = _BODIES | layer_functions.BODIES | integer_functions.BODIES | float_functions.BODIES
    function = parser.parse_function(_HEAD + bodies[name])
    function.doc_string = (_DOCS | layer_functions.DOCS | integer_functions.DOCS | float_functions.DOCS)[name]
    return bytes(function.SerializeToString())


def proto(name: str, opset: int = OPSET) -> onnx.FunctionProto:
    """Return the function of that name for a model of that opset. Raises KeyError if there is none."""
    function = onnx.FunctionProto()
    function.ParseFromString(_parsed(name))
    function.opset_import[0].version = max(opset, OPSET)  # the checker compares it with the model's
    return function
