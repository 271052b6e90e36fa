"""insert-qdq: write the chosen params into the graph as QuantizeLinear and DequantizeLinear at block boundaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from qcompiler import ir, quant
from qcompiler.errors import UserError
from qcompiler.ir import Node, Tensor
from qcompiler.ops import Lowering, OpRule, quantized_rule
from qcompiler.quant import QuantParams, QuantSpec
from qcompiler.rewrite import Rewriter
from qcompiler.shift import activation, is_shift
from qcompiler.state import Block, CompileState, Phase
from qcompiler_passes.fold_functions import count_in_steps, round_slopes
from qcompiler_passes.integer_nodes import dequantized, quantizer
from qcompiler_passes.write_layers import write_layers

BIAS = QuantSpec("int32", -(2**31), 2**31 - 1, symmetric=True)


@dataclass(frozen=True)
class InsertQdq:
    """Put one Q and one DQ on every tensor between blocks, DQ on int8 weights and int32 biases.

    An activation function that saturation already performs is removed; where the integer range is wider than its bounds, it
    becomes a block of its own behind the Q, because ONNX Runtime fuses a Conv only with a Q directly behind it.

    An Add that only moves the zero point (see align-scales) becomes an Identity of the integers, which ONNX Runtime removes.

    On targets that have them, LayerNormalization, Softmax, attention x V and sums with Power-of-Two Factors become functions on
    integers here already: they differ from the float operators by more than rounding.
    """

    name: ClassVar[str] = "insert-qdq"
    requires: ClassVar[Phase] = Phase.CALIBRATED
    establishes: ClassVar[Phase | None] = Phase.QDQ

    def run(self, state: CompileState) -> int:
        """Return the number of tensors that were quantized."""
        if state.phase >= Phase.QDQ:
            return 0
        if state.rewrite_limit is not None:
            _leave_float(state, state.rewrite_limit)
        inserter = _Inserter(state)
        for node in list(state.graph.nodes):
            block = state.blocks.get(node.name)
            if block is not None and block.quantized:
                inserter.block(node, block)
        inserter.boundaries()
        count_in_steps(inserter.rewriter)
        write_layers(inserter.rewriter)
        inserter.shift()
        return inserter.rewriter.finish() or inserter.count


def _leave_float(state: CompileState, limit: int) -> None:
    """Forget the params of all activations but the first `limit`, and the blocks that need one of them."""
    measured = [t.name for t in ir.tensors(state.graph) if t.name in state.params and not ir.is_constant(t)]
    for name in measured[limit:]:
        del state.params[name]
    nodes = {n.name: n for n in state.graph.nodes}
    while _leave_blocks(state, nodes) or _leave_codes(state):
        pass


def _leave_blocks(state: CompileState, nodes: Mapping[str, Node]) -> bool:
    """Leave the blocks in float that read something without params; return whether there were any."""
    found = []
    for name, block in state.blocks.items():
        root = nodes[block.root]
        if block.quantized:
            reads = [root.inputs[i].name for i in quantized_rule(state.ops, root).activations(root)]
            if any(read not in state.params for read in reads):
                found.append(name)
    for name in found:
        state.blocks[name] = replace(state.blocks[name], quantized=False)
    return bool(found)


def _leave_codes(state: CompileState) -> bool:
    """Forget the params of codes of attention that a float operator makes or reads; return whether there were any."""
    codes = [t for t in ir.tensors(state.graph) if t.name in state.params and state.params[t.name].spec.log2]
    integer = {name for name, block in state.blocks.items() if block.quantized}
    found = [t.name for t in codes if not integer.issuperset(n.name for n in (*t.inputs, *t.outputs))]
    for name in found:
        del state.params[name]
    return bool(found)


class _Inserter:
    def __init__(self, state: CompileState) -> None:
        self.state = state
        self.rewriter = Rewriter(state)
        self.nodes = {n.name: n for n in state.graph.nodes}
        self.made_by_block: set[str] = set()
        self.unclipped: set[str] = set()
        self.shifts: list[Node] = []
        self.count = 0

    def block(self, root: Node, block: Block) -> None:
        """Quantize the constants of a block and settle its activation."""
        if is_shift(self.state, root):
            self.shifts.append(root)
            self._activation(root, block)
            self.made_by_block.update(block.outputs)
            return
        rule = quantized_rule(self.state.ops, root)
        for index in rule.activations(root):
            array, params = ir.value(root.inputs[index]), self.state.params.get(root.inputs[index].name)
            if array is not None and params is not None:
                self._constant(root, index, array, params)
        if rule.lowering is Lowering.MAC:
            self._weights(root, rule)
        if rule.lowering is Lowering.SLOPE:
            round_slopes(self.rewriter, root, *(self.state.params[t.name] for t in (root.inputs[0], root.outputs[0])))
        if rule.lowering is not Lowering.TABLE:
            self._activation(root, block)
        self.made_by_block.update(block.outputs)

    def _constant(self, node: Node, index: int, array: quant.Array, params: QuantParams) -> None:
        hint = node.inputs[index].name
        rounded = self.state.integers.get(hint)
        integers = self.rewriter.constant(f"{hint}_q", quant.quantize(array, params) if rounded is None else rounded)
        self.state.params[integers.name] = params
        self.rewriter.set_input(node, index, self._dequantize(integers, params, node))
        self.count += 1

    def _weights(self, node: Node, rule: OpRule) -> None:
        weight, params = ir.array(node.inputs[1]), self.state.params.get(node.inputs[1].name)
        if params is None:
            raise UserError("weights have no scales yet: run scale-weights before", "pipeline")
        self._constant(node, 1, weight, params)
        bias = ir.optional_input(node, 2)
        if bias is not None:
            values = np.asarray(ir.array(bias), np.float32).reshape(-1)
            channels = weight.shape[rule.weight_axis or 0]
            scale = np.asarray(self.state.params[node.inputs[0].name].scale * params.scale, np.float32)
            axis = 0 if scale.ndim else None
            self._constant(node, 2, np.broadcast_to(values, (channels,)), QuantParams(replace(BIAS, axis=axis), scale))

    def _activation(self, root: Node, block: Block) -> None:
        """Remove the absorbed nodes; the root takes over the block's output, a needed Clip goes behind a Q."""
        if len(block.nodes) == 1:
            return
        followers = [self.nodes[name] for name in block.nodes[1:]]
        output = followers[-1].outputs[0]
        self.rewriter.adopt(root, *followers)
        params = self.state.params.get(output.name)
        if params is not None and _saturates(params, block):
            self.rewriter.take_output(root, output)
            for node in followers:
                self.rewriter.remove(node)
            self.state.blocks[block.root] = replace(block, nodes=(root.name,))
            return
        self._split(root, block, followers, params)

    def _split(self, root: Node, block: Block, followers: list[Node], params: QuantParams | None) -> None:
        inner = root.outputs[0]
        self.unclipped.add(inner.name)
        self.state.blocks[block.root] = replace(block, nodes=(root.name,), outputs=(inner.name,))
        for node in followers:
            quantized = params is not None
            outputs = (node.outputs[0].name,)
            reason = "" if quantized else "the layer before it gives a float result"
            self.state.blocks[node.name] = Block(node.name, (node.name,), outputs, quantized=quantized, reason=reason)
            if params is not None:
                self.state.params.setdefault(node.inputs[0].name, params)
                self.state.params[outputs[0]] = params
        self.made_by_block.update([inner.name, *(n.outputs[0].name for n in followers)])

    def boundaries(self) -> None:
        """Put Q and DQ on every activation that has params."""
        for tensor in list(ir.tensors(self.rewriter.graph)):
            params = self.state.params.get(tensor.name)
            if params is None or ir.is_constant(tensor) or params.spec.dtype == BIAS.dtype:
                continue
            if tensor.name in self.made_by_block:
                self._behind_block(tensor, params)
            else:
                self._behind_float(tensor, params)
            self.count += 1

    def shift(self) -> None:
        """Let the sums that only move the zero point pass the integers on."""
        for node in self.shifts:
            maker, q = dequantized(activation(node)), quantizer(self.rewriter, node.outputs[0])
            assert maker is not None and q is not None
            passed = self.rewriter.node("Identity", [maker.inputs[0]], origin=node, hint=f"{node.name}_shift")
            self.rewriter.take_output(passed, q.outputs[0])
            self.rewriter.remove(q)
            self.rewriter.remove(node)

    def _behind_block(self, tensor: Tensor, params: QuantParams) -> None:
        """maker -> raw -> Q -> DQ -> tensor: every reader, float ones and graph outputs too, gets the dequantized value."""
        maker = ir.producer(tensor)
        assert maker is not None
        raw = self.rewriter.cut(tensor)
        integers = self._quantize(raw, params, maker)
        if tensor.name not in self.unclipped:  # integers that saturate early do not stand for the float tensor
            self.state.ties[integers.name] = tensor.name
        self._dequantize(integers, params, maker, tensor)

    def _behind_float(self, tensor: Tensor, params: QuantParams) -> None:
        """tensor -> Q -> DQ for the quantized readers; float readers keep the exact value."""
        readers = [n for n in self.rewriter.users(tensor) if self._reads_quantized(n, tensor)]
        if not readers:
            return
        integers = self._quantize(tensor, params, readers[0])
        self.state.ties[integers.name] = tensor.name
        self.rewriter.replace_uses(tensor, self._dequantize(integers, params, readers[0]), readers)

    def _reads_quantized(self, node: Node, tensor: Tensor) -> bool:
        block = self.state.blocks.get(node.name)
        if block is None or not block.quantized:
            return False
        rule = quantized_rule(self.state.ops, node)
        return any(node.inputs[i] is tensor for i in rule.activations(node))

    def _quantize(self, source: Tensor, params: QuantParams, origin: Node) -> Tensor:
        integers = self.rewriter.variable(f"{source.name}_q", np.dtype(params.spec.dtype), source.shape)
        self.state.params[integers.name] = params
        inputs = [source, *self._scale_inputs(source.name, params)]
        attrs: dict[str, Any] = {} if params.axis is None else {"axis": params.axis}
        self.rewriter.node("QuantizeLinear", inputs, [integers], origin=origin, hint=f"{origin.name}_quantize", **attrs)
        return integers

    def _dequantize(self, integers: Tensor, params: QuantParams, origin: Node, into: Tensor | None = None) -> Tensor:
        attrs: dict[str, Any] = {} if params.axis is None else {"axis": params.axis}
        inputs = [integers, *self._scale_inputs(integers.name, params)]
        if into is None:
            into = self.rewriter.variable(f"{integers.name}_dq", np.dtype(np.float32), integers.shape)
        self.rewriter.node("DequantizeLinear", inputs, [into], origin=origin, hint=f"{origin.name}_dequantize", **attrs)
        return into

    def _scale_inputs(self, hint: str, params: QuantParams) -> list[Tensor]:
        zero = np.full(params.scales.shape, params.zero_point, params.spec.dtype)
        return [
            self.rewriter.constant(f"{hint}_scale", params.scales),
            self.rewriter.constant(f"{hint}_zero_point", zero),
        ]


def _saturates(params: QuantParams, block: Block) -> bool:
    """Whether clamping to the integer range also clamps to the bounds of the activation."""
    return integer_bounds(params, block.low, block.high) == (params.spec.qmin, params.spec.qmax)


def integer_bounds(params: QuantParams, low: float, high: float) -> tuple[int, int]:
    """The integers that real bounds become: rounded as QuantizeLinear rounds, within the spec's range."""
    reach = params.range[0] - float(params.scale), params.range[1] + float(params.scale)
    qmin, qmax = quant.quantize(np.clip([low, high], *reach), params)
    return int(qmin), int(qmax)
