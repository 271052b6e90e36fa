"""The model-local functions of whole layers in integers: the bodies that equal the references in `integer_layers`."""

from __future__ import annotations

from qcompiler.integer_layers import (
    DEEPEST,
    EXP_BITS,
    EXP_CONSTANT,
    EXP_OFFSET,
    EXP_RANGE,
    HIGHEST_BIAS,
    LOG_BITS,
    NEWTON_STEPS,
    NORM_BITS,
    OCTAVE,
    ROOT_BITS,
)

_POWERS_OF_FOUR = ", ".join(str(4**k) for k in range(31))

_ROOT = f"""
    powers = Constant <value = int64[31] {{{_POWERS_OF_FOUR}}}> ()
    reached = GreaterOrEqual (radicand, powers)
    reached_wide = Cast <to = 7> (reached)
    digits = ReduceSum <keepdims = 1> (reached_wide, last)
    digits_bits = Cast <to = 13> (digits)
    one_bits = Constant <value = uint64 {{1}}> ()
    start_bits = BitShift <direction = "LEFT"> (one_bits, digits_bits)
    root_0 = Cast <to = 7> (start_bits)
    two = Constant <value = int64 {{2}}> ()
""" + "".join(
    f"""
    quotient_{i} = Div (radicand, root_{i})
    sum_{i} = Add (root_{i}, quotient_{i})
    root_{i + 1} = Div (sum_{i}, two)
"""
    for i in range(NEWTON_STEPS)
)

_CENTRED = """
    total = ReduceSum <keepdims = 1> (x, last)
    deviation = Sub (scaled, total)
    total_square = Mul (total, total)
    variance = Sub (scaled_squares, total_square)
"""

_NOT_CENTRED = """
    deviation = Identity (scaled)
    variance = Identity (scaled_squares)
"""


def _norm(name: str, moments: str) -> str:
    return f"""
{name} (q, zero_point, factors, epsilon, multiplier, bias) => (acc) {{
    last = Constant <value = int64[1] {{-1}}> ()
    wide = Cast <to = 7> (q)
    zero = Cast <to = 7> (zero_point)
    centred = Sub (wide, zero)
    x = Mul (centred, factors)
    n = Shape <start = -1> (x)
    scaled = Mul (x, n)
    square = Mul (x, x)
    squares = ReduceSum <keepdims = 1> (square, last)
    scaled_squares = Mul (squares, n)
{moments}
    positive = Add (variance, epsilon)
    root_unit = Constant <value = int64 {{{4**ROOT_BITS}}}> ()
    radicand = Mul (positive, root_unit)
{_ROOT}
    root_square = Mul (root_{NEWTON_STEPS}, root_{NEWTON_STEPS})
    above = Greater (root_square, radicand)
    excess = Cast <to = 7> (above)
    root = Sub (root_{NEWTON_STEPS}, excess)
    sign = Sign (deviation)
    magnitude = Abs (deviation)
    unit = Constant <value = int64 {{{2 ** (ROOT_BITS + NORM_BITS)}}}> ()
    numerator = Mul (magnitude, unit)
    ratio = Div (numerator, root)
    normalized = Mul (sign, ratio)
    product = Mul (normalized, multiplier)
    acc = Add (product, bias)
}}"""


_STEPS = """
    x = Cast <to = 6> (q)
    score = Mul (x, rate)
"""

_MASKED_STEPS = f"""
    x = Cast <to = 6> (q)
    greatest = Constant <value = int32 {{255}}> ()
    below = Sub (x, greatest)
    steps = Mul (below, rate)
    biased = Add (steps, bias)
    deepest = Constant <value = int32 {{{-DEEPEST}}}> ()
    score = Max (biased, deepest)
"""

