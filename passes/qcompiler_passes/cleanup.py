"""cleanup: remove what no output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler import ir
from qcompiler.ir import Node
from qcompiler.rewrite import Rewriter
from qcompiler.state import CompileState, Phase


@dataclass(frozen=True)
class Cleanup:
    """Remove nodes whose results nobody reads, and table entries of nodes and tensors that are gone.

    A QuantizeLinear behind a DequantizeLinear with the same scale gives the same integers: readers read those.
    """

    name: ClassVar[str] = "cleanup"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of nodes removed."""
        before = len(state.graph.nodes)
        if state.phase >= Phase.QDQ:
            _join(Rewriter(state))
        Rewriter(state).finish()
        alive = {n.name for n in state.graph.nodes}
        state.origin = {name: layers for name, layers in state.origin.items() if name in alive}
        state.tables = {name: model for name, model in state.tables.items() if name in alive}
        return before - len(state.graph.nodes)


def _join(rewriter: Rewriter) -> None:
    """Let what reads integers that were dequantized and quantized again read the first ones."""
    state = rewriter.state
    for node in [n for n in rewriter.graph.nodes if n.op == "QuantizeLinear"]:
        maker, result = ir.producer(node.inputs[0]), node.outputs[0]
        if maker is None or maker.op != "DequantizeLinear" or not _same_params(maker, node):
            continue
        source = maker.inputs[0]
        if not rewriter.is_output(result):
            state.params.setdefault(source.name, state.params[result.name])
            rewriter.replace_uses(result, source)
        elif (first := ir.producer(source)) is not None and not rewriter.is_output(source):
            state.params[result.name] = state.params[source.name]
            rewriter.take_output(first, result)
            rewriter.replace_uses(source, result)


def _same_params(first: Node, second: Node) -> bool:
    if len(first.inputs) != 3 or len(second.inputs) != 3:
        return False
    pairs = [(ir.value(a), ir.value(b)) for a, b in zip(first.inputs[1:], second.inputs[1:], strict=True)]
    return all(a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
