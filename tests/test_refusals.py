"""What passes left, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler_passes.cleanup import Cleanup

from qcompiler.pipeline import Pipeline
from qcompiler.refusals import Refusals
from qcompiler.rewrite import Rewriter
from qcompiler.state import Block, CompileState, Phase
from tests.test_instrument import Decline, ReluToAbs, state


@dataclass(frozen=True)
class Choose:
    """Chooses one of two blocks."""

    name: ClassVar[str] = "choose"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = Phase.ANNOTATED

    def run(self, state: CompileState) -> int:
        state.blocks["n0"] = Block("n0", ("n0",), ("t",), reason="its input 'x' is a float tensor")
        state.blocks["n1"] = Block("n1", ("n1",), ("y",), quantized=True)
        return 0


def test_refusals_of_the_passes_asked_for() -> None:
    refusals = Refusals(("decline", "relu-to-abs", "choose", "never"))
    Pipeline((Decline(), Cleanup(), Decline(), ReluToAbs(), Choose())).run(state(), [refusals])
    assert [
        (name, [(r.node, r.op, r.output, r.reason, r.culprit) for r in found]) for name, found in refusals.found
    ] == [
        ("decline", [("n0", "Neg", "t", "no pattern", ""), ("n1", "Relu", "y", "it clips", "t")]),
        ("decline", [("n0", "Neg", "t", "no pattern", ""), ("n1", "Relu", "y", "it clips", "t")]),
        ("relu-to-abs", []),
        ("choose", [("n0", "Neg", "t", "its input 'x' is a float tensor", "n0")]),
    ]
    assert list(refusals.lines()) == [
        "never: did not run",
        "decline: left 2 nodes as they were",
        "  n1  Relu: it clips (t)",
        "  1 x Neg: no pattern",
        "decline: left the same 2 nodes again",
        "relu-to-abs: left 0 nodes as they were",
        "choose: left 1 nodes as they were",
        "  n0  Neg: its input 'x' is a float tensor",
    ]
    assert "  n0  Neg: no pattern" in refusals.lines(verbose=True)


def test_refusals_do_not_outlive_the_node_or_the_pass() -> None:
    kept = state()
    Pipeline((Decline(),)).run(kept)
    assert set(kept.refusals) == {"n0", "n1"}
    Rewriter(kept).remove(kept.graph.nodes[1])
    assert set(kept.refusals) == {"n0"}
    Pipeline((Cleanup(),)).run(kept)
    assert kept.refusals == {}