# TopK stands for ReduceMax, whose axes were an attribute before opset 18 and are an input from then on.
_EXP = f"""
    last = Constant <value = int64[1] {{-1}}> ()
    one = Constant <value = int64[1] {{1}}> ()
    top, position = TopK <axis = -1, largest = 1, sorted = 1> (score, one)
    scaled = Sub (top, score)
    furthest = Constant <value = int32 {{{EXP_RANGE << EXP_BITS}}}> ()
    t = Min (scaled, furthest)
    t_bits = Cast <to = 12> (t)
    point = Constant <value = uint32 {{{EXP_BITS}}}> ()
    whole = BitShift <direction = "RIGHT"> (t_bits, point)
    floor_bits = BitShift <direction = "LEFT"> (whole, point)
    floor = Cast <to = 6> (floor_bits)
    rest = Sub (t, floor)
    offset = Constant <value = int32 {{{EXP_OFFSET}}}> ()
    p = Sub (offset, rest)
    square = Mul (p, p)
    constant = Constant <value = int32 {{{EXP_CONSTANT}}}> ()
    polynomial = Add (square, constant)
    polynomial_bits = Cast <to = 12> (polynomial)
    exp_bits = BitShift <direction = "RIGHT"> (polynomial_bits, whole)
    exp = Cast <to = 7> (exp_bits)
    total = ReduceSum <keepdims = 1> (exp, last)
"""

# floor(log2) by halving: is anything above the lower 16, 8, 4, 2, 1 bits?
_LOG2 = "".join(
    f"""
    width_{k} = Constant <value = uint32 {{{2**k}}}> ()
    upper_{k} = BitShift <direction = "RIGHT"> (r_{k + 1}, width_{k})
    is_set_{k} = Cast <to = 9> (upper_{k})
    digit_{k} = Cast <to = 12> (is_set_{k})
    step_{k} = Mul (digit_{k}, width_{k})
    r_{k} = BitShift <direction = "RIGHT"> (r_{k + 1}, step_{k})
    code_{k} = Add (code_{k + 1}, step_{k})
"""
    for k in reversed(range(5))
)


def _log_softmax(head: str, steps: str) -> str:
    return f"""
{head} => (codes) {{
{steps}{_EXP}
    four = Constant <value = int64 {{4}}> ()
    three = Constant <value = int64 {{3}}> ()
    unit = Constant <value = int64 {{1}}> ()
    numerator = Mul (total, four)
    tripled = Mul (exp, three)
    denominator = Add (tripled, unit)
    ratio = Div (numerator, denominator)
    one_bit = Constant <value = uint32 {{1}}> ()
    largest_bits = Cast <to = 12> (largest)
    bound_bits = BitShift <direction = "LEFT"> (one_bit, largest_bits)
    bound = Cast <to = 7> (bound_bits)
    beyond = Greater (ratio, bound)
    bounded = Where (beyond, bound, ratio)
    r_5 = Cast <to = 12> (bounded)
    code_5 = Constant <value = uint32 {{0}}> ()
{_LOG2}
    codes = Cast <to = 2> (code_0)
}}"""


def _softmax(head: str, steps: str) -> str:
    return f"""
{head} => (y) {{
{steps}{_EXP}
    half = Constant <value = int64 {{128}}> ()
    full = Constant <value = int64 {{256}}> ()
    scaled_exp = Mul (exp, unit)
    half_total = Mul (total, half)
    numerator = Add (scaled_exp, half_total)
    denominator = Mul (total, full)
    ratio = Div (numerator, denominator)
    bound = Cast <to = 7> (largest)
    beyond = Greater (ratio, bound)
    bounded = Where (beyond, bound, ratio)
    y = CastLike (bounded, largest)
}}"""


def _plane(name: str, shift: int) -> str:
    return f"""
    {name}_shift = Constant <value = uint32 {{{shift}}}> ()
    {name}_shifted = BitShift <direction = "RIGHT"> (weights, {name}_shift)
    {name}_byte = Mod ({name}_shifted, radix)
    {name} = Cast <to = 2> ({name}_byte)
    {name}_acc = MatMulInteger ({name}, v, none, zero_point)
    {name}_wide = Cast <to = 7> ({name}_acc)
"""


