"""The work of a model under a placement: which units of which kind, in float, in int8, and in between.

It follows what ONNX Runtime does on x86: float convolutions run on channels in blocks of 16, which other operators
do not read; quantized ones run on channels last.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import onnx

from qcompiler import ir, runtime
from qcompiler.cost import Work
from qcompiler.errors import UserError
from qcompiler.ir import Node, Tensor
from qcompiler.ops import Lowering, OpRule, rule_of
from qcompiler.shapes import infer_shapes
from qcompiler.shift import addend
from qcompiler.state import Block, CompileState, Feeds

Shape = tuple[int, ...]

CHANNEL_BLOCK = 16
CACHED = 500_000
"""Elements of a matrix above which a product with one vector waits for memory."""

PACKED_INPUTS = 4
"""Int8 convolutions take 4 input channels at a time; with other numbers they unroll their input."""

_VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_PER_ELEMENT = frozenset({"Relu", "Sigmoid", "Tanh", "Clip", "LeakyRelu"})


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
        return [self._conversion("quantize", tensor)]

    def dequantize(self, tensor: Tensor) -> list[Work]:
        """From integers to float; nothing where the kernel gives a float result anyway."""
        maker = ir.producer(tensor)
        if (
            maker is not None
            and self.owner.get(maker.name) == maker.name
            and maker.op in self.state.target.float_result
        ):
            return []
        return [self._conversion("dequantize", tensor)]

    def _conversion(self, kind: str, tensor: Tensor) -> Work:
        shape = self.shapes[tensor.name]
        is_map = len(shape) == 4 and math.prod(shape[2:]) > 1
        positions = math.prod(shape[2:]) if is_map else 0
        return Work(f"{kind}.{'map' if is_map else 'flat'}", reads=math.prod(shape), positions=positions)

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
            yield self._product("float", node)
        elif node.op == "Add" and self._joins_conv(node):
            yield self._elements("float.Add.fused", node)
        else:
            yield self._elements(f"float.{_kind(node)}", node)
        yield from self._reorders(node)

    def _joins_conv(self, node: Node) -> bool:
        """Whether the Add happens inside a convolution that makes one of its inputs."""
        if not self._blocked[id(node)]:
            return False
        makers = [ir.producer(t) for t in node.inputs if len(t.outputs) == 1]
        return any(m is not None and m.op == "Conv" for m in makers)

    def _reorders(self, node: Node) -> Iterator[Work]:
        """Conversions between the layouts of float tensors."""
        mine = self._blocked[id(node)]
        for tensor in node.inputs:
            maker = ir.producer(tensor)
            if maker is None or len(self.shapes.get(tensor.name, ())) != 4:
                continue
            if self._blocked[id(maker)] != mine and not (mine and self.shapes[tensor.name][1] < CHANNEL_BLOCK):
                yield Work("float.reorder", reads=math.prod(self.shapes[tensor.name]))

    def _is_blocked(self, node: Node) -> bool:
        """Whether the float operator makes a tensor whose channels lie in blocks."""
        output = self.shapes.get(node.outputs[0].name, ())
        if len(output) != 4:
            return False
        if node.op == "Conv":
            outs, depth = self.shapes[node.inputs[1].name][:2]
            group = int(node.attrs.get("group", 1))
            if group == 1 or (depth == 1 and outs == group):
                return True
            return depth % CHANNEL_BLOCK == 0 and (outs // group) % CHANNEL_BLOCK == 0
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
            return [self._product("int8", root)]
        if rule is not None and rule.lowering is Lowering.TABLE:
            if len(block.nodes) == 1 and f"com.microsoft.QLinear{root.op}" in self.state.target.kernels:
                return [self._elements(f"int8.{root.op}", root)]
            functions = [self._elements(f"float.{_kind(self.nodes[n])}", self.nodes[n]) for n in block.nodes]
            return [self._elements("int8.table", root), *functions]
        if len(block.nodes) == 1 and addend(root) is not None:
            return [Work("int8.view")]
        return [self._elements(f"int8.{_kind(root)}", root)]

    def _elements(self, kind: str, node: Node) -> Work:
        if kind.endswith(".view"):
            return Work(kind)
        reads = sum(
            math.prod(self.shapes[t.name]) for t in node.inputs if t.name in self.shapes and not ir.is_constant(t)
        )
        writes = sum(math.prod(self.shapes[t.name]) for t in node.outputs if t.name in self.shapes)
        taps = math.prod(node.attrs.get("kernel_shape", (0,)))
        return Work(kind, macs=float(taps * writes), reads=float(reads), writes=float(writes))

    def _product(self, prefix: str, node: Node) -> Work:
        output = self.shapes[node.outputs[0].name]
        if node.op in ("Gemm", "MatMul"):
            return self._matrix_product(prefix, node, output)
        weight = self.shapes[node.inputs[1].name]
        taps, group = math.prod(weight[2:]), int(node.attrs.get("group", 1))
        positions = math.prod(output[2:]) * output[0]
        source = math.prod(self.shapes[node.inputs[0].name][2:]) * output[0]
        if node.op == "ConvTranspose":
            macs = source * math.prod(weight)
            return Work(f"{prefix}.ConvTranspose", macs=float(macs), reads=0.0, writes=float(math.prod(output)))
        outs, ins = weight[0], weight[1] * group
        work = Work(f"{prefix}.{_conv_kind(prefix, outs, weight[1], group, taps)}")
        padded = _ceil(outs, CHANNEL_BLOCK)
        if work.kind.endswith("depthwise"):
            return replace(
                work,
                macs=positions * padded * taps,
                reads=source * padded,
                writes=positions * padded,
                weights=taps * padded,
                positions=positions * taps,
            )
        depth = ins if ins < CHANNEL_BLOCK or prefix == "int8" else _ceil(ins, CHANNEL_BLOCK)
        depth = _ceil(depth, PACKED_INPUTS) if prefix == "int8" else depth
        if group > 1:
            padded, depth = outs, ins
        unrolls = prefix == "int8" and "unaligned" in work.kind
        return replace(
            work,
            nodes=float(group) if work.kind.endswith("grouped") else 1.0,
            macs=positions * padded * depth * taps // group,
            reads=source * depth,
            writes=positions * padded,
            columns=positions * depth * taps if unrolls else 0.0,
            weights=padded * depth * taps // group,
            positions=positions * taps,
        )

    def _matrix_product(self, prefix: str, node: Node, output: Shape) -> Work:
        left, right = self.shapes[node.inputs[0].name], self.shapes[node.inputs[1].name]
        is_vector = len(right) == 1  # then the result lacks the axis of the columns
        depth, columns = left[-1], 1 if is_vector else output[-1]
        rows = math.prod(output if is_vector else output[:-1])
        if not ir.is_constant(node.inputs[1]):
            kind, weights = "MatMul.activations", 0
        else:
            weights = math.prod(right)
            kind = "gemm" if rows > 1 else "gemv" if weights < CACHED else "gemv.large"
        return Work(
            f"{prefix}.{kind}",
            macs=float(rows * depth * columns),
            reads=float(rows * depth + (0 if weights else math.prod(right))),
            writes=float(rows * columns),
            weights=float(weights),
        )


def _ceil(number: int, step: int) -> int:
    return -(-number // step) * step


def _conv_kind(prefix: str, outs: int, depth: int, group: int, taps: int) -> str:
    if group > 1 and depth == 1 and outs == group:
        return "depthwise" if prefix == "float" or outs % CHANNEL_BLOCK == 0 else "unaligned.depthwise"
    if group > 1:
        blocked = depth % CHANNEL_BLOCK == 0 and (outs // group) % CHANNEL_BLOCK == 0
        return "spatial" if prefix == "float" and blocked else "grouped"
    if prefix == "float":
        return "stem" if depth < CHANNEL_BLOCK else "pointwise" if taps == 1 else "spatial"
    if depth % PACKED_INPUTS or outs % PACKED_INPUTS or outs < CHANNEL_BLOCK:
        return "unaligned.pointwise" if taps == 1 else "unaligned.spatial"
    return "pointwise" if taps == 1 else "spatial"


def _kind(node: Node) -> str:
    if node.op in _VIEWS:
        return "view"
    shapes = [t.shape for t in node.inputs]
    if node.op == "Mul" and len(shapes) == 2 and shapes[0] != shapes[1]:
        return "Mul.broadcast"
    return node.op


def concrete_shapes(state: CompileState) -> dict[str, Shape] | None:
    """The shapes of all tensors, dynamic axes as in the first calibration sample; sequences and optionals have none.

    None if some stay unknown, or if the model does not run: calibration says why.
    """
    tensors = [t for t in ir.tensors(state.graph) if not isinstance(t.dtype, onnx.TypeProto)]
    shapes = {t.name: shape for t in tensors if (shape := ir.static_shape(t)) is not None}
    unknown = [t for t in tensors if t.name not in shapes]
    if unknown:
        sample = None if state.calibration is None else next(iter(state.calibration), None)
        found = None if sample is None else _inferred(state, unknown, sample) or _shapes_in(state, unknown, sample)
        if found is None:
            return None
        shapes |= found
    return shapes


def _inferred(state: CompileState, tensors: list[Tensor], sample: Feeds) -> dict[str, Shape] | None:
    """What follows from the shapes of the sample without running the model; None if that is not all."""
    graph = state.graph.copy()
    for tensor in graph.inputs:
        tensor.shape = list(sample[tensor.name].shape)
    infer_shapes(graph)
    known = {t.name: ir.static_shape(t) for t in ir.tensors(graph)}
    found = {t.name: shape for t in tensors if (shape := known.get(t.name)) is not None}
    return found if len(found) == len(tensors) else None


def _shapes_in(state: CompileState, tensors: list[Tensor], sample: Feeds) -> dict[str, Shape] | None:
    model = ir.submodel(state.graph.inputs, tensors, state.graph.opset)
    _reduce_to_shapes(model)
    try:
        session = runtime.session(model, optimize=False, low_memory=True, consume=True)
        found = runtime.run(session, {t.name: sample[t.name] for t in state.graph.inputs})
    except (UserError, RuntimeError):
        return None
    return {t.name: tuple(int(d) for d in dims) for t, dims in zip(tensors, found, strict=True)}


def _reduce_to_shapes(model: onnx.ModelProto) -> None:
    """Replace the outputs by their shapes, so that no activation outlives its last reader."""
    names = [f"qcompiler.shape.{i}" for i in range(len(model.graph.output))]
    given = zip(model.graph.output, names, strict=True)
    model.graph.node.extend(onnx.helper.make_node("Shape", [value.name], [name]) for value, name in given)
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in names)
