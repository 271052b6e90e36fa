"""Instruments: verification, timing, dumps, the operators of blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
from qcompiler_passes.cleanup import Cleanup
from qcompiler_passes.form_blocks import FormBlocks

from qcompiler import snapshot
from qcompiler.errors import UserError
from qcompiler.instrument import Dump, Operators, Reproducer, Runnable, Timing, Trace, Verify
from qcompiler.pipeline import Pass, PassError, Pipeline
from qcompiler.plugin import Registry, load_registry
from qcompiler.rewrite import Refusal, Rewriter, apply_rules
from qcompiler.snapshot import Recipe
from qcompiler.state import CompileState, Feeds, Phase
from tests.support import TEST_TARGET, model_from_text, run, state_of


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
    files = [f"{stem}.{kind}" for stem in ("01-cleanup", "02-relu-to-abs") for kind in ("json", "onnx", "txt")]
    assert sorted(p.name for p in folder.iterdir()) == files
    assert "t = Neg(x)\ny = Abs(t)\n" in (folder / "02-relu-to-abs.txt").read_text()
    feeds = {"x": np.float32([-3, 4])}
    assert run(onnx.load(folder / "01-cleanup.onnx"), feeds)[0].tolist() == [3, 0]
    assert run(onnx.load(folder / "02-relu-to-abs.onnx"), feeds)[0].tolist() == [3, 4]


def test_a_dump_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the dump"):
        Pipeline((Cleanup(),)).run(state(), [Dump(tmp_path / "file" / "dump")])


def test_a_reproducer_holds_the_state_before_the_pass(tmp_path: Path) -> None:
    passes = (Cleanup(), ReluToAbs(), Break(), Cleanup())
    starts: list[CompileState] = []

    def restart() -> CompileState:
        starts.append(state())
        return starts[-1]

    def run_with(passes: tuple[Pass, ...]) -> None:
        Pipeline(passes).run(state(), [Verify(), Reproducer(tmp_path / "r", Recipe(), passes, restart)])

    run_with(passes[:2])
    assert not starts and not (tmp_path / "r").exists()
    with pytest.raises(PassError) as caught:
        run_with(passes)
    assert len(starts) == 1
    found = snapshot.read(tmp_path / "r" / "before-break", load_registry_with_test_target())
    assert (found.done, [n.op for n in found.state.graph.nodes]) == (2, ["Neg", "Abs"])
    (note,) = caught.value.error.__notes__
    assert note.endswith("--until break --debug")


def load_registry_with_test_target() -> Registry:
    registry = load_registry()
    registry.targets["test"] = TEST_TARGET
    return registry


def test_operators_are_those_of_the_float_model() -> None:
    operators, start = Operators(), state()
    start.graph.nodes[0].op = "Softmax"
    Pipeline((FormBlocks(), ReluToAbs())).run(start, [operators])
    assert operators.of == {"n0": "Softmax", "n1": "Relu"}


def test_what_surrounds_an_operator_is_no_layer_of_its_own() -> None:
    model = model_from_text(
        "g (float[2,3] x) => (float[3,2] y) { f = Transpose(x) c = Relu(f) t = Transpose(c) y = Transpose(t) }"
    )
    start = state_of(model)
    moved, relu, back, own = (node.name for node in start.graph.nodes)
    start.origin = {moved: (relu,), back: (relu, "folded"), relu: (relu, "folded")}
    operators = Operators()
    Pipeline((FormBlocks(), Cleanup())).run(start, [operators])
    assert list(operators.of) == [relu, own]


@dataclass(frozen=True)
class Decline:
    """Refuses every node: a Relu with a culprit, the others without."""

    level: int = 3

    name: ClassVar[str] = "decline"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        rules = {"Relu": lambda _, node: Refusal("it clips", "t"), "Neg": lambda _, node: Refusal("no pattern")}
        return apply_rules(Rewriter(state), rules)


def test_a_trace_is_a_timeline_even_of_a_run_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with pytest.raises(PassError):
        Pipeline((Decline(level=7), Break(), Cleanup())).run(state(), [Trace(path), Verify()])
    events = json.loads(path.read_text())["traceEvents"]
    assert [(e["name"], e["ph"], e["cat"]) for e in events] == [
        ("decline", "X", "pass"),
        ("break", "X", "pass"),
        ("break", "X", "pass"),
    ]
    assert events[0]["args"] == {"level": 7, "rewrites": 0, "nodes": 2, "phase": "float"}
    assert events[2]["args"]["error"].startswith("VerifyError: ")
    assert events[0]["ts"] + events[0]["dur"] <= events[1]["ts"]


def test_a_trace_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write the trace"):
        Pipeline((Cleanup(),)).run(state(), [Trace(tmp_path / "no" / "trace.json")])


def test_data_that_is_gone_does_not_hide_the_error_of_a_pass() -> None:
    def samples() -> Iterator[Feeds]:
        raise UserError("the calibration data is no longer there")
        yield {}

    with pytest.raises(PassError):
        Pipeline((Break(),)).run(state(), [Runnable(onnx.ModelProto(), samples()), Verify()])
    with pytest.raises(UserError, match="does not load"):
        Pipeline((Break(),)).run(state(), [Verify(), Runnable(onnx.ModelProto(), [{}])])
