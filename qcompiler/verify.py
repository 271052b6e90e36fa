"""The invariants of a compilation: structure, and one function per phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from qcompiler import functions, ir, quant
from qcompiler.ir import Graph, Node, Tensor
from qcompiler.ops import op_key, quantized_rule
from qcompiler.quant import F32
from qcompiler.shift import is_shift
from qcompiler.state import CompileState, Phase


class VerifyError(Exception):
    """A pass broke an invariant."""


def verify(state: CompileState) -> None:
    """Check the structure and the invariants of every phase reached. Raises VerifyError with the first few problems."""
    problems = list(_structure(state))
    for phase, check in CHECKS.items():
        if state.phase >= phase and not problems:
            problems += check(state)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise VerifyError("; ".join(problems[:3]) + more)


def _structure(state: CompileState) -> Iterator[str]:
    """Names are unique, every input is defined before it is read, links hold both ways, outputs exist; in bodies, too.

    Before normalize, bodies that exclude each other may use the same names.
    """
    names: dict[str, int] = {}
    for tensor in ir.tensors(state.graph):
        if names.setdefault(tensor.name, id(tensor)) != id(tensor):
            yield f"two tensors are called {tensor.name!r}"
    yield from _graph_structure(state.graph, set(), set())


def _graph_structure(graph: Graph, ready: set[int], seen: set[str]) -> Iterator[str]:
    ready.update(id(t) for t in graph.inputs)
    for node in graph.nodes:
        if not node.name or node.name in seen:
            yield f"node name {node.name!r} is empty or taken ({node.op})"
        seen.add(node.name)
        for tensor in node.inputs:
            if not (tensor.is_empty() or ir.is_constant(tensor) or id(tensor) in ready):
                yield f"{node.name}: input {tensor.name!r} is not defined before it is read"
            if not any(n is node for n in tensor.outputs):
                yield f"{node.name}: tensor {tensor.name!r} does not know this reader"
        for tensor in node.outputs:
            if id(tensor) in ready:
                yield f"tensor {tensor.name!r} has two producers"
            if not tensor.is_empty():
                ready.add(id(tensor))
        for body in node.attrs.values():
            if isinstance(body, Graph):
                yield from _graph_structure(body, ready, seen)
    for tensor in graph.outputs:
        if id(tensor) not in ready and not ir.is_constant(tensor):
            yield f"graph output {tensor.name!r} has no producer"


def _fused(state: CompileState) -> Iterator[str]:
    nodes = {n.name for n in state.graph.nodes}
    if state.phase >= Phase.QDQ:
        return
    for block in state.blocks.values():
        for name in block.nodes:
            if name not in nodes:
                yield f"block {block.root!r} names a node {name!r} that is gone"


def _annotated(state: CompileState) -> Iterator[str]:
    """What a quantized block reads has a spec; the tables name tensors of the graph. Insert-qdq renames what they describe."""
    if state.phase >= Phase.QDQ:
        return
    nodes = {n.name: n for n in state.graph.nodes}
    known = {t.name for t in ir.tensors(state.graph)}
    for block in state.blocks.values():
        if block.quantized:
            root = nodes[block.root]
            for index in quantized_rule(state.ops, root).activations(root):
                if root.inputs[index].name not in state.specs:
                    yield f"block {block.root!r} is quantized, but its input {root.inputs[index].name!r} has no spec"
    for name in (*state.specs, *state.ties, *state.ties.values()):
        if name not in known:
            yield f"the tables name a tensor {name!r} that is gone"


def _calibrated(state: CompileState) -> Iterator[str]:
    """Every spec got params: positive scales, a zero point within the range; tied tensors got the same.

    A zero point that something is rounded with is even: all but those behind an Add that only moves them.
    """
    moved = {state.leader(state.blocks[n.name].outputs[0]) for n in state.graph.nodes if is_shift(state, n)}
    rounded = () if state.phase >= Phase.QDQ else [name for name in state.specs if state.leader(name) not in moved]
    for name in rounded:
        if name in state.params and state.params[name].zero_point % 2:
            yield f"tensor {name!r} has the zero point {state.params[name].zero_point}"
    for name in state.specs:
        params = state.params.get(name)
        if params is None:
            yield f"tensor {name!r} has a spec but no params"
        elif not params.spec.qmin <= params.zero_point <= params.spec.qmax:
            yield f"tensor {name!r} has the zero point {params.zero_point}"
        else:
            leader = state.params.get(state.leader(name), params)
            if leader is not params and not params.same_as(leader):
                yield f"tensor {name!r} is tied to {state.leader(name)!r}, but has other params"
    for name, params in state.params.items():
        if not np.all((params.scale > 0) & np.isfinite(params.scale)):
            yield f"tensor {name!r} has a scale that is not positive and finite"


def _qdq(state: CompileState) -> Iterator[str]:
    """Q and DQ have the constant scales and zero points of the params table, those of Q are even; integer constants are within
    their specs.
    """
    for node in state.graph.nodes:
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            yield from _conversion(state, node)
    for tensor in ir.tensors(state.graph):
        params = state.params.get(tensor.name)
        values = ir.value(tensor) if params is not None else None
        if params is None or values is None or values.dtype.kind not in "iu" or not values.size:
            continue
        limits = np.iinfo(values.dtype)
        if (limits.min, limits.max) != (params.spec.qmin, params.spec.qmax) and (
            values.min() < params.spec.qmin or values.max() > params.spec.qmax
        ):
            yield f"constant {tensor.name!r} leaves the range {params.spec.qmin}..{params.spec.qmax}"


def _conversion(state: CompileState, node: Node) -> Iterator[str]:
    integers = node.outputs[0] if node.op == "QuantizeLinear" else node.inputs[0]
    params, scale = state.params.get(integers.name), ir.value(node.inputs[1])
    if params is None:
        is_models_own = node.name in state.origin.get(node.name, (node.name,))
        if not is_models_own and not _is_accumulator(integers):
            yield f"{node.name}: tensor {integers.name!r} has no params"
        return
    zero = ir.optional_input(node, 2)
    zero_point = np.zeros((), np.int64) if zero is None else ir.value(zero)
    if scale is None or not (
        np.array_equal(scale, params.scales) or (not params.scales.ndim and np.all(scale == params.scales))
    ):
        yield f"{node.name}: its scale is not that of {integers.name!r} in the params table"
    if node.op == "QuantizeLinear" and params.zero_point % 2:
        yield f"{node.name}: its zero point {params.zero_point} is odd"
    if zero_point is None or np.any(zero_point != params.zero_point):
        yield f"{node.name}: its zero point is not that of {integers.name!r} in the params table"


def _is_accumulator(tensor: Tensor) -> bool:
    return ir.type_name(tensor) == "int32" and not ir.is_constant(tensor)


def _integer(state: CompileState) -> Iterator[str]:
    """Requantize has constant multipliers >= 1 and a constant shift; no accumulator goes through float to the next integers."""
    for node in state.graph.nodes:
        if node.domain == functions.DOMAIN and node.op == "Requantize":
            multiplier, shift = (ir.value(t) for t in node.inputs[1:3])
            if multiplier is None or shift is None:
                yield f"{node.name}: its multiplier or shift is not a constant"
            elif multiplier.min() < 1:
                yield f"{node.name}: its multiplier {multiplier.min()} is below 1"
        elif node.op == "DequantizeLinear" and _is_accumulator(node.inputs[0]) and state.rewrite_limit is None:
            for reader in node.outputs[0].outputs:
                if reader.op == "QuantizeLinear":
                    yield f"{node.name}: the accumulator goes through float to {reader.name}"


_SCALES = {
    "QLinearConv": (1, 4, 6),
    "QLinearMatMul": (1, 4, 6),
    "com.microsoft.QLinearMul": (1, 4, 6),
    "com.microsoft.QGemm": (1, 4, 7),
}
"""Kernels that multiply, then rescale: the positions of s_x, s_w and s_y."""


def _kernels(state: CompileState) -> Iterator[str]:
    """The rescale factors of the kernels are exactly m * 2**-16: then they compute the integers of the integer form."""
    checked = [(n, _factor(n, _SCALES[key])) for n in state.graph.nodes if (key := op_key(n.op, n.domain)) in _SCALES]
    factors = [f for _, f in checked if f is not None]
    if not factors or np.all(quant.is_dyadic(np.concatenate(factors))):
        return
    for node, factor in checked:
        if factor is not None and not np.all(quant.is_dyadic(factor)):
            yield f"{node.name}: its rescale factor is not a multiple of 2**-{quant.SHIFT}"


def _factor(node: Node, positions: tuple[int, int, int]) -> F32 | None:
    """The rescale factors, shape (channels,); None for a kernel of the model's own or one with a float result."""
    scales = [ir.optional_input(node, i) for i in positions]
    values = [None if t is None else ir.value(t) for t in scales]
    if any(v is None for v in values):
        return None
    s_x, s_w, s_y = (v for v in values if v is not None)
    return quant.rescale(s_x, s_w, s_y).reshape(-1)


CHECKS: dict[Phase, Callable[[CompileState], Iterator[str]]] = {
    Phase.FUSED: _fused,
    Phase.ANNOTATED: _annotated,
    Phase.CALIBRATED: _calibrated,
    Phase.QDQ: _qdq,
    Phase.INTEGER: _integer,
    Phase.KERNELS: _kernels,
}
"""The invariants that hold from a phase on."""
