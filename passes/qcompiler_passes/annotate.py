"""annotate: choose which blocks are quantized, and what each of their tensors is quantized to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np

from qcompiler import ir
from qcompiler.errors import UserError
from qcompiler.integer_layers import LARGEST_CODE
from qcompiler.ir import Node, Tensor
from qcompiler.ops import Lowering, OpRule, Result, Role, quantized_rule, rule_of
from qcompiler.quant import QuantSpec
from qcompiler.rewrite import Rewriter
from qcompiler.state import Block, CompileState, Phase
from qcompiler_passes.match import is_aside


@dataclass(frozen=True)
class Annotate:
    """Decide per block: integer, or float with a reason.

    Anchors (Conv, Gemm, MatMul) are quantized wherever the target can. Other operators follow if all that they read is
    quantized and something quantized reads them, so that they save conversions instead of adding some. Tensors that an
    operator passes on unchanged share their params.

    `attention`: how targets that run Softmax in integers quantize what only MatMul reads of it: `log2`, as powers of two, so that
    attention x V is a shift (FQ-ViT, Lin et al. 2022, arXiv 2111.13824), or `linear`. `attention_bits`: 2 to 8.
    """

    attention: str = "log2"
    attention_bits: int = 8

    name: ClassVar[str] = "annotate"
    requires: ClassVar[Phase] = Phase.FUSED
    establishes: ClassVar[Phase | None] = Phase.ANNOTATED

    def run(self, state: CompileState) -> int:
        """Return the number of tensors that got a spec. Raises UserError for an option that is none."""
        if self.attention not in ("log2", "linear"):
            raise UserError(f"attention is log2 or linear, not {self.attention!r}", self.name)
        if not 2 <= self.attention_bits <= 8:
            raise UserError(f"attention_bits is 2 to 8, not {self.attention_bits}", self.name)
        if state.phase >= Phase.ANNOTATED:
            return 0
        state.attention = QuantSpec("uint8", 0, 2**self.attention_bits - 1, log2=self.attention == "log2")
        annotate(state, {})
        return len(state.specs)


def annotate(state: CompileState, reasons: Mapping[str, str]) -> None:
    """Decide about all blocks, whatever was decided before; those with a reason stay float, and what depends on them."""
    choice = _Choice(state, reasons)
    choice.settle()
    state.specs.clear()
    state.ties.clear()
    for root, block in state.blocks.items():
        reason = choice.reasons.get(root, "")
        state.blocks[root] = replace(block, quantized=not reason, reason=reason)
    _own_constants(state, choice)
    for block in list(state.blocks.values()):
        if block.quantized:
            _specify(state, choice, block)
    for block in list(state.blocks.values()):
        if len(block.nodes) == 1:
            open_block = replace(block, low=-math.inf, high=math.inf)
            state.blocks[block.root] = _bounded(state, choice, open_block) if block.quantized else open_block


class _Choice:
    """Which blocks stay float, and why; every other block is quantized."""

    def __init__(self, state: CompileState, reasons: Mapping[str, str]) -> None:
        self.state = state
        self.nodes = {n.name: n for n in state.graph.nodes}
        self.rules = {root: rule for root in state.blocks if (rule := rule_of(state.ops, self.nodes[root]))}
        self.block_of = {name: root for root, block in state.blocks.items() for name in block.nodes}
        self.reasons: dict[str, str] = {}
        self.joined: dict[str, tuple[str, ...]] = {}
        for root, block in state.blocks.items():
            reason = self._kept(block) or self._unfit(self.nodes[root]) or reasons.get(root)
            if reason:
                self.reasons[root] = reason

    def _kept(self, block: Block) -> str | None:
        names = (*block.nodes, *(t.name for name in block.nodes for t in self.nodes[name].outputs))
        for pattern, reason in self.state.keep_float.items():
            if any(fnmatchcase(name, pattern) for name in names):
                return reason
        return None

    def _unfit(self, node: Node) -> str | None:
        reason = self.state.target.why_not(node, self.state.ops)
        if reason or ir.has_subgraph(node):
            return reason or "it holds subgraphs"
        rule = self.rules[node.name]
        tensors = [node.inputs[i] for i in rule.activations(node)]
        weights = [t for i, t in enumerate(node.inputs) if rule.role(i) is Role.WEIGHT]
        for tensor in (*tensors, *weights):
            if ir.type_name(tensor) not in ("?", "float32"):
                return f"it computes in {ir.type_name(tensor)}"
            array = ir.value(tensor)
            if array is not None and not np.all(np.isfinite(array)):
                return f"constant {tensor.name!r} is not finite"
        placed = rule.lowering is Lowering.MOVE and any(not (ir.is_constant(t) or t.is_empty()) for t in node.inputs)
        varies = placed or any(not ir.is_constant(t) for t in tensors)
        return None if varies else "none of its inputs is an activation"

    def settle(self) -> None:
        """Take non-anchors out until each that is left has quantized neighbours on both sides."""
        pending = [r for r in self.state.blocks if r not in self.reasons and not self.rules[r].anchor]
        changed = True
        while changed:
            changed = False
            for root in pending:
                if root not in self.reasons and (reason := self._isolated(root)):
                    self.reasons[root] = reason
                    changed = True

    def _isolated(self, root: str) -> str | None:
        node, rule = self.nodes[root], self.rules[root]
        missing = [t for i in rule.activations(node) if not self._available(t := node.inputs[i], rule)]
        if missing and not (len(missing) == 1 and self._may_join(node, rule, missing[0])):
            return f"its input {missing[0].name!r} is a float tensor"
        if not any(self.quantized_readers(name) for name in self.state.blocks[root].outputs):
            return "nothing quantized reads its result"
        return None

    def _available(self, tensor: Tensor, rule: OpRule) -> bool:
        maker = ir.producer(tensor)
        if ir.is_constant(tensor):
            return True
        if maker is None or maker.op == "DequantizeLinear":  # of integers that the model is fed
            return rule.lowering is Lowering.MOVE
        root = self.block_of.get(maker.name)
        if root is None or root in self.reasons:
            return False
        return not (rule.lowering is Lowering.TABLE and self._gives_float(root))

    def _may_join(self, node: Node, rule: OpRule, tensor: Tensor) -> bool:
        """Whether a float tensor is quantized for the sake of what it is added to or multiplied with, as rotary positions are.

        Targets without kernels of their own have no better way, and what depends on no layer is no float layer between others.
        """
        joins = rule.lowering in (Lowering.ADD, Lowering.MUL) and not self.state.target.kernels
        others = [t for t in node.inputs if t is not tensor]
        if not joins or not is_aside(tensor) or all(ir.is_constant(t) or is_aside(t) for t in others):
            return False
        self.joined[node.name] = (tensor.name,)
        return True

    def _gives_float(self, root: str) -> bool:
        """Whether a kernel with a float result makes what this block passes on, so that a float function costs no Q and DQ."""
        while self.rules[root].lowering is Lowering.MOVE:
            maker = ir.producer(self.nodes[root].inputs[0])
            if maker is None or maker.name not in self.block_of:
                return False
            root = self.block_of[maker.name]
            if root not in self.rules:
                return False
        return self.nodes[root].op in self.state.target.float_result

    def quantized_readers(self, tensor_name: str) -> list[Node]:
        """The quantized block roots that read the tensor as an activation."""
        tensor = self.tensor(tensor_name)
        readers = []
        for node in [] if tensor is None else tensor.outputs:
            root = self.block_of.get(node.name)
            if root == node.name and root not in self.reasons:
                rule = self.rules[root]
                if any(node.inputs[i] is tensor for i in rule.activations(node)):
                    readers.append(node)
        return readers

    def tensor(self, name: str) -> Tensor | None:
        if not hasattr(self, "_by_name"):
            self._by_name = {t.name: t for t in ir.tensors(self.state.graph)}
        return self._by_name.get(name)


def _bounded(state: CompileState, choice: _Choice, block: Block) -> Block:
    """The block with the bounds beyond which all that read its output saturate: no steps are spent on values outside."""
    name = block.outputs[0]
    alone = name not in state.ties and name not in state.ties.values() and len(block.outputs) == 1
    tensor = choice.tensor(name)
    if not alone or tensor is None or ir.is_output(state.graph, tensor):
        return block
    readers = choice.quantized_readers(name)
    if not readers or len(readers) != len({id(n) for n in tensor.outputs}):
        return block
    lows, highs = zip(*(choice.rules[n.name].saturates(n) for n in readers), strict=True)
    return replace(block, low=min(lows), high=max(highs))


def _attention(state: CompileState, choice: _Choice, name: str) -> QuantSpec:
    """What Softmax gives: codes if only products read them, else uniform steps."""
    wanted = state.attention
    if wanted.log2 and _is_attention(state, choice, name):
        return replace(wanted, qmax=min(wanted.qmax, LARGEST_CODE))
    return replace(wanted, log2=False)


_RESHAPING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")


def _is_attention(state: CompileState, choice: _Choice, name: str) -> bool:
    """Whether products of activations alone read a tensor, on the left, at most in another shape."""
    tensor = choice.tensor(name)
    readers = choice.quantized_readers(name)
    if tensor is None or ir.is_output(state.graph, tensor) or len(readers) != len({id(n) for n in tensor.outputs}):
        return False
    for node in readers:
        is_product = choice.rules[node.name].lowering is Lowering.PRODUCT and node.inputs[1] is not tensor
        if not is_product and not (node.op in _RESHAPING and _is_attention(state, choice, node.outputs[0].name)):
            return False
    return bool(readers)


def _own_constants(state: CompileState, choice: _Choice) -> None:
    """Give every quantized block its own copy of the constants that it shares, and of tensors that it joins: their scales will
    differ.
    """
    rewriter = Rewriter(state)
    for node in list(state.graph.nodes):
        block = state.blocks.get(node.name)
        if block is None or not block.quantized:
            continue
        rule = quantized_rule(state.ops, node)
        for index, tensor in enumerate(node.inputs):
            array = ir.value(tensor)
            if array is not None and rule.role(index) is not Role.OTHER and len(tensor.outputs) > 1:
                rewriter.set_input(node, index, rewriter.constant(tensor.name, array))
            elif tensor.name in choice.joined.get(node.name, ()) and len(rewriter.users(tensor)) > 1:
                _own_copy(rewriter, node, index)
    ir.toposort(state.graph)


def _own_copy(rewriter: Rewriter, node: Node, index: int) -> None:
    """Let a node read a copy of an input, in a float block of its own."""
    tensor = node.inputs[index]
    copy = rewriter.variable(f"{tensor.name}_copy", tensor.dtype, tensor.shape)
    made = rewriter.node("Identity", [tensor], [copy], origin=node, hint=copy.name)
    rewriter.set_input(node, index, copy)
    rewriter.state.blocks[made.name] = Block(made.name, (made.name,), (copy.name,), reason="it copies a float tensor")


def _specify(state: CompileState, choice: _Choice, block: Block) -> None:
    node, rule = choice.nodes[block.root], choice.rules[block.root]
    activation = state.target.activation
    inputs = [node.inputs[i].name for i in rule.activations(node)]
    for name in inputs:
        state.specs.setdefault(name, activation)
    for name in block.outputs:
        unread = node.op in state.target.float_result and not choice.quantized_readers(name)
        if unread and name not in state.imported:
            continue
        state.specs[name] = activation
        if rule.lowering is Lowering.SOFTMAX:
            state.specs[name] = _attention(state, choice, name)
        if rule.result is Result.SAME:
            state.specs[name] = state.specs[inputs[0]]
            state.tie(name, inputs[0])
