"""Instruments: what can be attached to a pipeline. Each is a few lines on before, after and failed."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import onnx

from qcompiler import __version__, ir, runtime, snapshot
from qcompiler.errors import UserError
from qcompiler.ops import Lowering, op_key
from qcompiler.pipeline import Pass, Pipeline
from qcompiler.snapshot import Recipe
from qcompiler.state import CompileState, Feeds
from qcompiler.verify import verify


class Watcher:
    """An instrument that does nothing; subclasses replace what they need."""

    def before(self, stage: Pass, state: CompileState) -> None:
        """Called before a pass."""

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        """Called after a pass that made `count` rewrites."""

    def failed(self, stage: Pass, state: CompileState, error: Exception) -> None:
        """Called when a pass raised."""


class Verify(Watcher):
    """Checks the invariants after every pass; what fails is reported as the pass's own error."""

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        """Raise VerifyError if an invariant is broken."""
        verify(state)


@dataclass
class Runnable(Watcher):
    """When a pass breaks on a float model that does not run either, reports that: passes rely on what operators ask for."""

    model: onnx.ModelProto
    samples: Iterable[Feeds]

    def failed(self, stage: Pass, state: CompileState, error: Exception) -> None:
        """Raise UserError if the model does not run on the first sample."""
        if isinstance(error, UserError):
            return
        try:
            first = list(islice(self.samples, 1))
        except UserError:  # the data is gone, which is not what went wrong
            return
        try:
            runner = runtime.session(self.model, optimize=False)
            for feeds in first:
                runtime.run(runner, feeds)
        except (UserError, RuntimeError) as broken:
            what = broken.what if isinstance(broken, UserError) else str(broken)
            raise UserError(what, "calibration sample 0") from error


@dataclass(frozen=True)
class PassTime:
    """What one pass did: rewrites, wall-clock milliseconds, and the nodes that it left."""

    name: str
    rewrites: int
    milliseconds: float
    nodes: int


@dataclass
class Timing(Watcher):
    """Measures every pass."""

    passes: list[PassTime] = field(default_factory=list)
    _start: float = 0.0

    def before(self, stage: Pass, state: CompileState) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        """Record the pass."""
        elapsed = (time.perf_counter() - self._start) * 1e3
        self.passes.append(PassTime(stage.name, count, round(elapsed, 2), len(state.graph.nodes)))


@dataclass
class Trace(Watcher):
    """Writes a timeline of the passes in Chrome's trace event format, for chrome://tracing and ui.perfetto.dev.

    The file is whole after every pass, so that a run that fails leaves one. Times are microseconds.
    """

    path: Path
    events: list[dict[str, Any]] = field(default_factory=list)
    _zero: float = field(default_factory=time.perf_counter)
    _start: float = 0.0

    def before(self, stage: Pass, state: CompileState) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        """Add the pass. Raises UserError if the file cannot be written."""
        phase = state.phase.name.lower()
        self._add(stage, {"rewrites": count, "nodes": len(state.graph.nodes), "phase": phase})

    def failed(self, stage: Pass, state: CompileState, error: Exception) -> None:
        """Add the pass that raised, unless it is this file that cannot be written."""
        if not isinstance(error, UserError):
            self._add(stage, {"error": f"{type(error).__name__}: {error}"})

    def _add(self, stage: Pass, facts: dict[str, Any]) -> None:
        began, took = ((t * 1e6) for t in (self._start - self._zero, time.perf_counter() - self._start))
        event = {"name": stage.name, "cat": "pass", "ph": "X", "ts": round(began, 1), "dur": round(took, 1)}
        options = {f.name: getattr(stage, f.name) for f in fields(stage)}  # type: ignore[arg-type]
        self.events.append({**event, "pid": 1, "tid": 1, "args": {**options, **facts}})
        try:
            self.path.write_text(json.dumps({"traceEvents": self.events, "displayTimeUnit": "ms"}, default=str))
        except OSError as error:
            raise UserError(f"cannot write the trace: {error.strerror}", str(self.path)) from error


