"""Instruments: verification, timing, dumps, the operators of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
from qcompiler_passes.cleanup import Cleanup
from qcompiler_passes.form_blocks import FormBlocks

from qcompiler.errors import UserError
from qcompiler.instrument import Dump, Operators, Timing, Verify
from qcompiler.pipeline import PassError, Pipeline
from qcompiler.rewrite import Rewriter
from qcompiler.state import CompileState, Phase
from tests.support import model_from_text, run, state_of


@dataclass(frozen=True)
class Break:
    """Breaks the order of the nodes."""

    name: ClassVar[str] = "break"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        state.graph.nodes.reverse()
        return 1


@dataclass(frozen=True)
class ReluToAbs:
    """Replaces every Relu."""

    name: ClassVar[str] = "relu-to-abs"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        rewriter = Rewriter(state)
        for node in [n for n in state.graph.nodes if n.op == "Relu"]:
            new = rewriter.node("Abs", [node.inputs[0]], origin=node)
            rewriter.take_output(new, node.outputs[0])
            rewriter.count += 1
        return rewriter.finish()


def state() -> CompileState:
    state = state_of(model_from_text("g (float[2] x) => (float[2] y) { t = Neg(x) y = Relu(t) }"))
    for i, node in enumerate(state.graph.nodes):
        node.name = f"n{i}"
    return state


def test_verify_blames_the_pass_that_broke_it() -> None:
    with pytest.raises(PassError, match=r"^pass break of tests: VerifyError: .*'t' is not defined before it is read"):
        Pipeline((Cleanup(), Break(), Cleanup())).run(state(), [Verify()])


def test_timing_counts_rewrites_and_nodes() -> None:
    timing = Timing()
    Pipeline((ReluToAbs(), Cleanup())).run(state(), [timing])
    assert [(p.name, p.rewrites, p.nodes) for p in timing.passes] == [("relu-to-abs", 1, 2), ("cleanup", 0, 2)]
    assert all(0 <= p.milliseconds < 1000 for p in timing.passes)


def test_dumps_run(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    Pipeline((Cleanup(), ReluToAbs())).run(state(), [Dump(folder)])
    assert sorted(p.name for p in folder.iterdir()) == ["01-cleanup.onnx", "02-relu-to-abs.onnx"]
    feeds = {"x": np.float32([-3, 4])}
    assert run(onnx.load(folder / "01-cleanup.onnx"), feeds)[0].tolist() == [3, 0]
    assert run(onnx.load(folder / "02-relu-to-abs.onnx"), feeds)[0].tolist() == [3, 4]


def test_a_dump_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the dump"):
        Pipeline((Cleanup(),)).run(state(), [Dump(tmp_path / "file" / "dump")])


def test_operators_are_those_of_the_float_model() -> None:
    operators = Operators()
    Pipeline((FormBlocks(), ReluToAbs())).run(state(), [operators])
    assert operators.of == {"n0": "Neg", "n1": "Relu"}
