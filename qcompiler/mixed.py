"""Mixed precision: the fewest and cheapest layers in float with which a compiled model reaches a goal.

The sensitivities predict the noise of any choice of layers. The cheapest choice for a predicted SQNR is found greedily, and true
compilations on samples that did not calibrate tell how high the predicted SQNR has to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import escape
from typing import TypeAlias

import numpy as np
import onnx

from qcompiler import ir
from qcompiler.errors import UserError
from qcompiler.evaluate import Judge
from qcompiler.measure import compare
from qcompiler.pipeline import Instrument, Pipeline
from qcompiler.report import Figures, Reached
from qcompiler.runtime import session
from qcompiler.sensitivity import F64, FloatModel, Rounding, Sensitivity, before_qdq, measure
from qcompiler.state import CompileState, Feeds

Judging: TypeAlias = Callable[[onnx.ModelProto], Figures]

PROBES = 4
"""Samples on which sensitivities are measured."""

MAX_TRIALS = 10
FIRST_STEP = 3.0
"""Decibels by which the predicted SQNR grows after a first trial that nothing else can guide."""

LEAST_COST = 1e-6
"""What a layer counts that costs nothing in float."""

NEAR = 0.25
"""Decibels between a choice that reaches the goal and one that does not, below which the search ends."""


@dataclass(frozen=True)
class Goal:
    """What to reach. `min_sqnr`: in dB, for every output; `max_drop`: what a metric may lose, see `Judge.drop`.

    Raises UserError for a number that is not finite.
    """

    min_sqnr: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        for number, option in ((self.min_sqnr, "--min-sqnr"), (self.max_drop, "--max-drop")):
            if number is not None and not math.isfinite(number):
                raise UserError(f"{number} is no goal; give a number", option)

    def __str__(self) -> str:
        parts = [] if self.min_sqnr is None else [f"reach {self.min_sqnr:g} dB"]
        parts += [] if self.max_drop is None else [f"lose at most {self.max_drop:g} %"]
        return " and ".join(parts)

    @property
    def option(self) -> str:
        """How a user asks for it."""
        parts = [] if self.min_sqnr is None else [f"--min-sqnr {self.min_sqnr:g}"]
        parts += [] if self.max_drop is None else [f"--max-drop {self.max_drop:g}"]
        return " ".join(parts)

    def __bool__(self) -> bool:
        return self.min_sqnr is not None or self.max_drop is not None

    def met(self, figures: Figures) -> bool:
        """Whether the figures of a model meet it."""
        near = self.min_sqnr is None or _decibels(figures) >= self.min_sqnr
        return near and (self.max_drop is None or figures.drop is None or figures.drop <= self.max_drop)


def _decibels(figures: Figures) -> float:
    return math.inf if figures.sqnr is None else figures.sqnr


def figures_of(float_model: onnx.ModelProto, samples: Sequence[Feeds], judge: Judge | None) -> Judging:
    """What tells the figures of a model: its outputs on samples, and what it loses of a judge's score."""
    before = session(float_model)
    score = None if judge is None else judge.score(session(float_model, threads=0))

    def figures(model: onnx.ModelProto) -> Figures:
        found = [match.sqnr for match in compare(before, session(model), samples) if match.sqnr is not None]
        sqnr = min(found, default=None)
        if judge is None or score is None:
            return Figures(sqnr)
        return Figures(sqnr, judge.drop(score, judge.score(session(model, threads=0))))

    return figures


class Trials:
    """True compilations with some layers kept in float."""

    def __init__(
        self,
        start: CompileState,
        pipeline: Pipeline,
        probes: Sequence[Feeds],
        judge: Judging,
        instruments: Sequence[Instrument] = (),
    ) -> None:
        self._start, self._probes, self._judge, self._instruments = start, probes, judge, instruments
        self._front, self._rest = before_qdq(pipeline)
        self._known: dict[frozenset[str], Figures | None] = {}
        self.sensitivity: Sensitivity | None = None

    def __len__(self) -> int:
        return len(self._known)

    def __call__(self, kept: frozenset[str]) -> Figures | None:
        """The figures of the model with these layers in float, None if that leaves nothing quantized.

        The first trial also measures the sensitivities.
        """
        if kept not in self._known:
            state, keeper = self._start.clone(), FloatModel()
            state.keep_float = {**state.keep_float, **{escape(name): "on trial" for name in sorted(kept)}}
            self._front.run(state, [*self._instruments, keeper])
            if self.sensitivity is None and keeper.model is not None:
                self.sensitivity = measure(state, keeper.model, self._probes)
            self._rest.run(state)
            alive = not kept or any(block.quantized for block in state.blocks.values())
            self._known[kept] = self._judge(ir.to_proto(state.graph)) if alive else None
        return self._known[kept]


