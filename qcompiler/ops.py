"""What the compiler knows about each ONNX operator: one row per operator.

A row says which inputs are activations, weights or bias, where the output's range comes from, and how the operator becomes
integer arithmetic. Targets decide which rows they run; passes only read rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from qcompiler import functions, ir, op_checks
from qcompiler.ir import Node


class Role(Enum):
    """What an input is to the operator."""

    ACT = "activation"
    WEIGHT = "weight"
    BIAS = "bias"
    OTHER = "other"  # indices, shapes, attributes passed as inputs


class Result(Enum):
    """Where the quantization parameters of the output come from."""

    OWN = "own"  # measured
    SAME = "same"  # those of the activation input
    FLOAT = "float"  # the operator runs in float


class Lowering(Enum):
    """How the operator becomes integer arithmetic."""

    MAC = "multiply-accumulate"  # ConvInteger | MatMulInteger, then requantize
    ADD = "add"
    MUL = "mul"
    SUM = "sum"  # a sum over spatial axes, then requantize
    MEAN = "mean"  # a sum over any axes of any size, then a rounded division
    SLOPE = "slope"  # a factor above zero and one below, then requantize
    CONCAT = "concat"
    MOVE = "move"  # the operator itself, on integers
    CLIP = "clip"  # integer bounds
    TABLE = "table"  # 256 entries
    PRODUCT = "product"  # MatMulInteger of two activations, then requantize
    NORM = "norm"  # integer mean, variance and root
    SOFTMAX = "softmax"  # integer exponential
    NONE = "none"


@dataclass(frozen=True)
class OpRule:
    """One operator. `operands`: roles by position, the last one repeats. `weight_axis`: the weight's output channels.

    `of_activations`: the row that holds where input 1, a weight otherwise, is no constant.
    `anchor`: worth a quantization of its own; other operators are quantized only between quantized neighbours.
    `refuse(node)`: why this very node cannot be integer, or None. `saturates(node)`: the bounds beyond which a larger input
    changes the result by less than 1e-4.
    """

    op: str
    operands: tuple[Role, ...]
    result: Result
    lowering: Lowering
    domain: str = ""
    weight_axis: int | None = None
    anchor: bool = False
    refuse: Callable[[Node], str | None] = lambda node: None
    saturates: Callable[[Node], tuple[float, float]] = lambda node: (-math.inf, math.inf)
    of_activations: OpRule | None = None

    def role(self, index: int) -> Role:
        """The role of input `index`."""
        return self.operands[min(index, len(self.operands) - 1)]

    def activations(self, node: Node) -> list[int]:
        """The positions of the inputs that are activations and present."""
        return [i for i, t in enumerate(node.inputs) if self.role(i) is Role.ACT and not t.is_empty()]


def op_key(op: str, domain: str | None = "") -> str:
    """The key of an operator in a table of rows: `domain.op`, or `op` in the standard domain."""
    return f"{domain}.{op}" if domain and domain != "ai.onnx" else op


def rule_of(rules: Mapping[str, OpRule], node: Node) -> OpRule | None:
    """The row of a node, before and after its constants are quantized; None if there is none."""
    rule = rules.get(op_key(node.op, node.domain))
    if rule is None or rule.of_activations is None or len(node.inputs) < 2:
        return rule
    maker = ir.producer(node.inputs[1])
    is_weight = maker is not None and maker.op == "DequantizeLinear" and ir.is_constant(maker.inputs[0])
    return rule if is_weight or ir.is_constant(node.inputs[1]) else rule.of_activations


def quantized_rule(rules: Mapping[str, OpRule], node: Node) -> OpRule:
    """The row of a node that is known to have one. Raises KeyError otherwise."""
    rule = rule_of(rules, node)
    if rule is None:
        raise KeyError(op_key(node.op, node.domain))
    return rule


def _hard_sigmoid(node: Node) -> tuple[float, float]:
    alpha, beta = float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5))
    return (-beta / alpha, (1 - beta) / alpha) if alpha > 0 else (-math.inf, math.inf)


def _between(low: float, high: float) -> Callable[[Node], tuple[float, float]]:
    return lambda node: (low, high)


_SATURATES: dict[str, Callable[[Node], tuple[float, float]]] = {
    "HardSwish": _between(-3, math.inf),
    "HardSigmoid": _hard_sigmoid,
    "Sigmoid": _between(-10, 10),
    "Tanh": _between(-6, 6),
    "Erf": _between(-3, 3),
    "Gelu": _between(-5, math.inf),
}


def _table(op: str, domain: str = "") -> OpRule:
    rule = OpRule(op, _ACT, Result.OWN, Lowering.TABLE, domain)
    return replace(rule, saturates=_SATURATES[op]) if op in _SATURATES else rule


def _quick_gelu(node: Node) -> tuple[float, float]:
    """x * sigmoid(alpha * x) is below 1e-4 from alpha * x = -12 on."""
    alpha = float(node.attrs.get("alpha", 1.702))
    return (-12 / alpha, math.inf) if alpha > 0 else (-math.inf, math.inf)


def _rms_norm(domain: str) -> OpRule:
    return OpRule(
        "RMSNormalization", _OTHER, Result.OWN, Lowering.NORM, domain, anchor=True, refuse=op_checks.layer_norm
    )


_ACT, _OTHER = (Role.ACT,), (Role.ACT, Role.OTHER)
_MAC = (Role.ACT, Role.WEIGHT, Role.BIAS)

_MOVERS = [
    "Reshape",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "Slice",
    "Split",
    "Gather",
    "DepthToSpace",
    "SpaceToDepth",
    "Expand",
    "Tile",
    "Identity",
    "ReduceMax",
    "ReduceMin",
]
_TABLES = [
    "Sigmoid",
    "HardSigmoid",
    "HardSwish",
    "Tanh",
    "LeakyRelu",
    "Elu",
    "Selu",
    "Celu",
    "Softplus",
    "Softsign",
    "Erf",
    "Gelu",
    "Mish",
    "Abs",
    "Neg",
    "Exp",
    "Sqrt",
    "Reciprocal",
    "Sin",
    "Cos",
    "ThresholdedRelu",
]
_FLOATS = [
    "ConvTranspose",
    "LogSoftmax",
    "AveragePool",
    "InstanceNormalization",
    "BatchNormalization",
    "Div",
    "Sub",
    "Pow",
    "Where",
    "LSTM",
    "GRU",
    "RNN",
]

OPS: dict[str, OpRule] = {
    op_key(rule.op, rule.domain): rule
    for rule in (
        OpRule("Conv", _MAC, Result.OWN, Lowering.MAC, weight_axis=0, anchor=True, refuse=op_checks.conv),
        OpRule("Gemm", _MAC, Result.OWN, Lowering.MAC, weight_axis=1, anchor=True, refuse=op_checks.gemm),
        OpRule(
            "MatMul",
            _MAC,
            Result.OWN,
            Lowering.MAC,
            weight_axis=1,
            anchor=True,
            refuse=op_checks.matmul,
            of_activations=OpRule("MatMul", _ACT, Result.OWN, Lowering.PRODUCT, anchor=True),
        ),
        OpRule("LayerNormalization", _OTHER, Result.OWN, Lowering.NORM, anchor=True, refuse=op_checks.layer_norm),
        _rms_norm(""),
        _rms_norm(functions.DOMAIN),
        OpRule("Softmax", _ACT, Result.OWN, Lowering.SOFTMAX, refuse=op_checks.last_axis),
        OpRule("MaskedSoftmax", _OTHER, Result.OWN, Lowering.SOFTMAX, functions.DOMAIN),
        OpRule("Add", _ACT, Result.OWN, Lowering.ADD),
        OpRule("Mul", _ACT, Result.OWN, Lowering.MUL),
        OpRule("Concat", _ACT, Result.OWN, Lowering.CONCAT),
        OpRule("GlobalAveragePool", _ACT, Result.OWN, Lowering.SUM, refuse=op_checks.spatial_size),
        OpRule("ReduceMean", _OTHER, Result.OWN, Lowering.MEAN, refuse=op_checks.constant_axes),
        OpRule("PRelu", _OTHER, Result.OWN, Lowering.SLOPE, refuse=op_checks.constant_slope),
        OpRule("Relu", _ACT, Result.SAME, Lowering.CLIP),
        OpRule("Clip", _OTHER, Result.SAME, Lowering.CLIP, refuse=op_checks.constant_bounds),
        OpRule("MaxPool", _ACT, Result.SAME, Lowering.MOVE, refuse=op_checks.one_output),
        OpRule("GlobalMaxPool", _ACT, Result.SAME, Lowering.NONE),
        OpRule("Pad", _OTHER, Result.SAME, Lowering.MOVE, refuse=op_checks.finite_pad),
        OpRule("Resize", _OTHER, Result.SAME, Lowering.MOVE, refuse=op_checks.nearest),
        *(OpRule(op, _OTHER, Result.SAME, Lowering.MOVE) for op in _MOVERS),
        *(_table(op) for op in _TABLES),
        replace(_table("QuickGelu", ir.CONTRIB_DOMAIN), saturates=_quick_gelu),
        _table("Gelu", ir.CONTRIB_DOMAIN),
        _table("FastGelu", ir.CONTRIB_DOMAIN),
        *(OpRule(op, _OTHER, Result.FLOAT, Lowering.NONE) for op in _FLOATS),
    )
}
"""The rows of the built-in operators, by `op_key`."""