@dataclass
class Dump(Watcher):
    """Writes a snapshot after every pass, or after those that rewrote something: `NN-pass.onnx`, `.json` and `.txt`.

    `number`: how many passes have run before the first that this sees.
    """

    folder: Path
    recipe: Recipe = field(default_factory=Recipe)
    changed_only: bool = False
    number: int = 0

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        """Write the state as it is now. Raises UserError if the folder cannot be written."""
        self.number += 1
        if count or not self.changed_only:
            snapshot.write(state, self.recipe, self.number, self.folder / f"{self.number:02d}-{stage.name}")


@dataclass
class Reproducer(Watcher):
    """When a pass breaks, writes the state before it as `before-PASS`, and `crash.txt`: command, versions, traceback.

    `restart` gives the state from which `passes` started: to have it at hand before each pass would cost time, so the passes
    before the one that broke are run again. The error gets a note that says how to see it again.
    """

    folder: Path
    recipe: Recipe
    passes: Sequence[Pass]
    restart: Callable[[], CompileState]
    _started: int = 0

    def before(self, stage: Pass, state: CompileState) -> None:
        """Count the pass."""
        self._started += 1

    def failed(self, stage: Pass, state: CompileState, error: Exception) -> None:
        """Write the folder, unless the user can mend the error."""
        if not isinstance(error, UserError):
            self._write(lambda: self._started - 1, error)

    def rejected(self, error: Exception, accept: Callable[[CompileState], object]) -> None:
        """Write the folder for a result that is no valid model: `accept` raises for a state that is none.

        The pass to blame is the first that leaves such a state.
        """
        self._write(lambda: self._first_rejected(accept), error)

    def _first_rejected(self, accept: Callable[[CompileState], object]) -> int:
        state = self.restart()
        for i, stage in enumerate(self.passes):
            Pipeline((stage,)).run(state)
            try:
                accept(state)
            except Exception:
                return i
        return len(self.passes) - 1

    def _write(self, culprit: Callable[[], int], error: Exception) -> None:
        try:
            done = culprit()
            stage, fresh = self.passes[done], self.restart()
            stem = self.folder / f"before-{stage.name}"
            Pipeline(tuple(self.passes[:done])).run(fresh)
            snapshot.write(fresh, self.recipe, done, stem)
            again = ["qcompile", "resume", f"{stem}.onnx", *(w for f in self.recipe.load for w in ("--load", f))]
            rerun = shlex.join([*again, "--until", stage.name, "--debug"])
            (self.folder / "crash.txt").write_text(_crash(error, rerun), encoding="utf-8")
        except Exception as second:  # it must not hide the first
            error.add_note(f"no reproducer: {second}")
            return
        error.add_note(f"to see it again: {rerun}")


def _crash(error: Exception, rerun: str) -> str:
    """What reproduces a crash, for people."""
    versions = [f"{name} {version(name)}" for name in ("onnx", "onnx-graphsurgeon", "onnxruntime", "numpy")]
    lines = [f"command:   {shlex.join(sys.argv)}", f"to rerun:  {rerun}"]
    lines.append(f"versions:  qcompiler {__version__}, Python {platform.python_version()}, {', '.join(versions)}")
    return "\n".join([*lines, "", "".join(traceback.format_exception(error))])


@dataclass
class Operators(Watcher):
    """Keeps the operator type of every block's root, which later passes replace.

    Left out are arithmetic on shapes, and what passes put around another operator to give its operands another layout.
    """

    of: dict[str, str] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        """Note the roots that are there for the first time."""
        roots = [n for n in state.graph.nodes if n.name in state.blocks and n.name not in self._seen]
        self._seen |= {n.name for n in roots}
        layers = {n.name: state.origin.get(n.name, (n.name,)) for n in roots}
        movers = {n.name for n in roots if _only_moves(n, state)}
        others = {layer for name, found in layers.items() if name not in movers for layer in found}
        for node in roots:
            is_part = node.name in movers and others.issuperset(layers[node.name])
            if any(map(_may_be_float, node.outputs)) and not is_part:
                self.of[node.name] = node.op


def _only_moves(node: ir.Node, state: CompileState) -> bool:
    rule = state.ops.get(op_key(node.op, node.domain))
    return rule is not None and rule.lowering is Lowering.MOVE


def _may_be_float(tensor: ir.Tensor) -> bool:
    name = ir.type_name(tensor)
    return name == "?" or "float" in name
