"""The work of a model under a placement: which units of which kind, in float, in int8, and in between.

It follows what ONNX Runtime does on x86: float convolutions run on channels in blocks of 16, which other operators
do not read; quantized ones run on channels last.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

from qcompiler import ir
from qcompiler.cost import Work, far
from qcompiler.ir import Node, Tensor
from qcompiler.ops import Lowering, OpRule, rule_of
from qcompiler.products import CHANNEL_BLOCK, Shape, product
from qcompiler.shift import addend
from qcompiler.state import Block, CompileState

_VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
_WRITTEN_OUT = frozenset({"HardSigmoid", "HardSwish"})
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_FUSED_WITH_CONV = frozenset({"HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "LeakyRelu"})
_PER_ELEMENT = frozenset({"Relu", "Sigmoid", "Tanh", "Clip", "LeakyRelu"})

LONGEST = 4
"""The most operators that exporters write such a function with: x * Clip(x + 3, 0, 6) / 6."""


class Accountant:
    """Accounts for the work of a graph whose blocks are formed. `shapes`: of all tensors, by name."""

    def __init__(self, state: CompileState, shapes: Mapping[str, Shape]) -> None:
        self.state, self.shapes = state, shapes
        self.nodes = {n.name: n for n in state.graph.nodes}
        self.owner = {name: root for root, block in state.blocks.items() for name in block.nodes}
        self._blocked: dict[int, bool] = {}
        for node in state.graph.nodes:
            self._blocked[id(node)] = self._is_blocked(node)

    def total(self, quantized: Collection[str]) -> list[Work]:
        """All work if the blocks with these roots are quantized."""
        works = [Work("run")]
        for root, block in self.state.blocks.items():
            works += self.integer(block) if root in quantized else self.floating(block)
        for tensor in ir.tensors(self.state.graph):
            if ir.is_constant(tensor):
                continue
            maker = ir.producer(tensor)
            made = maker is not None and self.owner.get(maker.name) in quantized
            readers = [self.reads_integers(n, tensor, quantized) for n in tensor.outputs]
            if self.is_inner(tensor):
                continue
            if made:
                if not all(readers) or ir.is_output(self.state.graph, tensor):
                    works += self.dequantize(tensor)
            elif any(readers):
                works += self.quantize(tensor)
        return works

    def written_out(self) -> Iterator[Work]:
        """What functions cost beyond that if the float model has them as arithmetic and ONNX Runtime does not fuse it."""
        for node in self.state.graph.nodes:
            if node.op in _WRITTEN_OUT:
                for _ in self.state.origin.get(node.name, ())[1:LONGEST]:
                    yield self._elements("float.other", node)

    def is_inner(self, tensor: Tensor) -> bool:
        """Whether the tensor lies inside a block."""
        maker = ir.producer(tensor)
        if maker is None:
            return False
        owner = self.owner.get(maker.name)
        return owner is not None and tensor.name not in self.state.blocks[owner].outputs

    def conversions_of(self, block: Block, quantized: Collection[str]) -> list[Work]:
        """The conversions around a quantized block, if those with the roots `quantized` are so as well."""
        root = self.nodes[block.root]
        rule = self.rule(root)
        works: list[Work] = []
        for index in () if rule is None else rule.activations(root):
            maker = ir.producer(root.inputs[index])
            if not ir.is_constant(root.inputs[index]) and (
                maker is None or self.owner.get(maker.name) not in quantized
            ):
                works += self.quantize(root.inputs[index])
        for tensor in (t for t in self.nodes[block.nodes[-1]].outputs if t.name in block.outputs):
            if ir.is_output(self.state.graph, tensor) or not all(
                self.reads_integers(n, tensor, quantized) for n in tensor.outputs
            ):
                works += self.dequantize(tensor)
        return works

    def reads_integers(self, node: Node, tensor: Tensor, quantized: Collection[str]) -> bool:
        """Whether a node reads the quantized tensor; constants and shapes do not count."""
        root = self.owner.get(node.name)
        if root != node.name or root not in quantized:
            return False
        rule = self.rule(node)
        return rule is not None and any(node.inputs[i] is tensor for i in rule.activations(node))

    def rule(self, node: Node) -> OpRule | None:
        """The node's row."""
        return rule_of(self.state.ops, node)

    def quantize(self, tensor: Tensor) -> list[Work]:
        """From float to integers, once per tensor."""
        maker = ir.producer(tensor)
        conversion = self._conversion("quantize", tensor)
        blocked = maker is not None and self._blocked[id(maker)]
        return [conversion, self._reorder(tensor)] if blocked else [conversion]

    def dequantize(self, tensor: Tensor) -> list[Work]:
        """From integers to float; nothing where the kernel gives a float result anyway."""
        maker = ir.producer(tensor)
        if (
            maker is not None
            and self.owner.get(maker.name) == maker.name
            and maker.op in self.state.target.float_result
        ):
            return []
        works = [self._conversion("dequantize", tensor)]
        works += [self._elements(f"float.{n.op}.alone", n) for n in tensor.outputs if self._is_fused_with(maker, n)]
        for node in tensor.outputs:
            if self._blocked.get(id(node), False) and self.shapes[tensor.name][1] >= CHANNEL_BLOCK:
                return [*works, self._reorder(tensor)]
        return works

    def _is_fused_with(self, maker: Node | None, node: Node) -> bool:
        """Whether the float operator happens inside the convolution `maker`, if that is float too."""
        return maker is not None and (self._ended(node) is maker or self._joined(node) is maker)

    def _reorder(self, tensor: Tensor) -> Work:
        size = math.prod(self.shapes[tensor.name])
        return Work("float.reorder", reads=size, far=far("float", size, size))

    def _conversion(self, kind: str, tensor: Tensor) -> Work:
        shape = self.shapes[tensor.name]
        is_map = len(shape) == 4 and math.prod(shape[2:]) > 1
        size = math.prod(shape)
        if is_map:
            return Work(f"{kind}.map", reads=size, positions=math.prod(shape[2:]), far=far(kind, size))
        nodes = 2.0 if len(shape) == 4 else 1.0  # ONNX Runtime moves the channels of a single position, too
        return Work(f"{kind}.flat", nodes=nodes, reads=size, far=far(kind, size))

    def floating(self, block: Block) -> list[Work]:
        """The work of a block in float."""
        root = self.nodes[block.root]
        works = list(self._float_node(root))
        fused = root.op in ("Conv", "Gemm") or (root.op == "Add" and works[0].kind == "float.Add.fused")
        for name in block.nodes[1:]:
            if not (fused and self.nodes[name].op in ("Relu", "Clip")):
                works += self._float_node(self.nodes[name])
        return works

    def _float_node(self, node: Node) -> Iterator[Work]:
        if node.op in ("Conv", "Gemm", "MatMul", "ConvTranspose"):
            yield product("float", node, self.shapes)
        elif self._joined(node) is not None or self._ended(node) is not None:
            yield self._elements(f"float.{node.op}.fused", node)
        else:
            yield self._elements(f"float.{_kind(node)}", node)
        yield from self._reorders(node)

    def _joined(self, node: Node) -> Node | None:
        """The convolution inside which the Add happens: one that makes one of its inputs, for it alone."""
        if node.op != "Add" or not self._blocked[id(node)]:
            return None
        makers = (ir.producer(t) for t in node.inputs if len(t.outputs) == 1)
        return next((m for m in makers if m is not None and m.op == "Conv"), None)

    def _ended(self, node: Node) -> Node | None:
        """The convolution inside which the function happens: the one that makes its input, for it alone."""
        if node.op not in _FUSED_WITH_CONV:
            return None
        maker = ir.producer(node.inputs[0])
        alone = len(node.inputs[0].outputs) == 1 and not ir.is_output(self.state.graph, node.inputs[0])
        return maker if alone and maker is not None and maker.op == "Conv" else None

    def _reorders(self, node: Node) -> Iterator[Work]:
        """Conversions between the layouts of float tensors."""
        mine = self._blocked[id(node)]
        for tensor in node.inputs:
            maker = ir.producer(tensor)
            if maker is None or len(self.shapes.get(tensor.name, ())) != 4:
                continue
            if self._blocked[id(maker)] != mine and not (mine and self.shapes[tensor.name][1] < CHANNEL_BLOCK):
                yield self._reorder(tensor)

    def _is_blocked(self, node: Node) -> bool:
        """Whether the float operator makes a tensor whose channels lie in blocks."""
        output = self.shapes.get(node.outputs[0].name, ())
        if len(output) != 4:
            return False
        if node.op == "Conv":
            outs, depth = self.shapes[node.inputs[1].name][:2]
            group = int(node.attrs.get("group", 1))
            maker = ir.producer(node.inputs[0])
            if math.prod(output[2:]) == 1 and not (maker is not None and self._blocked.get(id(maker), False)):
                return False
            if group == 1 or (depth == 1 and outs == group):
                return True
            return depth % CHANNEL_BLOCK == 0 and (outs // group) % CHANNEL_BLOCK == 0
        if (maker := self._ended(node)) is not None:
            return self._blocked.get(id(maker), False)
        sources = [ir.producer(t) for t in node.inputs if not t.is_empty() and not ir.is_constant(t)]
        if not sources or not all(s is not None and self._blocked.get(id(s), False) for s in sources):
            return False
        if node.op == "Concat":
            return all(self.shapes[t.name][1] % CHANNEL_BLOCK == 0 for t in node.inputs)
        if node.op in ("Add", "Mul"):
            return len(sources) == 2 and len({self.shapes[t.name] for t in node.inputs}) == 1
        return node.op in _POOLS or node.op in _PER_ELEMENT

    def integer(self, block: Block) -> list[Work]:
        """The work of a quantized block; what it absorbs costs nothing."""
        root = self.nodes[block.root]
        rule = self.rule(root)
        if root.op in ("Conv", "Gemm", "MatMul"):
            return [product("int8", root, self.shapes)]
        if rule is not None and rule.lowering is Lowering.TABLE:
            if len(block.nodes) == 1 and f"com.microsoft.QLinear{root.op}" in self.state.target.kernels:
                return [self._elements(f"int8.{root.op}", root)]
            functions = [self._elements(f"float.{_kind(self.nodes[n])}", self.nodes[n]) for n in block.nodes]
            return [self._elements("int8.table", root), *functions]
        if addend(root) is not None:
            return [Work("int8.view") if len(block.nodes) == 1 else self._elements("int8.Clip", root)]
        return [self._elements(f"int8.{_kind(root)}", root)]

    def _elements(self, kind: str, node: Node) -> Work:
        if kind.endswith(".view"):
            return Work(kind)
        read = [t for t in node.inputs if t.name in self.shapes and not ir.is_constant(t)]
        sizes = [math.prod(self.shapes[t.name]) for t in (*read, *(t for t in node.outputs if t.name in self.shapes))]
        reads, writes = sum(sizes[: len(read)]), sum(sizes[len(read) :])
        taps = math.prod(node.attrs.get("kernel_shape", (0,)))
        macs = float(taps * writes)
        rows = reads / self.shapes[node.outputs[0].name][-1] if kind.endswith(".Softmax") else 0.0
        return Work(kind, macs=macs, reads=float(reads), writes=float(writes), positions=rows, far=far(kind, *sizes))


def _kind(node: Node) -> str:
    if node.op in _VIEWS:
        return "view"
    shapes = [t.shape for t in node.inputs]
    if node.op == "Mul" and len(shapes) == 2 and shapes[0] != shapes[1]:
        return "Mul.broadcast"
    if node.op == "Resize" and (mode := str(node.attrs.get("mode", "nearest"))) != "nearest":
        return f"Resize.{mode}"
    if node.op in ("Softmax", "LogSoftmax") and not _is_last_axis(node):
        return "Softmax.strided"
    return "Softmax" if node.op == "LogSoftmax" else node.op


def _is_last_axis(node: Node) -> bool:
    axis, shape = int(node.attrs.get("axis", -1)), ir.shape(node.outputs[0])
    return axis == -1 or shape is None or axis == len(shape) - 1