# The powers of two are cut into bytes, so that ONNX Runtime's int8 kernels multiply with them. Its Sign of int64 would look at
# the lower halves only; those of a LayerNorm's deviations are all that there is.
_SHIFT_MATMUL = f"""
ShiftMatMul (codes, v, zero_point) => (acc) {{
    unit = Constant <value = uint32 {{{2**LOG_BITS}}}> ()
    shifts = Cast <to = 12> (codes)
    weights = BitShift <direction = "RIGHT"> (unit, shifts)
    radix = Constant <value = uint32 {{256}}> ()
    none = Constant <value = uint8 {{0}}> ()
{_plane("high", 16)}{_plane("middle", 8)}{_plane("low", 0)}
    base = Constant <value = int64 {{256}}> ()
    high_scaled = Mul (high_wide, base)
    upper = Add (high_scaled, middle_wide)
    upper_scaled = Mul (upper, base)
    weighted = Add (upper_scaled, low_wide)
    last = Constant <value = int64[1] {{-1}}> ()
    weights_wide = Cast <to = 7> (weights)
    total = ReduceSum <keepdims = 1> (weights_wide, last)
    nothing = Constant <value = int64 {{0}}> ()
    is_negative = Less (weighted, nothing)
    magnitude = Abs (weighted)
    one = Cast <to = 7> (unit)
    numerator = Mul (magnitude, one)
    mean = Div (numerator, total)
    opposite = Neg (mean)
    acc = Where (is_negative, opposite, mean)
}}"""

_QUANTIZE_MASK = f"""
QuantizeMask (mask) => (bias) {{
    octave = Constant <value = float {{{float(OCTAVE)!r}}}> ()
    lowest = Constant <value = float {{{float(-DEEPEST)!r}}}> ()
    highest = Constant <value = float {{{float(HIGHEST_BIAS)!r}}}> ()
    octaves = Mul (mask, octave)
    clipped = Clip (octaves, lowest, highest)
    rounded = Round (clipped)
    bias = Cast <to = 6> (rounded)
}}"""

BODIES = {
    "IntLayerNorm": _norm("IntLayerNorm", _CENTRED),
    "IntRMSNorm": _norm("IntRMSNorm", _NOT_CENTRED),
    "IntSoftmax": _softmax("IntSoftmax (q, rate, unit, largest)", _STEPS),
    "LogIntSoftmax": _log_softmax("LogIntSoftmax (q, rate, largest)", _STEPS),
    "MaskedIntSoftmax": _softmax("MaskedIntSoftmax (q, bias, rate, unit, largest)", _MASKED_STEPS),
    "MaskedLogIntSoftmax": _log_softmax("MaskedLogIntSoftmax (q, bias, rate, largest)", _MASKED_STEPS),
    "QuantizeMask": _QUANTIZE_MASK,
    "ShiftMatMul": _SHIFT_MATMUL,
}

DOCS = {
    "IntLayerNorm": "LayerNormalization of factors * (q - zero_point) over the last axis, times multiplier, plus bias: int64 at "
    f"2**-{2 * NORM_BITS} of an output step",
    "IntSoftmax": "softmax over the last axis in steps of 2**-8 * unit, at most largest; rate: a step of q in octaves "
    f"* 2**{EXP_BITS}",
    "LogIntSoftmax": "softmax over the last axis as codes: 2**-code, at most largest; rate: a step of q in octaves "
    f"* 2**{EXP_BITS}",
    "IntRMSNorm": "RMSNormalization of factors * (q - zero_point), as IntLayerNorm",
    "MaskedIntSoftmax": "IntSoftmax of scores with a mask from QuantizeMask",
    "MaskedLogIntSoftmax": "LogIntSoftmax of scores with a mask from QuantizeMask",
    "QuantizeMask": f"what a sum puts on scores, in octaves * 2**{EXP_BITS}, int32",
    "ShiftMatMul": f"the mean of v - zero_point over the tokens, weighted by 2**-code, times 2**{LOG_BITS}: int64",
}
