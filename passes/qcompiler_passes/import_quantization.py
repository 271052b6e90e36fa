"""import-quantization: a quantized model as a float model, with the scales that it was trained or calibrated with."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from qcompiler import ir
from qcompiler.errors import UserError
from qcompiler.ir import Node, Tensor
from qcompiler.ops import Lowering, op_key
from qcompiler.quant import QuantParams, QuantSpec, params_from_range
from qcompiler.rewrite import Refusal, Rewriter, Rule, apply_rules
from qcompiler.shapes import infer_shapes
from qcompiler.state import CompileState, Phase
from qcompiler_passes.form_blocks import activation_bounds
from qcompiler_passes.import_operators import FORMS, concat_to_float, to_float


@dataclass(frozen=True)
class ImportQuantization:
    """Take QuantizeLinear and DequantizeLinear off the activations, and keep their params in `state.imported`.

    Quantized operators (QLinearConv, QGemm, …) become float ones first. int8 activations become uint8, which moves the zero point
    by 128 and changes nothing else. An odd zero point moves by one step: the grid of values stays, the longer end of the
    range loses its last step. Where the range begins at zero, saturation did the work of a Relu: it comes back. Integer
    graph inputs and outputs keep their conversion. Weights need no table: `scale-weights` finds the steps on which they lie.
    """

    name: ClassVar[str] = "import-quantization"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of rewrites. Raises UserError for quantized operators without a float counterpart."""
        for node in state.graph.nodes:
            key = op_key(node.op, node.domain)
            if key.startswith(("QLinear", "com.microsoft.QLinear", "com.microsoft.QGemm")) and key not in RULES:
                raise UserError(f"{node.op} cannot be read back to float; give the float model", f"node {node.name!r}")
        count = apply_rules(Rewriter(state), RULES)
        if count:
            infer_shapes(state.graph)
        _note_untouched(state)
        return count


