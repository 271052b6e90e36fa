"""LayerNorm, Softmax and attention in integer arithmetic: NumPy references, and the constants that stand for scales.

After FQ-ViT (Lin et al. 2022, arXiv 2111.13824) and I-BERT (Kim et al. 2021, arXiv 2101.01321). What the compiler emits
(`layer_functions`) equals these functions bit for bit. Tensors are quantized as in `quant`; those around a LayerNorm may have a
Power-of-Two Factor `2**alpha` per channel (FQ-ViT, section 3.2): x = scale * 2**alpha * (q - zero_point).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from qcompiler.quant import I64, SHIFT, Array, QuantParams

ROOT_BITS = 8
"""Bits after the binary point of the standard deviation."""

NORM_BITS = 16
"""Bits after the binary point of what is normalized, and of its multiplier."""

MOST_CHANNELS = 4096
"""The widest LayerNorm whose sums fit into 64 bits."""

NEWTON_STEPS = 6
"""Iterations of the integer square root; five bring a start within a factor of two below one part in 2**49."""

EXP_BITS = 14
"""Bits after the binary point of exponents of two."""

EXP_RANGE = 31
"""Exponentials of differences beyond so many octaves are 0."""

EXP_OFFSET = round(1.353 / math.log(2) * 2**EXP_BITS)
EXP_CONSTANT = round(0.344 / (0.3585 * math.log(2) ** 2) * 4**EXP_BITS)
"""I-BERT, equation 13: exp(p) = 0.3585 (p + 1.353)**2 + 0.344 for p in (-ln 2, 0], in units of 2**-EXP_BITS octaves."""

LOG_BITS = 23
"""Attention 2**-code is the integer 2**(LOG_BITS - code), and 0 for larger codes."""

LARGEST_CODE = LOG_BITS + 1

OCTAVE = np.float32(2**EXP_BITS / math.log(2))
"""A mask of 1 in the units of exponents."""

DEEPEST = 100_000 << EXP_BITS
"""Scores end so far below the greatest there can be; -6.9e4 is that deep. 32 bits hold all differences of scores with masks."""

HIGHEST_BIAS = 2**28

_LARGEST_EPSILON = 2**45
_LARGEST_RATE = EXP_RANGE << EXP_BITS


@dataclass(frozen=True)
class NormConstants:
    """What a LayerNorm becomes: `factors`, `multiplier`, `bias`: int64, shape (channels,); `epsilon`: an integer >= 1."""

    factors: I64
    epsilon: int
    multiplier: I64
    bias: I64

    @classmethod
    def of(cls, x: QuantParams, y: QuantParams, gamma: Array, beta: Array, epsilon: float) -> NormConstants:
        """For input and output params, weights of shape (channels,) and the float epsilon."""
        factors = 2 ** np.broadcast_to(np.asarray(x.exponents or 0, np.int64), gamma.shape)
        steps = 2.0**NORM_BITS / y.scales.astype(np.float64)
        scaled = round(min(epsilon * (gamma.size / float(x.scale)) ** 2, _LARGEST_EPSILON))
        multiplier = np.rint(gamma.astype(np.float64) * steps).astype(np.int64)
        bias = np.rint(beta.astype(np.float64) * steps * 2**NORM_BITS).astype(np.int64)
        return cls(factors, max(scaled, 1), multiplier, bias)


def square_root(values: ArrayLike) -> I64:
    """floor(sqrt(values)) of int64 numbers from 1 to 1.5 * 2**62, by Newton's method in integers (I-BERT, algorithm 4).

    It starts from the power of two next above the root, falls monotonically, and stops at the root or one above. (Beyond 2**62
    it starts a little below the root, and the first step takes it above.)
    """
    v = np.asarray(values, np.int64)
    x = np.int64(1) << (v[..., None] >= np.int64(4) ** np.arange(31)).sum(axis=-1)
    for _ in range(NEWTON_STEPS):
        x = (x + v // x) // 2
    return np.asarray(x - (x * x > v), np.int64)


def layer_norm(q: Array, zero_point: int, constants: NormConstants, centred: bool = True) -> I64:
    """LayerNormalization over the last axis: an accumulator in units of `s_y * 2**(-2 * NORM_BITS)`, int64.

    With X = (q - z) 2**alpha of n channels, all sums are exact: n**2 times the variance is n * sum X**2 - (sum X)**2, and
    n * X - sum X over its root is what LayerNorm scales and shifts (FQ-ViT, section 3.2, with n taken out). RMSNormalization
    is the same without sum X: `centred=False`.
    """
    x = (np.asarray(q, np.int64) - zero_point) * constants.factors
    n = x.shape[-1]
    total = x.sum(axis=-1, keepdims=True) * centred
    deviation = x * n - total
    variance = (x * x).sum(axis=-1, keepdims=True) * n - total * total
    root = square_root((variance + constants.epsilon) * 4**ROOT_BITS)
    normalized = np.sign(deviation) * (np.abs(deviation) * 2 ** (ROOT_BITS + NORM_BITS) // root)
    return np.asarray(normalized * constants.multiplier + constants.bias, np.int64)


def exponent_rate(scale: ArrayLike) -> int:
    """One step of a tensor of that scale, in units of 2**-EXP_BITS octaves."""
    return int(min(round(float(np.asarray(scale)) / math.log(2) * 2**EXP_BITS), _LARGEST_RATE))


def exponent_bias(mask: Array) -> Array:
    """A mask, which a sum puts on scores, in units of 2**-EXP_BITS octaves: int32, -inf and the like at -`DEEPEST`."""
    with np.errstate(over="ignore"):
        octaves = np.asarray(mask, np.float32) * OCTAVE
    return np.asarray(np.rint(np.clip(octaves, np.float32(-DEEPEST), np.float32(HIGHEST_BIAS))), np.int32)


def exponential(q: Array, rate: int, bias: Array | None = None) -> I64:
    """exp(x - max x) over the last axis, times a constant: integers below 2**31 (I-BERT, algorithm 3).

    The difference is t = -(x - max x) / ln 2 octaves; of these, the whole ones are a shift and the rest r is the polynomial in
    p = -r ln 2. I-BERT divides by floor(ln 2 / scale), which is too coarse for 8-bit scales; the rate is the same in finer units.

    `bias`: a mask (`exponent_bias`), which broadcasts against q. What it hides is more than `EXP_RANGE` octaves below the rest,
    so 0. Where it hides a whole row, what it adds to all is lost in the difference, as in float; where it drowns scores in
    float, because it is below -`DEEPEST`, all are alike.
    """
    x = np.asarray(q, np.int64) * rate
    if bias is not None:
        x = np.maximum(x - 255 * rate + bias, -DEEPEST)
    t = np.minimum(x.max(axis=-1, keepdims=True) - x, EXP_RANGE << EXP_BITS)
    whole = t >> EXP_BITS
    p = EXP_OFFSET - (t - (whole << EXP_BITS))
    return np.asarray((p * p + EXP_CONSTANT) >> whole, np.int64)


def log_softmax_codes(q: Array, rate: int, largest: int, bias: Array | None = None) -> Array:
    """Softmax over the last axis as the uint8 codes of 2**-code, at most `largest` (FQ-ViT, section 3.3: Log-Int-Softmax).

    The code is log2 of sum / exp, rounded up where the mantissa is at least 1.5: floor(log2(4 sum / (3 exp))). `rate` and `bias`
    as in `exponential`.
    """
    e = exponential(q, rate, bias)
    ratio = 4 * e.sum(axis=-1, keepdims=True) // (3 * e + 1)
    codes = (ratio[..., None] >= np.int64(2) ** np.arange(1, LARGEST_CODE + 1)).sum(axis=-1)
    return np.asarray(np.minimum(codes, largest), np.uint8)


def softmax_rate(scale: ArrayLike) -> int:
    """The probability 1 in units of 2**-8 of a step of that scale."""
    return round(256 / float(np.asarray(scale)))


def softmax(q: Array, rate: int, unit: int, largest: int, bias: Array | None = None) -> Array:
    """Softmax over the last axis in uniform steps, at most `largest`; `unit` from `softmax_rate`. Returns uint8."""
    e = exponential(q, rate, bias)
    total = e.sum(axis=-1, keepdims=True)
    return np.asarray(np.minimum((e * unit + total * 128) // (total * 256), largest), np.uint8)


def shift_matmul(codes: Array, v: Array, zero_point: int) -> I64:
    """Attention x V as shifts (FQ-ViT, section 3.3): the mean of v - zero_point weighted by 2**-code, times 2**LOG_BITS, int64.

    Powers of two next to probabilities do not add up to 1. So each row is divided by the sum of its powers, which FQ-ViT does not
    do: then what all tokens have in common passes without an error.
    """
    weights = np.int64(2**LOG_BITS) >> np.asarray(codes, np.int64)
    acc = weights @ (np.asarray(v, np.int64) - zero_point)
    total = weights.sum(axis=-1, keepdims=True)
    return np.asarray(np.sign(acc) * ((np.abs(acc) << LOG_BITS) // total), np.int64)


def shift_multiplier(s_v: ArrayLike, s_y: ArrayLike) -> tuple[int, int]:
    """Multiplier m and shift n for the result: s_v / s_y * 2**-LOG_BITS is m * 2**-n, to 16 bits."""
    ratio = float(np.asarray(s_v)) / float(np.asarray(s_y))
    extra = max(0, SHIFT - 1 - math.floor(math.log2(ratio)))
    return max(1, round(ratio * 2**extra)), extra + LOG_BITS
