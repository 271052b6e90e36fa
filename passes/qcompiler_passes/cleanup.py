"""cleanup: remove what no output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.rewrite import Rewriter
from qcompiler.state import CompileState, Phase


@dataclass(frozen=True)
class Cleanup:
    """Remove nodes whose results nobody reads, and table entries of nodes and tensors that are gone."""

    name: ClassVar[str] = "cleanup"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of nodes removed."""
        before = len(state.graph.nodes)
        Rewriter(state).finish()
        alive = {n.name for n in state.graph.nodes}
        state.origin = {name: layers for name, layers in state.origin.items() if name in alive}
        state.tables = {name: model for name, model in state.tables.items() if name in alive}
        return before - len(state.graph.nodes)
