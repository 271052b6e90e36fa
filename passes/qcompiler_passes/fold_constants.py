"""fold-constants: compute at compile time what does not depend on the input data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir, runtime
from qcompiler.ir import Constant, Graph, Node, Tensor
from qcompiler.rewrite import Refusal, Rewriter, Rule, apply_rules
from qcompiler.shapes import infer_shapes, kind
from qcompiler.state import CompileState, Phase
from qcompiler_passes import noops
from qcompiler_passes.normalize import lift_constants
from qcompiler_passes.sizes import Element, Sizes, dims, is_known

RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)

SMALL_BYTES = 1 << 20
MAX_GROWTH = 16
MAX_ROUNDS = 20


@dataclass(frozen=True)
class FoldConstants:
    """Evaluate constant nodes, shape arithmetic and constant Reshapes, then remove the nodes that turn out to do nothing.

    A result may be larger than its inputs only up to `max_bytes` (and 16 times), so that a few bytes of Expand cannot become a
    model of gigabytes. Dequantized weights are folded too, as long as nothing is quantized here. Afterwards
    tensors have the best types and shapes known.
    """

    max_bytes: int = 64 << 20

    name: ClassVar[str] = "fold-constants"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None
    in_bodies: ClassVar[bool] = True

    def run(self, state: CompileState) -> int:
        """Return the number of nodes folded, simplified or removed."""
        total = 0
        for _ in range(MAX_ROUNDS):
            infer_shapes(state.graph)
            count = apply_rules(Rewriter(state), SIMPLIFY)
            count += lift_constants(state) + fold_sizes(state) + fold_values(state, self.max_bytes)
            count += apply_rules(Rewriter(state), noops.PLAIN | noops.FOLDED)
            if not count:
                break
            total += count
        return total


def unflatten(rewriter: Rewriter, node: Node) -> Refusal | None:
    """Flatten, Softmax, Reshape to the former shape: one Softmax, if only one of the flattened axes is longer than 1."""
    flatten, reshape = ir.producer(node.inputs[0]), rewriter.only_user(node.outputs[0])
    if flatten is None or flatten.op != "Flatten" or reshape is None or reshape.op != "Reshape":
        return Refusal("it is not between Flatten and Reshape", node.name)
    source, shape = flatten.inputs[0], ir.producer(reshape.inputs[1])
    if shape is None or shape.op != "Shape" or shape.attrs or shape.inputs[0] is not source:
        return Refusal("the Reshape does not restore the shape before the Flatten", reshape.name)
    known, first = ir.shape(source), flatten.attrs.get("axis", 1)
    if node.attrs.get("axis", -1) not in (-1, 1) or known is None:
        return Refusal("the rank is not known", source.name)
    first += len(known) if first < 0 else 0
    wide = [i for i in range(first, len(known)) if known[i] != 1]
    if len(wide) != 1:
        return Refusal("it normalises over several axes", flatten.name)
    node.attrs["axis"] = wide[0]
    rewriter.set_input(node, 0, source)
    rewriter.take_output(node, reshape.outputs[0])
    rewriter.remove(reshape)
    return None


def inline_if(rewriter: Rewriter, node: Node) -> Refusal | None:
    """An If whose condition is constant is one of its branches."""
    condition = ir.scalar(node.inputs[0])
    if condition is None:
        return Refusal("the condition is not constant", node.inputs[0].name)
    branch = node.attrs["then_branch" if condition else "else_branch"]
    for inner in list(branch.nodes):
        inputs, outputs = list(inner.inputs), list(inner.outputs)
        ir.detach(inner)
        rewriter.node(inner.op, inputs, outputs, origin=inner, domain=inner.domain or "", **inner.attrs)
    for tensor, result in zip(branch.outputs, list(node.outputs), strict=True):
        copy = rewriter.node("Identity", [tensor], origin=node)
        if not result.is_empty():
            rewriter.take_output(copy, result)
    rewriter.remove(node)
    return None


SIMPLIFY: dict[str, Rule] = {"Hardmax": unflatten, "If": inline_if, "LogSoftmax": unflatten, "Softmax": unflatten}


def _replace(rewriter: Rewriter, tensor: Tensor, value: NDArray[Any]) -> None:
    """Let everybody read a constant of the same name; the producer dies by itself."""
    constant = Constant(tensor.name, value)
    tensor.name = rewriter.fresh_tensor_name(tensor.name)
    rewriter.replace_uses(tensor, constant)
    rewriter.count += 1


def fold_sizes(state: CompileState) -> int:
    """Replace what follows from shapes alone, and make Reshape and Resize independent of a dynamic batch where possible."""
    rewriter, sizes = Rewriter(state), Sizes(state.graph)
    for node in state.graph.nodes:
        tensor = node.outputs[0]
        if node.op == "Reshape" and not node.domain and not ir.is_constant(node.inputs[1]):
            _fold_reshape(rewriter, node, sizes)
        elif node.op == "Resize" and not node.domain:
            _fold_resize(rewriter, node, sizes)
        elements = sizes.of(tensor)
        if elements is not None and is_known(elements) and tensor.outputs and not rewriter.is_output(tensor):
            _replace(rewriter, tensor, elements.astype(tensor.dtype))
    return rewriter.finish()


def _fold_reshape(rewriter: Rewriter, node: Node, sizes: Sizes) -> None:
    """A size that is copied from the same axis of the data is 0, one other unknown size is -1."""
    shape, source = sizes.of(node.inputs[1]), dims(node.inputs[0])
    if shape is None or node.attrs.get("allowzero", 0):
        return
    target: list[Element] = shape.tolist()
    for i, size in enumerate(target):
        if isinstance(size, str) and source is not None and i < len(source) and source[i] == size:
            target[i] = 0
    symbols = [i for i, size in enumerate(target) if isinstance(size, str)]
    if len(symbols) == 1 and -1 not in target:
        target[symbols[0]] = -1
    if all(isinstance(size, int) for size in target):
        rewriter.set_input(node, 1, rewriter.constant(f"{node.name}_shape", np.array(target, np.int64)))
        rewriter.count += 1


def _fold_resize(rewriter: Rewriter, node: Node, sizes: Sizes) -> None:
    """Sizes that only keep the dynamic axes are constant scales."""
    tensor = ir.optional_input(node, 3)
    if tensor is None or ir.is_constant(tensor):
        return
    wanted, source = sizes.of(tensor), dims(node.inputs[0])
    if wanted is None or source is None:
        return
    scales = [_scale(old, new) for old, new in zip(source, wanted, strict=True)]
    if None in scales:
        return
    rewriter.set_input(node, 2, rewriter.constant(f"{node.name}_scales", np.array(scales, np.float32)))
    rewriter.set_input(node, 3, ir.Variable.empty())
    rewriter.count += 1


def _scale(old: Element, new: Element) -> float | None:
    """The float32 scale that gives exactly the new size, or None."""
    if old == new:
        return 1.0
    if not isinstance(old, int) or not isinstance(new, int) or old == 0:
        return None
    scale = np.float32(new) / np.float32(old)
    return float(scale) if math.floor(scale * np.float32(old)) == new else None


def fold_values(state: CompileState, max_bytes: int) -> int:
    """Evaluate the nodes that read only constants, all in one session."""
    rewriter = Rewriter(state)
    nodes = _foldable(rewriter, max_bytes)
    if not nodes:
        return 0
    inside = {id(n) for n in nodes}
    wanted = [t for n in nodes for t in n.outputs if any(id(user) not in inside for user in t.outputs)]
    values = _evaluate(state.graph, nodes, wanted)
    for tensor in wanted:
        if id(tensor) in values:
            _replace(rewriter, tensor, values[id(tensor)])
    return rewriter.finish()


def _foldable(rewriter: Rewriter, max_bytes: int) -> list[Node]:
    """The nodes that depend on constants only, in order, and whose results are not too large."""
    graph = rewriter.graph
    compiled = {"QuantizeLinear", "DequantizeLinear"} if rewriter.state.phase >= Phase.QDQ else set()
    skipped = RANDOM | {"Constant"} | compiled
    known: set[int] = set()
    nodes = []
    for node in graph.nodes:
        constant = all(t.is_empty() or ir.is_constant(t) or id(t) in known for t in node.inputs)
        if not constant or node.domain or node.op in skipped or not node.inputs or ir.has_subgraph(node):
            continue
        outputs = [t for t in node.outputs if not t.is_empty()]
        if not any(rewriter.is_output(t) for t in outputs) and _fits(node, outputs, max_bytes):
            nodes.append(node)
            known.update(id(t) for t in outputs)
    return nodes


def _fits(node: Node, outputs: list[Tensor], max_bytes: int) -> bool:
    before, after = _bytes(t for t in node.inputs if not t.is_empty()), _bytes(outputs)
    if before is None or after is None:
        return False
    return after <= before or after <= min(max(SMALL_BYTES, before * MAX_GROWTH), max_bytes)


def _bytes(tensors: Iterable[Tensor]) -> int | None:
    """The size in memory, or None if it is unknown or not of numbers."""
    total = 0
    for tensor in tensors:
        shape = ir.static_shape(tensor)
        if shape is None or not kind(tensor):
            return None
        total += math.prod(shape) * np.dtype(tensor.dtype).itemsize
    return total


def _evaluate(graph: Graph, nodes: list[Node], wanted: list[Tensor]) -> dict[int, NDArray[Any]]:
    """The values of the wanted tensors by `id`. Nodes that ONNX Runtime cannot run are left out."""
    try:
        model = ir.to_proto(Graph(nodes=nodes, inputs=[], outputs=wanted, opset=graph.opset, name="constants"))
        results = runtime.run(runtime.session(model, optimize=False), {})
    except RuntimeError:
        if len(nodes) == 1:
            return {}
        alone = [n for n in nodes if all(t.is_empty() or ir.is_constant(t) for t in n.inputs)]
        found: dict[int, NDArray[Any]] = {}
        for node in alone:
            found |= _evaluate(graph, [node], [t for t in node.outputs if not t.is_empty() and t.outputs])
        return found
    return {id(t): value for t, value in zip(wanted, results, strict=True)}
