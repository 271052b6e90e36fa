"""normalize: bring a model of any exporter and age to one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.errors import UserError
from qcompiler.ir import Constant, Node
from qcompiler.opset import raise_opset
from qcompiler.rewrite import Rewriter, apply_rules
from qcompiler.shapes import infer_shapes
from qcompiler.state import CompileState, Phase
from qcompiler_passes import noops


@dataclass(frozen=True)
class Normalize:
    """Raise the opset to the target's, turn Constant nodes into initializers, name everything, drop Identity and Dropout.

    Afterwards all names are unique, tensors know their type and shape where it can be inferred, and every node has an entry in
    `state.origin`. Graph inputs and outputs keep their names.
    """

    name: ClassVar[str] = "normalize"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None
    in_bodies: ClassVar[bool] = True

    def run(self, state: CompileState) -> int:
        """Return the number of nodes and tensors changed. Raises UserError where an old operator has no new form."""
        count = _use_short_domain(state) + _name_tensors(state) + _name_nodes(state)
        count += lift_constants(state)
        infer_shapes(state.graph, trust=False)
        raised = raise_opset(state, state.target.opset)
        if raised:
            infer_shapes(state.graph)
        return count + raised + apply_rules(Rewriter(state), noops.PLAIN)


def _use_short_domain(state: CompileState) -> int:
    """Spell the default domain "": both spellings are legal, and tables know one."""
    count = 0
    for graph in ir.all_graphs(state.graph):
        for node in graph.nodes:
            if node.domain == "ai.onnx":
                node.domain = None
                count += 1
        for domain in graph.import_domains or []:
            if domain.domain == "ai.onnx":
                domain.domain = ""
    return count


def _name_tensors(state: CompileState) -> int:
    """Make tensor names unique over all graphs: branches of an If may use the same ones."""
    owner: dict[str, int] = {}
    clashes = []
    for graph in ir.all_graphs(state.graph):
        for tensor in ir.tensors(graph):
            if owner.setdefault(tensor.name, id(tensor)) != id(tensor):
                clashes.append(tensor)
    rewriter = Rewriter(state)
    for tensor in {id(t): t for t in clashes}.values():
        tensor.name = rewriter.fresh_tensor_name(tensor.name)
    return len(clashes)


def _name_nodes(state: CompileState) -> int:
    """Make node names unique and not empty, and start the record of origins."""
    nodes = [n for g in ir.all_graphs(state.graph) for n in g.nodes]
    given = {n.name for n in nodes}
    seen: set[str] = set()
    count = 0
    for i, node in enumerate(nodes):
        if not node.name or node.name in seen:
            node.name = _unused(f"{node.name or node.op}_{i}", given)
            given.add(node.name)
            count += 1
        seen.add(node.name)
        state.origin.setdefault(node.name, (node.name,))
    return count


def _unused(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def lift_constants(state: CompileState) -> int:
    """Turn the Constant nodes of the main graph into initializers; return how many. One that makes a graph output stays."""
    nodes = [n for n in state.graph.nodes if n.op == "Constant" and not n.domain]
    if not nodes:
        return 0
    rewriter = Rewriter(state)
    for node in nodes:
        tensor, value = node.outputs[0], _constant_value(node)
        if value is None:
            continue
        if not rewriter.is_output(tensor):
            rewriter.replace_uses(tensor, Constant(tensor.name, value))
            rewriter.remove(node)
        elif tensor.outputs:
            rewriter.replace_uses(tensor, rewriter.constant(tensor.name, value))
        else:
            continue
        rewriter.count += 1
    return rewriter.finish()


def _constant_value(node: Node) -> NDArray[Any] | None:
    """The value in any of the attributes that may hold it; None for text. Raises UserError for a sparse one."""
    for key, attribute in node.attrs.items():
        if key == "value":
            return None if attribute.dtype == np.object_ else np.asarray(attribute.values)
        if key in ("value_float", "value_floats"):
            return np.array(attribute, np.float32)
        if key in ("value_int", "value_ints"):
            return np.array(attribute, np.int64)
        if key in ("value_string", "value_strings"):
            return None
    raise UserError("sparse constants are not supported", f"node {node.name!r}")
