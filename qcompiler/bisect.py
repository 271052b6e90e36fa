"""Bisection of a pipeline: the first pass, and the first single rewrite, after which a model fails a test."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qcompiler import ir
from qcompiler.errors import UserError
from qcompiler.instrument import Watcher
from qcompiler.ir import Graph, Node
from qcompiler.job import Job
from qcompiler.pipeline import Instrument, Pass, PassError, Pipeline
from qcompiler.predicate import Fails
from qcompiler.state import CompileState, Phase
from qcompiler.text import format_graph


@dataclass(frozen=True)
class Culprit:
    """What breaks the model. `stage`: the text of the pass; `position`: its number in the pipeline, from 1.

    `rewrite`, of `rewrites`: the first rewrite that breaks it, or None if the pass works as a whole. `changes`: what that rewrite
    (or the pass) did, a line per node: `-` removed, `+` added. `layers`: the float layers that it touched. `failure`: how the
    model fails afterwards. `pipeline`: the shortest one found that still fails.
    """

    stage: str
    position: int
    rewrite: int | None
    rewrites: int
    changes: tuple[str, ...]
    layers: tuple[str, ...]
    failure: str
    pipeline: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Outcome:
    """What running passes came to: how the model fails, or None; whether a pass broke; the rewrites of the last pass."""

    failure: str | None
    crashed: bool = False
    rewrites: int = 0


def bisect(job: Job, fails: Fails, progress: Callable[[str], None] = lambda _: None) -> Culprit | None:
    """Run the pipeline of a job and find what makes the model fail; None if the final model does not.

    Every pass leaves a model that runs, so each can be tested. A model that ONNX Runtime refuses fails, and so does a pass that
    breaks. The job's state is not changed. Within the pass, a rewrite after the one that breaks the model is taken not to mend
    it. Raises UserError if the float model itself fails, or does not run.
    """
    trial = _Trial(fails, job.guards)
    failure = trial.test(job.state.graph)
    if failure is not None:
        raise UserError(f"the model fails before any pass: {failure}", "--fails")
    found = _first_failure(job, trial, progress)
    if found is None:
        return None
    stage = job.pipeline.passes[found.index]
    progress(f"rewrites of {stage.name}")
    rewrite = trial.first_rewrite(stage, found)
    changes, layers = _effect(stage, found.before, rewrite)
    progress("shorter pipelines")
    passes = (*job.pipeline.passes[: found.index + 1], *found.tail)
    shortest = trial.shortest(passes, stage, found, job.state)
    return Culprit(
        stage=str(Pipeline((stage,))),
        position=found.index + 1,
        rewrite=rewrite,
        rewrites=found.outcome.rewrites,
        changes=tuple(changes),
        layers=tuple(layers),
        failure=found.outcome.failure or "",
        pipeline=str(Pipeline(tuple(shortest))),
    )


@dataclass(frozen=True)
class _Failure:
    """The pass that breaks the model: its index, the state before it, what came of it, and which passes before it did nothing.

    `tail`: the passes to run after it before the model can be tested.
    """

    index: int
    before: CompileState
    outcome: _Outcome
    idle: list[Pass]
    tail: tuple[Pass, ...] = ()


def _first_failure(job: Job, trial: _Trial, progress: Callable[[str], None]) -> _Failure | None:
    """Run all passes and test after each; None if the last model does not fail.

    Passes between calibration and quantization prepare a float model for an error that is still to come. So they are not tested,
    but when the quantized model fails, each is left out in turn.
    """
    state, stages = job.state.clone(), job.pipeline.passes
    found: _Failure | None = None
    last, idle = _Outcome(None), list[Pass]()
    untested: list[tuple[int, CompileState]] = []
    for i, stage in enumerate(stages):
        progress(f"pass {i + 1} of {len(stages)}: {stage.name}")
        before = state.clone() if found is None else None
        prepares = _prepares(state, stage, stages[i + 1 :])
        last = trial.run(stage, state, test=not prepares)
        if last.failure is not None and before is not None:
            found = trial.preparation(stages, i, untested, idle) or _Failure(i, before, last, list(idle))
        elif not last.rewrites and stage.establishes is None:
            idle.append(stage)
        if not prepares:
            untested = []
        elif before is not None:
            untested.append((i, before))
        if last.crashed:
            break
    return None if last.failure is None else found


def _prepares(state: CompileState, stage: Pass, later: Sequence[Pass]) -> bool:
    """Whether the state is calibrated, but not quantized before a later pass."""
    is_late = state.phase >= Phase.CALIBRATED and stage.establishes is None
    return is_late and state.phase < Phase.QDQ and any((s.establishes or 0) >= Phase.QDQ for s in later)


class _Trial:
    """Runs passes and tests what they leave; equal models are tested once."""

    def __init__(self, fails: Fails, guards: Sequence[Instrument]) -> None:
        self._fails, self._guards = fails, guards
        self._verdicts: dict[bytes, str | None] = {}

    def test(self, graph: Graph) -> str | None:
        """How the model fails, or None."""
        model = ir.to_proto(graph)
        key = hashlib.sha256(model.SerializeToString(deterministic=True)).digest()
        if key not in self._verdicts:
            self._verdicts[key] = self._fails(model)
        return self._verdicts[key]

    def run(self, stage: Pass, state: CompileState, *, test: bool = True) -> _Outcome:
        """Run one pass on the state, and test the model. Raises UserError if the pass cannot run there."""
        counter = _Counter()
        try:
            Pipeline((stage,)).run(state, [*self._guards, counter])
        except PassError as error:
            return _Outcome(str(error), crashed=True)
        return _Outcome(self.test(state.graph) if test else None, rewrites=counter.count)

    def preparation(
        self, stages: Sequence[Pass], last: int, untested: Sequence[tuple[int, CompileState]], idle: Sequence[Pass]
    ) -> _Failure | None:
        """The first untested pass without which the model does not fail after the pass number `last`, if any."""
        for i, before in untested:
            tail = tuple(stages[i + 1 : last + 1])
            without, state = before.clone(), before.clone()
            try:
                Pipeline(tail).run(without)
            except (PassError, UserError):
                continue
            if self.test(without.graph) is None:
                rewrites = self.run(stages[i], state, test=False).rewrites
                Pipeline(tail).run(state)
                return _Failure(i, before, _Outcome(self.test(state.graph), rewrites=rewrites), list(idle), tail)
        return None

    def limited(self, stage: Pass, found: _Failure, limit: int) -> bool:
        """Whether the first `limit` rewrites of a pass break the model."""
        state = found.before.clone()
        state.rewrite_limit = limit
        if not found.tail:
            return self.run(stage, state).failure is not None
        Pipeline((stage,)).run(state)
        state.rewrite_limit = None
        Pipeline(found.tail).run(state)
        return self.test(state.graph) is not None

    def first_rewrite(self, stage: Pass, found: _Failure) -> int | None:
        """The number of the rewrite that breaks the model, from 1; None if the pass does not work by single rewrites."""
        if self.limited(stage, found, 0):
            return None
        good, bad = 0, found.outcome.rewrites
        if found.outcome.crashed:  # so it is not known how many rewrites there are
            bad = 1
            while not self.limited(stage, found, bad):
                if bad > MAX_REWRITES:
                    return None
                good, bad = bad, 2 * bad
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if self.limited(stage, found, middle) else (middle, bad)
        return bad or None

    def shortest(self, stages: Sequence[Pass], culprit: Pass, found: _Failure, start: CompileState) -> list[Pass]:
        """The passes without those that the failure does not need: all idle ones, then one by one from the back."""
        busy = [s for s in stages if not any(s is i for i in found.idle)]
        kept = busy if self._is_culprit(culprit, busy, start, found) else list(stages)
        for stage in reversed(kept):
            fewer = [s for s in kept if s is not stage]
            if stage is not culprit and self._is_culprit(culprit, fewer, start, found):
                kept = fewer
        return kept

    def _is_culprit(self, culprit: Pass, stages: Sequence[Pass], start: CompileState, found: _Failure) -> bool:
        """Whether these passes break the model, but not without the culprit."""
        at = next(i for i, s in enumerate(stages) if s is culprit)
        state = start.clone()
        try:
            Pipeline(tuple(stages[:at])).run(state)
            without = state.clone()
            Pipeline(tuple(stages[at + 1 :])).run(without)
            if self.test(without.graph) is not None:
                return False
            outcome = self.run(culprit, state, test=not found.tail)
            if outcome.crashed or not found.tail:
                return outcome.failure is not None and outcome.crashed == found.outcome.crashed
            Pipeline(tuple(stages[at + 1 :])).run(state)
        except (PassError, UserError):
            return False
        return self.test(state.graph) is not None


MAX_REWRITES = 1 << 20
"""Where the search for a pass that breaks without end is given up."""


class _Counter(Watcher):
    """Keeps the number of rewrites."""

    count = 0

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        """Note it."""
        self.count = count


def _effect(stage: Pass, before: CompileState, rewrite: int | None) -> tuple[list[str], list[str]]:
    """What one rewrite, or the whole pass, did to the graph, as lines, and the float layers behind the nodes that changed."""
    old, new = before.clone(), before.clone()
    try:
        if rewrite is not None:
            old.rewrite_limit, new.rewrite_limit = rewrite - 1, rewrite
            Pipeline((stage,)).run(old)
        Pipeline((stage,)).run(new)
    except PassError:
        return [], []
    a, b = _lines(old.graph), _lines(new.graph)
    names = [name for name in dict.fromkeys((*a, *b)) if a.get(name, ("",))[0] != b.get(name, ("",))[0]]
    origin = {**old.origin, **new.origin}
    layers = dict.fromkeys(layer for name in names for layer in origin.get(name, (name,)))
    return [line for name in names for line in _change(name, a.get(name), b.get(name))], list(layers)


def _lines(graph: Graph) -> dict[str, tuple[str, Node]]:
    """The text of each node, and the node, by name."""
    lines = format_graph(graph).splitlines()[1:-1]
    return {node.name: (line, node) for node, line in zip(graph.nodes, lines, strict=True)}


def _change(name: str, old: tuple[str, Node] | None, new: tuple[str, Node] | None) -> Iterator[str]:
    if old is not None:
        yield f"- {name}: {old[0]}"
    if new is not None:
        yield f"+ {name}: {new[0]}"
    for i, (x, y) in enumerate(zip(old[1].inputs, new[1].inputs, strict=False) if old and new else ()):
        a, b = ir.value(x), ir.value(y)
        if a is None or b is None or a.shape != b.shape or a.dtype.kind not in "fiu":
            continue
        gap = np.abs(b.astype(np.float64) - a.astype(np.float64))
        if gap.any():
            at = tuple(int(k) for k in np.unravel_index(gap.argmax(), gap.shape))
            where = f" at {list(at)}" if at else ""
            yield f"  input {i}: {np.count_nonzero(gap)} of {gap.size} values differ, most{where}: {a[at]:.6g} -> {b[at]:.6g}"