def reach(trial: Trials, goal: Goal) -> Reached:
    """Find the layers to keep in float. Raises UserError, with the best figures, if no choice that quantizes anything does it."""
    without, found = trial(frozenset()), trial.sensitivity
    if found is None or without is None:
        raise UserError("the pipeline does not calibrate", "--passes")
    if goal.met(without):
        return Reached(str(goal), (), len(found.noisy), without, without, len(trial))
    start = low = found.sqnr() or 0.0
    aim = low + FIRST_STEP if goal.min_sqnr is None else goal.min_sqnr + low - _decibels(without)
    best, high, nearest = None, math.inf, without
    while len(trial) < MAX_TRIALS and high - low > NEAR:
        kept = choose(found, aim)
        figures = trial(kept)
        if figures is None:
            high = aim
        elif goal.met(figures):
            best, high = (kept, figures), aim
        else:
            low, nearest = aim, max(nearest, figures, key=lambda f: (-(f.drop or 0.0), _decibels(f)))
        aim = (low + high) / 2 if math.isfinite(high) else _higher(goal, nearest, low, low - start)
    if best is None:
        raise UserError(f"no choice of layers in float does that; the nearest gave {nearest}", goal.option)
    order = tuple(name for name in found.layers if name in best[0])
    return Reached(str(goal), order, len({*found.noisy, *order}), without, best[1], len(trial))


def _higher(goal: Goal, nearest: Figures, low: float, gone: float) -> float:
    """The predicted SQNR to try after failures only: by what is missing, and at least twice as far from where it began."""
    missing = 0.0 if goal.min_sqnr is None else goal.min_sqnr - _decibels(nearest)
    return low + max(FIRST_STEP, missing, gone)


def choose(found: Sensitivity, sqnr: float) -> frozenset[str]:
    """The layers to keep in float for a predicted SQNR of every output: greedily what takes most noise out for its cost."""
    search = _Search(found, 10 ** (-sqnr / 10))
    while search.excess(search.noise) > 0:
        search.keep_best()
    return search.without_needless()


class _Search:
    """A set of layers in float that grows. A step keeps one layer, or all that round one activation."""

    def __init__(self, found: Sensitivity, limit: float) -> None:
        self.found, self.limit = found, limit
        self.noise = found.noise()
        self.kept: set[str] = set()
        self.using: dict[str, list[Rounding]] = {name: [] for name in found.layers}
        for rounding in found.roundings:
            for user in rounding.users:
                self.using[user].append(rounding)
        users = [tuple(sorted(rounding.users)) for rounding in found.roundings]
        self.steps = list(dict.fromkeys([*((name,) for name in found.layers), *users]))

    def excess(self, noise: F64) -> float:
        """By how much the noise of all outputs is above the limit."""
        return float(np.maximum(noise - self.limit, 0).sum())

    def keep_best(self) -> None:
        """Keep the layers that take out most noise for their cost; all that are left if none takes out any."""
        now, best, most = self.excess(self.noise), tuple(self.found.layers), 0.0
        for step in self.steps:
            new = [name for name in step if name not in self.kept]
            cost = sum(self.found.layers[name].cost for name in new)
            gain = (now - self.excess(self._noise_without(new))) / (cost + LEAST_COST) if new else 0.0
            if gain > most:
                best, most = step, gain
        self.noise = self._noise_without([name for name in best if name not in self.kept])
        self.kept.update(best)
        if most == 0:
            self.noise = np.zeros_like(self.noise)

    def _noise_without(self, new: Sequence[str]) -> F64:
        affected = {id(r): r for name in new for r in self.using[name]}
        gone = [r.noise for r in affected.values() if all(user in self.kept or user in new for user in r.users)]
        return np.maximum(self.noise - sum(gone, np.zeros_like(self.noise)), 0)

    def without_needless(self) -> frozenset[str]:
        """The kept layers less those, expensive ones first, without which the limit holds as well."""
        for name in sorted(self.kept, key=lambda name: -self.found.layers[name].cost):
            if self.excess(self.found.noise(self.kept - {name})) <= 0:
                self.kept.remove(name)
        return frozenset(self.kept)
