"""Targets: everything that the compiler knows about a kind of hardware, as values of one type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qcompiler.ir import Node
from qcompiler.ops import Lowering, OpRule, Result, op_key, rule_of
from qcompiler.quant import QuantSpec


@dataclass(frozen=True)
class Alignment:
    """The channel counts for which a target's convolution kernels are fast.

    `inputs`, `outputs`: of dense convolutions, multiples. `least`: of outputs, at least so many. `depthwise`: of depthwise ones,
    multiples. `block`: channels of a dense convolution that is as fast as a grouped one of the same width; 0: grouped ones
    have kernels of their own.
    """

    inputs: int = 1
    outputs: int = 1
    least: int = 1
    depthwise: int = 1
    block: int = 0


@dataclass(frozen=True)
class Target:
    """What a kind of hardware runs.

    `activation`, `weight`: the integer types. `opset`: the least ONNX opset of the output. `lowerings`: what has an integer
    kernel. `stays_float`: operators that run better in float, with the reason. `float_result`: operators whose kernels give a
    float result at no cost, so that a float consumer needs no quantized tensor. `kernels`: the quantized operators
    (`op_key`) that instruction selection may use; without them the integer form is the final one. `rewrites`: names of the
    optional float rewrites that pay on the target. `alignment`: the channel counts that its convolutions want. `per_channel`:
    one weight scale per output channel, or one per tensor. `profile`: the cost table (see `cost`) by which blocks are placed.
    """

    name: str
    description: str
    activation: QuantSpec
    weight: QuantSpec
    lowerings: frozenset[Lowering]
    opset: int = 17
    stays_float: Mapping[str, str] = field(default_factory=dict)
    float_result: frozenset[str] = frozenset()
    kernels: frozenset[str] = frozenset()
    rewrites: frozenset[str] = frozenset()
    alignment: Alignment = Alignment()
    per_channel: bool = True
    profile: str = ""

    def why_not(self, node: Node, rules: Mapping[str, OpRule]) -> str | None:
        """The reason why a node stays float on this target, or None if it can be integer."""
        rule = rule_of(rules, node)
        if rule is None:
            return f"{op_key(node.op, node.domain)} has no row in the operator table"
        if rule.lowering not in self.lowerings:  # of a node with variants, say why it is not the common one
            rule = rules[op_key(node.op, node.domain)]
        return self.why_never(rule) or rule.refuse(node)

    def why_never(self, rule: OpRule) -> str | None:
        """The reason why all nodes of an operator stay float on this target, or None if it depends on the node."""
        key = op_key(rule.op, rule.domain)
        if key in self.stays_float:
            return self.stays_float[key]
        if rule.result is Result.FLOAT or rule.lowering not in self.lowerings:
            return f"{key} has no integer kernel on {self.name}"
        return None
