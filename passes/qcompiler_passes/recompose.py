"""recompose: put one operator in the place of the primitives that an exporter wrote out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.polynomial import Polynomial

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.rewrite import Refusal, Rewriter, Rule, apply_rules
from qcompiler.state import CompileState, Phase
from qcompiler_passes.match import (
    NO_MATCH,
    collapse,
    first_of,
    has_coefficients,
    made_by,
    near,
    polynomial,
    product,
    scalar_operand,
    source,
)
from qcompiler_passes.recompose_attention import attention
from qcompiler_passes.recompose_layers import channel_shuffle, softmax
from qcompiler_passes.recompose_masks import finite_mask, masked_softmax
from qcompiler_passes.recompose_norms import (
    channel_affine,
    fold_affine,
    layer_normalization,
    rms_normalization,
    shifted_normalization,
)


@dataclass(frozen=True)
class Recompose:
    """Find activations, normalizations and channel shuffles in their primitive form.

    Makes Relu, Clip, LeakyRelu, HardSigmoid, HardSwish, Gelu, LayerNormalization, RMSNormalization and Softmax; QuickGelu, a
    Gather of channels and Softmax with its mask where the target asks for them. Operators that the model's opset lacks are not
    made, but for RMSNormalization as a function where the target asks for that. It may also ask for LayerNormalization of
    channels, and for Attention in its parts.
    """

    name: ClassVar[str] = "recompose"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None
    in_bodies: ClassVar[bool] = True

    def run(self, state: CompileState) -> int:
        """Return the number of patterns replaced."""
        return apply_rules(Rewriter(state), RULES)


def clamp(rewriter: Rewriter, node: Node) -> Refusal | None:
    """A chain of Relu, Clip, Min and Max with constant bounds -> one Relu or Clip."""
    low, high, nodes, here = -math.inf, math.inf, list[Node](), node
    while (bounds := _bounds(here)) is not None:
        low, high = (min(max(edge, low), high) for edge in bounds[:2])
        nodes.append(here)
        maker = ir.producer(bounds[2])
        if maker is None or rewriter.only_user(bounds[2]) is None:
            break
        here = maker
    if not nodes:
        return NO_MATCH
    op = "Relu" if (low, high) == (0.0, math.inf) else "Clip"
    if len(nodes) == 1 and node.op == op:
        return NO_MATCH
    inputs = [nodes[-1].inputs[_operand(nodes[-1])]]
    for hint, bound in (("min", low), ("max", high)) if op == "Clip" else ():
        inputs.append(rewriter.constant(hint, np.float32(bound)) if math.isfinite(bound) else ir.Variable.empty())
    return collapse(rewriter, node, nodes, op, inputs)


def _operand(node: Node) -> int:
    """Which input of a clamping node is clamped."""
    return 1 if node.op in {"Min", "Max"} and scalar_operand(node, 0) is not None else 0


def _bounds(node: Node) -> tuple[float, float, Tensor] | None:
    """The bounds of a clamping node, and what it clamps."""
    if node.domain or "min" in node.attrs or "max" in node.attrs:
        return None
    tensor = node.inputs[_operand(node)] if node.inputs else None
    if tensor is None or ir.is_constant(tensor):
        return None
    bounds: tuple[float | None, float | None] = (-math.inf, math.inf)
    if node.op == "Relu":
        bounds = (0.0, math.inf)
    elif node.op == "Max":
        bounds = (scalar_operand(node, 1 - _operand(node)), math.inf)
    elif node.op == "Min":
        bounds = (-math.inf, scalar_operand(node, 1 - _operand(node)))
    elif node.op == "Clip":
        given = [ir.optional_input(node, i) for i in (1, 2)]
        bounds = (
            -math.inf if given[0] is None else ir.scalar(given[0]),
            math.inf if given[1] is None else ir.scalar(given[1]),
        )
    else:
        return None
    low, high = bounds
    return None if low is None or high is None or not low <= high else (low, high, tensor)


def leaky_relu(rewriter: Rewriter, node: Node) -> Refusal | None:
    """Max(x, a * x) with 0 < a < 1 -> LeakyRelu."""
    for x, other in (node.inputs, node.inputs[::-1]) if len(node.inputs) == 2 else ():
        nodes: list[Node] = []
        line = None if other is x else polynomial(other, x, nodes)
        if line is not None and has_coefficients(line, 0.0, line.coef[-1]) and 0 < line.coef[-1] < 1:
            return collapse(rewriter, node, nodes, "LeakyRelu", [x], alpha=float(line.coef[-1]))
    return NO_MATCH


def single_slope(rewriter: Rewriter, node: Node) -> Refusal | None:
    """PRelu with one slope for all channels -> LeakyRelu."""
    slope = ir.value(node.inputs[1])
    if slope is None or slope.size == 0:
        return Refusal("the slope is not a constant", node.inputs[1].name)
    first = slope.reshape(-1)[0]
    if not np.all(slope == first):
        return Refusal("the channels have slopes of their own", node.inputs[1].name)
    return collapse(rewriter, node, [], "LeakyRelu", node.inputs[:1], alpha=float(first))


def hard_sigmoid(rewriter: Rewriter, node: Node) -> Refusal | None:
    """Clip(x * a + b, 0, 1), or Clip(x * a + b, 0, c) / c -> HardSigmoid."""
    scale, nodes, clip = 1.0, list[Node](), node
    if node.op != "Clip":
        found = product(rewriter, node)
        maker = made_by(found.factors[0], "Clip") if found is not None and len(found.factors) == 1 else None
        if found is None or maker is None:
            return NO_MATCH
        scale, nodes, clip = found.scale, [*found.nodes, maker], maker
    bounds = _bounds(clip)
    if bounds is None or bounds[0] != 0 or not near(scale * bounds[1], 1.0):
        return NO_MATCH
    x = source(bounds[2], through=lambda tensor: rewriter.only_user(tensor) is not None)
    line = polynomial(bounds[2], x, nodes)
    if line is None or line.degree() != 1 or not line.coef[0]:
        return NO_MATCH
    beta, alpha = (scale * float(c) for c in line.coef)
    return collapse(rewriter, node, nodes, "HardSigmoid", [x], alpha=alpha, beta=beta)


@dataclass(frozen=True)
class _Gate:
    """x * outer(curve(inner(x))), `curve` a node."""

    curve: Node
    outer: Polynomial
    inner: Polynomial


@dataclass(frozen=True)
class _Activation:
    """An operator, the opset that it needs, and its attributes."""

    op: str
    attrs: dict[str, Any]
    opset: int = 1
    domain: str = ""


def gated(rewriter: Rewriter, node: Node) -> Refusal | None:
    """x times a curve of x -> HardSwish, QuickGelu (SiLU), Gelu or FastGelu, constants in any place."""
    found = product(rewriter, node)
    if found is None or len(found.factors) != 2:
        return NO_MATCH
    for x, factor in (found.factors, found.factors[::-1]):
        nodes = list(found.nodes)
        gate = _gate(found.scale, x, factor, nodes)
        if gate is not None:
            made = _CURVES[gate.curve.op](rewriter.state, gate)
            if isinstance(made, Refusal):
                return made
            if rewriter.state.graph.opset < made.opset:
                return Refusal(f"{made.op} needs opset {made.opset}", node.name)
            return collapse(rewriter, node, nodes, made.op, [x], domain=made.domain, **made.attrs)
    return NO_MATCH


def _gate(scale: float, x: Tensor, factor: Tensor, nodes: list[Node]) -> _Gate | None:
    result = source(factor)
    curve = ir.producer(result)
    if curve is None or curve.op not in _CURVES or curve.domain:
        return None
    outer = polynomial(factor, result, nodes)
    inner = polynomial(curve.inputs[0], x, nodes)
    nodes.append(curve)
    return None if outer is None or inner is None else _Gate(curve, outer * scale, inner)


def _quick_gelu(state: CompileState, gate: _Gate, slope: float) -> _Activation | Refusal:
    if "QuickGelu" not in state.target.rewrites:
        return Refusal(f"target {state.target.name} does not ask for QuickGelu", gate.curve.name)
    return _Activation("QuickGelu", {"alpha": slope}, domain=ir.CONTRIB_DOMAIN)


def _sigmoid(state: CompileState, gate: _Gate) -> _Activation | Refusal:
    slope = float(gate.inner.coef[-1])
    if has_coefficients(gate.outer, 0.0, 1.0) and has_coefficients(gate.inner, 0.0, slope):
        return _quick_gelu(state, gate, slope)
    return Refusal("it is not x * Sigmoid(a * x)", gate.curve.name)


def _erf(state: CompileState, gate: _Gate) -> _Activation | Refusal:
    if not (has_coefficients(gate.outer, 0.5, 0.5) and has_coefficients(gate.inner, 0.0, math.sqrt(0.5))):
        return Refusal("it is not x * (1 + Erf(x / sqrt(2))) / 2", gate.curve.name)
    return _Activation("Gelu", {}, domain="" if state.graph.opset >= 20 else ir.CONTRIB_DOMAIN)


def _tanh(state: CompileState, gate: _Gate) -> _Activation | Refusal:
    """The approximation of GELU by Hendrycks and Gimpel (arXiv 1606.08415), or x * Sigmoid(2 * a * x) in terms of Tanh."""
    slope = float(gate.inner.coef[-1])
    root = math.sqrt(2 / math.pi)
    if has_coefficients(gate.outer, 0.5, 0.5) and has_coefficients(gate.inner, 0.0, slope):
        return _quick_gelu(state, gate, 2 * slope)
    if not (has_coefficients(gate.outer, 0.5, 0.5) and has_coefficients(gate.inner, 0.0, root, 0.0, 0.044715 * root)):
        return Refusal("it is not the Tanh form of GELU", gate.curve.name)
    if state.graph.opset >= 20:
        return _Activation("Gelu", {"approximate": "tanh"})
    return _Activation("FastGelu", {}, domain=ir.CONTRIB_DOMAIN)


def _hard(state: CompileState, gate: _Gate) -> _Activation | Refusal:
    """x * HardSigmoid(a * x + b), or with Clip in its place, is HardSwish if the slope is 1/6 and the offset 1/2."""
    curve, top, line = gate.curve, 1.0, gate.inner
    if curve.op == "HardSigmoid":
        line = line * float(curve.attrs.get("alpha", 0.2)) + float(curve.attrs.get("beta", 0.5))
    else:
        bounds = _bounds(curve)
        if bounds is None or bounds[0] != 0:
            return Refusal("its Clip does not start at 0", curve.name)
        top = bounds[1]
    scale = float(gate.outer.coef[-1])
    if not math.isfinite(top) or not has_coefficients(gate.outer, 0.0, 1 / top):
        return Refusal(f"the gate goes to {scale * top:g}, that of HardSwish to 1", curve.name)
    line = line * scale
    if not has_coefficients(line, 0.5, 1 / 6):
        beta, alpha = (*line.coef, 0.0)[:2]
        return Refusal(f"the gate has alpha={alpha:g}, beta={beta:g}; that of HardSwish 1/6 and 1/2", curve.name)
    return _Activation("HardSwish", {}, opset=14)


_CURVES: dict[str, Callable[[CompileState, _Gate], _Activation | Refusal]] = {
    "Sigmoid": _sigmoid,
    "Erf": _erf,
    "Tanh": _tanh,
    "HardSigmoid": _hard,
    "Clip": _hard,
}

RULES: dict[str, Rule] = {
    "Relu": clamp,
    "Clip": first_of(clamp, hard_sigmoid),
    "Min": clamp,
    "Max": first_of(clamp, leaky_relu),
    "PRelu": single_slope,
    "Mul": first_of(gated, hard_sigmoid, fold_affine, channel_affine, layer_normalization, rms_normalization),
    "Div": first_of(gated, hard_sigmoid, layer_normalization, rms_normalization, softmax),
    "Add": first_of(fold_affine, channel_affine, shifted_normalization, finite_mask),
    "Softmax": masked_softmax,
    "Attention": attention,
    "Reshape": channel_shuffle,
    "Gather": channel_shuffle,
}
"""The patterns by the operator that ends them."""
