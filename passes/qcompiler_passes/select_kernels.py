"""select-kernels: instruction selection, from integer arithmetic to the fused kernels of the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx

from qcompiler import functions, ir
from qcompiler.ir import Node, Tensor
from qcompiler.quant import QuantParams
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler.state import CompileState, Phase


@dataclass(frozen=True)
class SelectKernels:
    """Replace each Requantize, accumulator DequantizeLinear and Table, with what feeds it, by the kernel that computes the
    same integers: ConvInteger + bias + Requantize is QLinearConv, and so on. The scales come from the params table; they
    reproduce the integer multipliers exactly. What the target has no kernel for keeps its integer form.
    """

    name: ClassVar[str] = "select-kernels"
    requires: ClassVar[Phase] = Phase.INTEGER
    establishes: ClassVar[Phase | None] = Phase.KERNELS

    def run(self, state: CompileState) -> int:
        """Return the number of kernels selected."""
        selector = _Selector(Rewriter(state))
        for node in reversed(list(state.graph.nodes)):
            if selector.rewriter.exhausted or not node.outputs:
                continue
            select = _selection(node)
            refusal = Refusal("") if select is None else select(selector, node)
            if refusal is None:
                selector.rewriter.count += 1
            elif select is not None:
                selector.rewriter.refusals[node.name] = refusal
        return selector.rewriter.finish()


def _selection(node: Node) -> Callable[[_Selector, Node], Refusal | None] | None:
    if node.domain == functions.DOMAIN:
        return {"Requantize": _Selector.requantize, "Table": _Selector.table}.get(node.op)
    if node.op == "Concat" and not node.domain:
        return _Selector.concat
    if node.op == "DequantizeLinear" and node.inputs[0].dtype == np.int32:
        return _Selector.float_result
    return None


class _Selector:
    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.kernels = rewriter.state.target.kernels

    def params(self, tensor: Tensor) -> QuantParams:
        return self.rewriter.state.params[tensor.name]

    def scales(self, tensor: Tensor) -> list[Tensor]:
        """Initializers with the scale and the zero point of an integer tensor."""
        params = self.params(tensor)
        zero = np.full(params.scale.shape, params.zero_point, params.spec.dtype)
        return [
            self.rewriter.constant(f"{tensor.name}_scale", params.scale),
            self.rewriter.constant(f"{tensor.name}_zero_point", zero),
        ]

    def operand(self, tensor: Tensor) -> list[Tensor]:
        """An integer tensor with its scale and zero point, as most kernels take it."""
        return [tensor, *self.scales(tensor)]

    def emit(
        self, key: str, inputs: Sequence[Tensor], final: Node, done: Sequence[Node], **attrs: Any
    ) -> Refusal | None:
        """Put the kernel in the place of the nodes `done`, the last of which is `final`."""
        if key not in self.kernels:
            return Refusal(f"{self.rewriter.state.target.name} has no {key}", final.name)
        domain, _, op = key.rpartition(".")
        made = self.rewriter.node(op, inputs, origin=list(done), hint=final.name, domain=domain, **attrs)
        self.rewriter.take_output(made, final.outputs[0])
        for node in done:
            self.rewriter.remove(node)
        return None

    def requantize(self, node: Node) -> Refusal | None:
        core, bias, done = _accumulation(node)
        if core is None:
            return Refusal("nothing known makes its accumulator", node.name)
        y = self.scales(node.outputs[0])
        chain = [*done, node]
        if core.op == "ConvInteger":
            inputs = [*self.operand(core.inputs[0]), *self.operand(core.inputs[1]), *y, *_flat(self.rewriter, bias)]
            return self.emit("QLinearConv", inputs, node, chain, **core.attrs)
        if core.op == "MatMulInteger":
            operands = [*self.operand(core.inputs[0]), *self.operand(core.inputs[1])]
            if bias is None:
                return self.emit("QLinearMatMul", [*operands, *y], node, chain)
            return self.emit("com.microsoft.QGemm", [*operands, *_flat(self.rewriter, bias), *y], node, chain)
        if core.op == "ReduceSum":
            source = _rescaled(core.inputs[0])
            inputs = [*self.operand(source.inputs[0]), *y]
            return self.emit("com.microsoft.QLinearGlobalAveragePool", inputs, node, [*chain, source], channels_last=0)
        terms = [_rescaled(t) for t in core.inputs]
        inputs = [x for term in terms for x in self.operand(term.inputs[0])]
        return self.emit(f"com.microsoft.QLinear{core.op}", [*inputs, *y], node, [*chain, *_distinct(terms)])

    def float_result(self, node: Node) -> Refusal | None:
        core, bias, done = _accumulation(node)
        if core is None or core.op != "MatMulInteger":
            return Refusal("only products of matrices have kernels with a float result", node.name)
        (a, a_scale, a_zero), (b, b_scale, b_zero) = self.operand(core.inputs[0]), self.operand(core.inputs[1])
        if bias is not None:
            inputs = [a, a_scale, a_zero, b, b_scale, b_zero, *_flat(self.rewriter, bias)]
            return self.emit("com.microsoft.QGemm", inputs, node, [*done, node])
        inputs = [a, b, a_scale, b_scale, a_zero, b_zero]
        return self.emit("com.microsoft.MatMulIntegerToFloat", inputs, node, [*done, node])

    def table(self, node: Node) -> Refusal | None:
        """A look-up kernel where the target has one for this function, else the float operator between DQ and Q."""
        readers = self.rewriter.users(node.outputs[0])
        if any(n.op == "Concat" for n in readers) and self._only_rescales(node):
            return Refusal("the Concat behind it takes other scales", node.name)
        chain = self._float_chain(node)
        functional = chain[1:-1]
        if len(functional) == 1:
            key = f"com.microsoft.QLinear{functional[0].op}"
            if key in self.kernels and not functional[0].domain:
                inputs = [*self.operand(node.inputs[0]), *self.scales(node.outputs[0])]
                return self.emit(key, inputs, node, [node], **functional[0].attrs)
        if not self.kernels:
            return Refusal("the target is integer-only", node.name)
        self._inline(node, chain)
        return None

    def _float_chain(self, node: Node) -> list[Node]:
        model = onnx.ModelProto.FromString(self.rewriter.state.tables[node.name])
        return list(ir.from_proto(model).nodes)

    def _inline(self, node: Node, chain: Sequence[Node]) -> None:
        """Put the float nodes that filled a table in its place."""
        tensors: dict[str, Tensor] = {chain[0].inputs[0].name: node.inputs[0]}
        for step in chain:
            inputs = []
            for tensor in step.inputs:
                array = ir.value(tensor)
                if tensor.name not in tensors:
                    tensors[tensor.name] = tensor if array is None else self.rewriter.constant(tensor.name, array)
                inputs.append(tensors[tensor.name])
            made = self.rewriter.node(
                step.op, inputs, origin=node, hint=step.name, domain=step.domain or "", **step.attrs
            )
            result = tensors[step.outputs[0].name] = made.outputs[0]
            result.dtype, result.shape = step.outputs[0].dtype, node.outputs[0].shape
        self.rewriter.take_output(made, node.outputs[0])
        self.rewriter.remove(node)

    def concat(self, node: Node) -> Refusal | None:
        """Concat of tables that only change scales becomes QLinearConcat, which holds such tables itself."""
        makers = [ir.producer(t) for t in node.inputs]
        tables = [m if m is not None and self._only_rescales(m) else None for m in makers]
        if not any(tables):
            return Refusal("its inputs have one scale", node.name)
        inputs = self.scales(node.outputs[0])
        for tensor, table in zip(node.inputs, tables, strict=True):
            inputs += self.operand(tensor if table is None else table.inputs[0])
        done = [*_distinct([t for t in tables if t is not None]), node]
        return self.emit("com.microsoft.QLinearConcat", inputs, node, done, **node.attrs)

    def _only_rescales(self, node: Node) -> bool:
        is_table = node.op == "Table" and node.domain == functions.DOMAIN
        return is_table and len(self._float_chain(node)) == 2 and len(self.rewriter.users(node.outputs[0])) == 1


def _accumulation(node: Node) -> tuple[Node | None, Tensor | None, list[Node]]:
    """What makes the accumulator that `node` reads: the integer operator, its bias, and the nodes between."""
    core = ir.producer(node.inputs[0])
    if core is None:
        return None, None, []
    if core.op == "Add" and ir.is_constant(core.inputs[1]):
        inner = ir.producer(core.inputs[0])
        return inner, core.inputs[1], [core] if inner is None else [inner, core]
    known = core.op in ("ConvInteger", "MatMulInteger", "ReduceSum", "Add", "Mul")
    return (core, None, [core]) if known else (None, None, [])


def _rescaled(tensor: Tensor) -> Node:
    maker = ir.producer(tensor)
    assert maker is not None and maker.op == "Rescale"
    return maker


def _flat(rewriter: Rewriter, bias: Tensor | None) -> list[Tensor]:
    array = None if bias is None else ir.value(bias)
    return [] if array is None or bias is None else [rewriter.constant(bias.name, array.reshape(-1))]


def _distinct(nodes: Sequence[Node]) -> list[Node]:
    return list({id(n): n for n in nodes}.values())
