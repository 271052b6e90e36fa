"""fold-bias: additions of and multiplications by constants become part of the weights next to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.ops import op_key
from qcompiler.rewrite import Refusal, Rewriter, Rule, apply_rules
from qcompiler.state import CompileState, Phase
from qcompiler_passes.affine import Affine, Array, chains
from qcompiler_passes.linear import fold, fold_into_consumers, read

_MOVERS = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "DepthToSpace", "SpaceToDepth"})

_MAX_SPREAD = 2.0
"""How far scales may differ between channels that get one common range when the scales move behind a shift."""


@dataclass(frozen=True)
class FoldBias:
    """Fold Add, Sub, Mul, Div with float constants into the Conv, ConvTranspose, Gemm or MatMul before or after them.

    What cannot fold becomes as few Add and Mul as possible; those that do nothing go. An Add after a MatMul stays: it is the
    bias that normalize-gemm looks for. Where the target asks for `sub-as-add`, a Sub of two tensors becomes Neg and Add.
    """

    name: ClassVar[str] = "fold-bias"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None
    in_bodies: ClassVar[bool] = True

    def run(self, state: CompileState) -> int:
        """Return the number of nodes, or chains of nodes, that changed."""
        rules: dict[str, list[Rule]] = {op: [_fold_bias] for op in ("Add", "Sub", "Mul", "Div", "Pow")}
        if "sub-as-add" in state.target.rewrites:
            rules["Sub"].append(_sub_as_add)
        return apply_rules(Rewriter(state), rules)


def _fold_bias(rewriter: Rewriter, node: Node) -> Refusal | None:
    found = chains(rewriter, node)
    if isinstance(found, Refusal):
        return found
    last = found[-1]
    if not last.scales and not last.shifts and last.keeps_shape and rewriter.bypass(node):
        return None
    refusal: Refusal | None = Refusal("it is the bias of a MatMul; normalize-gemm makes them a Gemm", node.name)
    if not _is_matmul_bias(found[0]):
        refusal = fold(rewriter, found)
        if refusal is None or _fold_scale(rewriter, found[0]) is None or _hoist(rewriter, last) is None:
            return None
    return None if _simplify(rewriter, found) else refusal


def _sub_as_add(rewriter: Rewriter, node: Node) -> Refusal | None:
    """a - b = a + (-b): of these two, unlike Sub, every form has the same integers."""
    a, b = node.inputs
    if ir.type_name(a) != "float32":
        return Refusal("it does not subtract float32 tensors", node.name)
    negated = rewriter.variable(f"{node.name}_negated", b.dtype, b.shape)
    rewriter.node("Neg", [b], [negated], origin=node)
    rewriter.take_output(rewriter.node("Add", [a, negated], origin=node), node.outputs[0])
    rewriter.remove(node)
    return None


def _is_matmul_bias(chain: Affine) -> bool:
    producer = ir.producer(chain.source)
    if producer is None or producer.op != "MatMul" or len(chain.nodes) > 1 or chain.scales:
        return False
    weight = ir.value(producer.inputs[1])
    return weight is not None and weight.ndim == 2


def _fold_scale(rewriter: Rewriter, chain: Affine) -> Refusal | None:
    """Before a Conv that pads, turn `x * a + b` into `x + b / a` and fold the `a`; the Conv pads with zeros as before."""
    size = np.abs(chain.scale)
    if len(chain.nodes) < 2 or not chain.shifts or not chain.scales or size.max() > _MAX_SPREAD * size.min():
        return Refusal("no scale to fold alone", chain.nodes[-1].name)
    readers, name = rewriter.users(chain.result), chain.result.name
    refusal = fold_into_consumers(rewriter, replace(chain, shift=np.zeros(())))
    if refusal is None:
        add = _emit(rewriter, "Add", chain.source, chain.shift / chain.scale, chain)
        rewriter.relate(add, name, 1 / chain.scale)
        for reader in readers:
            rewriter.set_input(reader, 0, add)
    return refusal


def _hoist(rewriter: Rewriter, step: Affine) -> Refusal | None:
    """Move an operation with one number before operators that only move elements, if it can fold there."""
    node, source = step.nodes[0], step.source
    if not step.is_uniform or not step.keeps_shape:
        return Refusal("the constant is not one number", node.name)
    movers: list[Node] = []  # the last first
    while rewriter.only_user(source) is not None:
        mover = ir.producer(source)
        if mover is None or op_key(mover.op, mover.domain) not in _MOVERS:
            break
        movers.append(mover)
        source = mover.inputs[0]
    if not movers or not _reaches_weights(rewriter, source):
        return Refusal("nothing before it can take it", node.name)
    number = next(ir.value(t) for t in node.inputs if ir.is_constant(t))
    constant = rewriter.constant(f"{node.name}_number", np.reshape(np.asarray(number), ()))
    inputs = [constant if ir.is_constant(t) else source for t in node.inputs]
    early = rewriter.node(node.op, inputs, [rewriter.variable(source.name, source.dtype, source.shape)], origin=node)
    rewriter.set_input(movers[-1], 0, early.outputs[0])
    for mover in movers[1:]:
        rewriter.change_values(mover.outputs[0], step.scale.reshape(()), step.shift.reshape(()))
    rewriter.take_output(movers[0], step.result)
    rewriter.remove(node)
    return None


def _reaches_weights(rewriter: Rewriter, source: Tensor) -> bool:
    """Whether a chain that starts at `source` ends in an operator with constant weights, and nothing else reads between."""
    producer = ir.producer(source)
    if producer is None or rewriter.only_user(source) is None:
        return False
    found = chains(rewriter, producer)
    if not isinstance(found, Refusal):
        first = ir.producer(found[0].source)
        if first is None or rewriter.only_user(found[0].source) is None:
            return False
        producer = first
    return not isinstance(read(producer), Refusal)


def _simplify(rewriter: Rewriter, found: Sequence[Affine]) -> bool:
    """Replace the longest chain that Mul and Add express with fewer nodes, or with these instead of Sub and Div."""
    for chain in found:
        count = max(1, chain.scales + chain.shifts)
        cost = len(chain.nodes) + 0.5 * sum(n.op in ("Sub", "Div") for n in chain.nodes)
        if count >= cost or not all(_fits(a, chain.dtype) for a in (chain.scale, chain.shift)):
            continue
        tensor, result = chain.source, chain.result
        if chain.scales:
            scale = chain.scale if chain.shifts else np.broadcast_to(chain.scale, chain.shape)
            tensor = _emit(rewriter, "Mul", tensor, scale, chain)
        if chain.shifts or not chain.scales:
            tensor = _emit(rewriter, "Add", tensor, np.broadcast_to(chain.shift, chain.shape), chain)
        writer = ir.producer(tensor)
        assert writer is not None
        rewriter.take_output(writer, result)
        for node in chain.nodes:
            rewriter.remove(node)
        return True
    return False


def _fits(array: Array, dtype: np.dtype[Any]) -> bool:
    return bool((np.abs(array) <= np.finfo(dtype).max).all())


def _emit(rewriter: Rewriter, op: str, source: Tensor, constant: NDArray[Any], chain: Affine) -> Tensor:
    hint = chain.nodes[-1].name
    operand = rewriter.constant(f"{hint}_{op.lower()}", constant.astype(chain.dtype))
    return rewriter.node(op, [source, operand], origin=chain.nodes, hint=hint).outputs[0]