_WITHOUT_SCALES = ("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "QAttention", "QMoE")
"""Products of quantized models whose activations have no constant scales: they stay, and so does what makes their integers."""


def _note_untouched(state: CompileState) -> None:
    found = Counter(
        n.op for n in state.graph.nodes if n.op in _WITHOUT_SCALES or n.op.startswith(("DynamicQuantizeM", "QLinear"))
    )
    note = f"quantized without scales, left as it is: {', '.join(f'{op} {found[op]}' for op in sorted(found))}"
    if found and note not in state.notes:
        state.notes.append(note)


def dequantize(rewriter: Rewriter, node: Node) -> Refusal | None:
    """The rule for DequantizeLinear: it goes with the QuantizeLinear before it, or moves to it past what moves integers."""
    maker = ir.producer(node.inputs[0])
    if maker is None or not _comes_from_quantize(rewriter, maker):
        params = read_params(rewriter.state, node)
        if params is not None:
            rewriter.state.imported.setdefault(node.outputs[0].name, params)
        return Refusal("it reads integers that the model is fed", node.inputs[0].name)
    if maker.op == "QuantizeLinear":
        return _merge(rewriter, maker, node)
    if maker.op == "Clip":
        return _merge_narrow(rewriter, maker, node)
    inner = rewriter.variable(f"{maker.inputs[0].name}_real", node.outputs[0].dtype, maker.inputs[0].shape)
    rewriter.node("DequantizeLinear", [maker.inputs[0], *node.inputs[1:]], [inner], origin=node, **node.attrs)
    moved = rewriter.node(maker.op, [inner, *maker.inputs[1:]], origin=maker, **maker.attrs)
    rewriter.take_output(moved, node.outputs[0])
    rewriter.remove(node)
    return None


def quantize(rewriter: Rewriter, node: Node) -> Refusal | None:
    """The rule for QuantizeLinear: what it reads has params; of several, the first counts."""
    _record(rewriter, node)
    return Refusal("its integers are read as such", node.outputs[0].name)


RULES: dict[str, Rule] = {
    "DequantizeLinear": dequantize,
    "QuantizeLinear": quantize,
    "com.microsoft.DequantizeLinear": dequantize,
    "com.microsoft.QuantizeLinear": quantize,
    "com.microsoft.QLinearConcat": concat_to_float,
    **dict.fromkeys(FORMS, to_float),
}


def _record(rewriter: Rewriter, node: Node) -> QuantParams | None:
    """Remember the params of what a QuantizeLinear reads.

    Without negative values the range begins at zero, on the same grid: saturation does the work of the Relu then.
    """
    params = read_params(rewriter.state, node)
    if params is not None:
        if _is_nonnegative(rewriter, node.inputs[0]):
            params = replace(params, zero_point=params.spec.qmin)
        rewriter.state.imported.setdefault(node.inputs[0].name, params)
    return params


def _comes_from_quantize(rewriter: Rewriter, node: Node | None) -> bool:
    """Whether a node is a QuantizeLinear, or moves or clips the integers of one."""
    while node is not None and node.op != "QuantizeLinear":
        moves = _is_mover(rewriter, node) and node.op != "Resize"
        if not moves and (node.op != "Clip" or activation_bounds(node) is None):
            return False
        node = ir.producer(node.inputs[0])
    return node is not None


def read_params(state: CompileState, node: Node) -> QuantParams | None:
    """The params of a conversion as the target has them; None unless there is one constant scale, for 8 bits."""
    scale, zero = ir.value(node.inputs[1]), ir.optional_input(node, 2)
    integers = node.outputs[0] if node.op == "QuantizeLinear" else node.inputs[0]
    kind = ir.type_name(integers if zero is None else zero)
    zero_point = None if zero is None else ir.scalar(zero)
    if scale is None or scale.size != 1 or scale.dtype != np.float32 or kind not in ("int8", "uint8"):
        return None
    if zero is not None and zero_point is None:
        return None
    value = np.asarray(scale, np.float32).reshape(())
    if not (np.isfinite(value) and value > 0):
        return None
    unsigned = int(zero_point or 0) + (128 if kind == "int8" else 0)
    return _on_target(QuantParams(QuantSpec("uint8", 0, 255), value, unsigned), state.target.activation)


def _on_target(params: QuantParams, spec: QuantSpec) -> QuantParams:
    if spec.steps != params.spec.steps or spec.symmetric:
        return params_from_range(*params.range, spec)
    zero_point = params.zero_point + spec.qmin - params.spec.qmin
    if zero_point % 2:
        zero_point += -1 if zero_point - spec.qmin >= spec.qmax - zero_point else 1
    return replace(params, spec=spec, zero_point=zero_point)


def _merge(rewriter: Rewriter, first: Node, node: Node) -> Refusal | None:
    """QuantizeLinear and DequantizeLinear with the same params leave nothing but the fact that the tensor is quantized."""
    if not _same_constants(first, node):
        return Refusal("it reads integers under another scale than they were written with", first.name)
    source = first.inputs[0]
    params = _record(rewriter, first)
    if params is not None and params.zero_point == params.spec.qmin:
        _bound(rewriter, first, 0.0, math.inf)
    _bypass(rewriter, node, source)
    return None


def _merge_narrow(rewriter: Rewriter, clip: Node, node: Node) -> Refusal | None:
    """QuantizeLinear, Clip to fewer integers, DequantizeLinear: a Clip of the real values."""
    first, bounds = ir.producer(clip.inputs[0]), activation_bounds(clip)
    if first is None or first.op != "QuantizeLinear" or bounds is None or not _same_constants(first, node):
        return Refusal("it is not a Clip between QuantizeLinear and DequantizeLinear of the same scale", clip.name)
    scale, zero = ir.scalar(first.inputs[1]), ir.optional_input(first, 2)
    if scale is None:
        return Refusal("it has several scales", first.name)
    zero_point = 0.0 if zero is None else ir.scalar(zero) or 0.0
    low, high = (scale * (bound - zero_point) for bound in bounds)
    _record(rewriter, first)
    _bound(rewriter, first, low, high)
    _bypass(rewriter, node, first.inputs[0])
    return None


def _same_constants(first: Node, second: Node) -> bool:
    for index in (1, 2):
        a, b = ir.optional_input(first, index), ir.optional_input(second, index)
        if a is b:
            continue
        values = [None if t is None else ir.value(t) for t in (a, b)]
        if (a is None) != (b is None):  # 0 is the default
            if any(v is not None and np.any(v != 0) for v in values) or index == 1:
                return False
        elif values[0] is None or values[1] is None or not np.array_equal(values[0], values[1]):
            return False
    return bool(first.attrs.get("axis", 1) == second.attrs.get("axis", 1))


def _bound(rewriter: Rewriter, first: Node, low: float, high: float) -> None:
    """Put an activation with these bounds where a QuantizeLinear only saturates so far: behind what makes the values.

    What moves values on the way, or picks some, gets the params of the QuantizeLinear: it comes behind the activation then.
    """
    source, maker = first.inputs[0], ir.producer(first.inputs[0])
    passed: list[Tensor] = []
    while maker is not None and _is_mover(rewriter, maker) and _is_read_once(rewriter, source):
        source, maker = maker.inputs[0], ir.producer(maker.inputs[0])
        passed.append(source)
    if maker is None or (low == 0 and math.isinf(high) and _is_nonnegative(rewriter, source)):
        return
    if not _is_read_once(rewriter, source):
        return
    bounds = activation_bounds(maker)
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
        if (low, high) == bounds:
            return
    limits = [rewriter.constant(f"{first.name}_{k}", np.float32(v)) for k, v in (("low", low), ("high", high))]
    op, inputs = ("Relu", []) if (low, high) == (0, math.inf) else ("Clip", limits)
    bound = rewriter.node(op, [rewriter.cut(source), *inputs], origin=first, hint=f"{first.name}_bound")
    rewriter.take_output(bound, source)
    params = rewriter.state.imported.get(first.inputs[0].name)
    if params is not None:
        rewriter.state.imported.update((tensor.name, params) for tensor in passed)


def _is_mover(rewriter: Rewriter, node: Node | None) -> bool:
    rule = None if node is None else rewriter.state.ops.get(op_key(node.op, node.domain))
    return rule is not None and rule.lowering is Lowering.MOVE and rule.op not in ("Pad", "Split")


def _is_read_once(rewriter: Rewriter, tensor: Tensor) -> bool:
    """Whether one node reads the tensor, or several QuantizeLinear; those that nobody reads any more do not count."""
    users = [u for u in rewriter.users(tensor) if u.op != "QuantizeLinear" or _is_alive(rewriter, u.outputs[0])]
    return not rewriter.is_output(tensor) and (len(users) == 1 or all(u.op == "QuantizeLinear" for u in users))


def _is_alive(rewriter: Rewriter, tensor: Tensor) -> bool:
    return bool(tensor.outputs) or rewriter.is_output(tensor)


_NONNEGATIVE = ("Abs", "Exp", "HardSigmoid", "Sigmoid", "Softmax", "Sqrt")


def _is_nonnegative(rewriter: Rewriter, tensor: Tensor) -> bool:
    """Whether no value can be below zero, as far as the operators before it tell."""
    maker = ir.producer(tensor)
    if maker is None:
        return False
    bounds = activation_bounds(maker)
    if bounds is not None or maker.op in _NONNEGATIVE:
        return bounds is None or bounds[0] >= 0
    if maker.op in ("Concat", "Add", "Mul"):
        return all(_is_nonnegative(rewriter, t) for t in maker.inputs)
    passes_on = _is_mover(rewriter, maker) or maker.op in ("Pad", "AveragePool", "GlobalAveragePool", "ReduceMean")
    return passes_on and _is_nonnegative(rewriter, maker.inputs[0])


def _bypass(rewriter: Rewriter, node: Node, source: Tensor) -> None:
    """Let the readers of a DequantizeLinear read `source`, which may get the name of a graph output by that."""
    imported, result = rewriter.state.imported, node.outputs[0]
    rewriter.set_input(node, 0, source)
    if not rewriter.bypass(node):
        copy = rewriter.node("Identity", [source], origin=node)
        rewriter.take_output(copy, result)
        rewriter.remove(node)
    elif rewriter.is_output(result) and source.name in imported:
        imported[result.name] = imported.pop(source.name)
