"""guard-float: keep ONNX Runtime from quantizing what stays float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.ops import Lowering, rule_of
from qcompiler.rewrite import Refusal, Rewriter, Rule, apply_rules
from qcompiler.state import CompileState, Phase


@dataclass(frozen=True)
class GuardFloat:
    """Give a Q or DQ next to a float operator one scale per channel, all equal, where ONNX Runtime would change the operator.

    Between a DQ with a single scale and a Q it quantizes the weights of a float Conv, ConvTranspose or Gemm, per tensor; and it
    moves such a Q before a MaxPool, such a DQ behind it, where the kernel for integers may be many times slower. A Max with the
    lowest float keeps it from fusing a quantized Gemm that has a float result with the Relu behind it, which would dequantize the
    weights at every inference, and from moving a DQ behind an operator whose result the body of an If, Loop or Scan reads, at
    which it crashes. The function stays the same to the bit.
    """

    name: ClassVar[str] = "guard-float"
    requires: ClassVar[Phase] = Phase.QDQ
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of Q and DQ that were changed, and of DQ and Gemm that were kept apart."""
        rules: dict[str, Rule | Sequence[Rule]] = {
            "QuantizeLinear": _quantize,
            "DequantizeLinear": (_dequantize, _free_bodies),
            "Gemm": _gemm,
        }
        return apply_rules(Rewriter(state), rules)


def _quantize(rewriter: Rewriter, node: Node) -> Refusal | None:
    maker = ir.producer(node.inputs[0])
    if maker is None or maker.op != "MaxPool" or _is_quantized(rewriter, maker):
        return Refusal("it stays where it is")
    return _spread(rewriter, node, node.inputs[0], maker)


def _dequantize(rewriter: Rewriter, node: Node) -> Refusal | None:
    if ir.is_constant(node.inputs[0]):
        return Refusal("it has no activation")
    result = node.outputs[0]
    users = rewriter.users(result)
    trapped = [user for user in users if _is_trapped(rewriter, user, result)]
    if not trapped:
        return Refusal("what it feeds stays as it is")
    if not any(_is_quantized(rewriter, user) for user in users):
        return _spread(rewriter, node, result, trapped[0])
    own = rewriter.node("DequantizeLinear", node.inputs, origin=node, **node.attrs)
    own.outputs[0].dtype, own.outputs[0].shape = result.dtype, result.shape
    refusal = _spread(rewriter, own, result, trapped[0])
    if refusal is None:
        rewriter.replace_uses(result, own.outputs[0], trapped)
    else:
        rewriter.remove(own)
    return refusal


def _free_bodies(rewriter: Rewriter, node: Node) -> Refusal | None:
    scale = ir.value(node.inputs[1])
    if ir.is_constant(node.inputs[0]) or scale is None or scale.size != 1:
        return Refusal("ONNX Runtime does not move it")
    own = {id(n) for n in rewriter.graph.nodes}
    movers = [user for user in rewriter.users(node.outputs[0]) if _moves_into_body(rewriter, user, own)]
    if not movers:
        return Refusal("no body of an operator reads what it gives, moved")
    _keep_apart(rewriter, node, movers)
    return None


def _moves_into_body(rewriter: Rewriter, node: Node, own: set[int]) -> bool:
    """Whether a node of the graph only moves values, and a body reads them, perhaps moved by others."""
    rule = rule_of(rewriter.state.ops, node)
    if id(node) not in own or rule is None or rule.lowering is not Lowering.MOVE:
        return False
    users = [user for result in node.outputs for user in rewriter.users(result)]
    return any(id(user) not in own or _moves_into_body(rewriter, user, own) for user in users)


def _gemm(rewriter: Rewriter, node: Node) -> Refusal | None:
    weight = ir.producer(node.inputs[1])
    if weight is None or weight.op != "DequantizeLinear":
        return Refusal("it is not quantized")
    user = rewriter.only_user(node.outputs[0])
    if user is None or user.op != "Relu":
        return Refusal("ONNX Runtime does not fuse it with what follows", "" if user is None else user.name)
    _keep_apart(rewriter, node, [user])
    return None


def _keep_apart(rewriter: Rewriter, node: Node, users: list[Node]) -> None:
    """Put a Max that changes no value between a node and some of those that read its result."""
    raw = node.outputs[0]
    lowest = rewriter.constant(f"{raw.name}_lowest", np.full((), np.finfo(np.float32).min, np.float32))
    apart = rewriter.node("Max", [raw, lowest], origin=node)
    apart.outputs[0].dtype, apart.outputs[0].shape = raw.dtype, raw.shape
    rewriter.replace_uses(raw, apart.outputs[0], users)


def _is_quantized(rewriter: Rewriter, node: Node) -> bool:
    """Whether the node runs on integers, although Q and DQ may still stand around it."""
    block = rewriter.state.blocks.get(node.name)
    return block is not None and block.quantized


def _spread(rewriter: Rewriter, node: Node, tensor: Tensor, neighbour: Node) -> Refusal | None:
    channels = _channels(tensor, neighbour)
    if channels < 2:
        return Refusal("there is one channel, or an unknown number", neighbour.name)
    scale = ir.value(node.inputs[1])
    if scale is None or scale.size != 1:
        return Refusal("its scale is made at run time, or there is one per channel", node.name)
    for index in range(1, len(node.inputs)):
        value = ir.array(node.inputs[index]).reshape(())
        rewriter.set_input(node, index, rewriter.constant(node.inputs[index].name, np.full(channels, value)))
    node.attrs["axis"] = 1
    return None


def _is_trapped(rewriter: Rewriter, node: Node, source: Tensor) -> bool:
    if node.op == "MaxPool":
        return not _is_quantized(rewriter, node)
    if node.op not in ("Conv", "ConvTranspose", "Gemm") or node.inputs[0] is not source or node.attrs.get("transA"):
        return False
    weight = ir.value(node.inputs[1])
    if weight is None or weight.dtype != np.float32:
        return False
    user = rewriter.only_user(node.outputs[0])
    while user is not None and user.op in ("Relu", "Clip"):
        user = rewriter.only_user(user.outputs[0])
    return user is not None and user.op == "QuantizeLinear"


def _channels(tensor: Tensor, neighbour: Node) -> int:
    """The size of axis 1 of the tensor, from its shape or the weights of what reads it; 0 if it is unknown."""
    weight = ir.value(neighbour.inputs[1]) if len(neighbour.inputs) > 1 else None
    if weight is None:
        shape = ir.shape(tensor) or ()
        return shape[1] if len(shape) > 1 and isinstance(shape[1], int) else 0
    if neighbour.op == "Gemm":
        return int(weight.shape[1 if neighbour.attrs.get("transB") else 0])
    return int(weight.shape[1] * neighbour.attrs.get("group", 1) if neighbour.op == "Conv" else weight.shape[0])
