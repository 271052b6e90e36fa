"""The model-local functions of the integer form: standard ONNX integer operators under a clear name.

ONNX Runtime inlines them when it loads a model; `onnx.reference` runs them as they are.
"""

from __future__ import annotations

from functools import cache

import onnx
from onnx import parser

DOMAIN = "qcompiler"

_HEAD = '<domain: "qcompiler", opset_import: ["" : 17]>'

_BODIES = {
    # The product is made positive by 2**62, because ONNX shifts only unsigned integers; 2**62 >> shift is taken off again.
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
    rounded_signed = Cast <to = 7> (rounded)
    base_back = Cast <to = 7> (base_shifted)
    value = Sub (rounded_signed, base_back)
    zero = Cast <to = 7> (zero_point)
    moved = Add (value, zero)
    low = Cast <to = 7> (qmin)
    high = Cast <to = 7> (qmax)
    clipped = Clip (moved, low, high)
    y = CastLike (clipped, zero_point)
}""",
    "Rescale": """
Rescale (q, zero_point, multiplier) => (acc) {
    wide = Cast <to = 6> (q)
    zero = Cast <to = 6> (zero_point)
    centred = Sub (wide, zero)
    acc = Mul (centred, multiplier)
}""",
    # A negative index counts from the end, so one table serves int8 and uint8.
    "Table": """
Table (q, table) => (y) {
    flat_shape = Constant <value = int64[1] {-1}> ()
    flat = Reshape (q, flat_shape)
    index = Cast <to = 6> (flat)
    looked_up = GatherElements (table, index)
    shape = Shape (q)
    y = Reshape (looked_up, shape)
}""",
}

_DOCS = {
    "Requantize": "clamp(RNE(acc * multiplier * 2**-shift) + zero_point, qmin, qmax); acc int32, multiplier int32, shift uint64",
    "Rescale": "(q - zero_point) * multiplier in int32",
    "Table": "table[q]: 256 entries, indexed by the bit pattern of q",
}


@cache
def _parsed(name: str) -> bytes:
    function = parser.parse_function(_HEAD + _BODIES[name])
    function.doc_string = _DOCS[name]
    return bytes(function.SerializeToString())


def proto(name: str) -> onnx.FunctionProto:
    """Return the function of that name. Raises KeyError if there is none."""
    function = onnx.FunctionProto()
    function.ParseFromString(_parsed(name))
    return function
