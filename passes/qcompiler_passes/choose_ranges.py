"""choose-ranges: calibrate with several collectors, and keep the one whose quantized model is most exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.errors import UserError
from qcompiler.ir import Tensor
from qcompiler.ops import Lowering, rule_of
from qcompiler.pipeline import Pass, closest
from qcompiler.runtime import run_all, session
from qcompiler.state import CompileState, Feeds, Phase
from qcompiler_passes.align_scales import AlignScales
from qcompiler_passes.calibrate import Calibrate
from qcompiler_passes.consumer_errors import least_error
from qcompiler_passes.correct_bias import CorrectBias
from qcompiler_passes.insert_qdq import InsertQdq
from qcompiler_passes.round_weights import RoundWeights
from qcompiler_passes.scale_weights import ScaleWeights

_LEAST = 1e-9
"""Probabilities below it count as this."""

_AUTO_SAMPLES = 16

_QUICK = (RoundWeights(samples=16, rows=8, largest=128), CorrectBias())
_THOROUGH = (RoundWeights(), CorrectBias(samples=128))
"""What makes up for errors in the model of a trial: a range that this copes with does no harm."""

F64 = NDArray[np.float64]
Outputs = Sequence[Sequence[NDArray[Any]]]


@dataclass(frozen=True)
class ChooseRanges:
    """Try other collectors in place of the one that calibrated, each on all tensors, and then for each tensor the best.

    What a clip range costs shows at the outputs only: the tensor itself, and the layer behind it, rate the clipping of rare
    large values, which carry detections and classes, too low (measured: a range that halves the error of the next layer often
    raises that of the model). So each model is quantized, with weights and biases that make up for errors, and run on
    `samples` samples; another collector wins if the noise at the output that suffers most is less than the share `better` of
    that of the first, and if it is less on the share `most` of the samples: a few samples decide what clipping costs in the
    mean, and others will come. In trials weights and biases are fitted quickly; the winner has to win once more when both are
    fitted as well as they can be.

    `collectors`: names, with spaces between them. `auto`: whether to try, too, the mixture in which each tensor has the range
    of that collector with which the outputs of the layers that read it change least.
    """

    collectors: str = "percentile entropy minmax"
    samples: int = 128
    better: float = 0.9
    most: float = 2 / 3
    auto: bool = True

    name: ClassVar[str] = "choose-ranges"
    requires: ClassVar[Phase] = Phase.CALIBRATED
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of tensors with another range. Raises UserError for an unknown collector."""
        unknown = [name for name in self.collectors.split() if name not in state.collectors]
        if unknown:
            raise UserError(f"no collector is called {unknown[0]!r}{closest(unknown[0], state.collectors)}", self.name)
        if state.phase >= Phase.QDQ or state.calibration is None or _is_settled(state):
            return 0
        samples = list(islice(state.calibration, self.samples))
        wanted = run_all(session(ir.to_proto(state.graph), consume=True), samples)
        first = _noise(state, samples, wanted)
        least, best = np.inf, state
        for trial in self._trials(state, samples):
            noise = _noise(trial, samples, wanted)
            if _worst(noise) < least and self._wins(noise, first):
                least, best = _worst(noise), trial
        finished = (_noise(s, samples, wanted, _THOROUGH) for s in (best, state))
        if best is not state and not self._wins(*finished):
            return 0
        changed = [name for name, params in best.params.items() if not params.same_as(state.params[name])]
        for name in changed[: state.rewrite_limit]:
            state.params[name] = best.params[name]
        return len(changed[: state.rewrite_limit])

    def _wins(self, noise: F64, first: F64) -> bool:
        is_less = noise.sum(axis=0) < first.sum(axis=0)
        return _worst(noise) < self.better * _worst(first) and bool(np.mean(is_less) >= self.most)

    def _trials(self, state: CompileState, samples: Sequence[Feeds]) -> Iterator[CompileState]:
        """The state with the params of each collector, then with those of all mixed."""
        known = [state.params]
        for collector in self.collectors.split():
            trial = state.clone()
            trial.params, trial.progress = {}, None
            Calibrate(collector, means=0).run(trial)
            known.append(trial.params)
            yield trial
        if self.auto:
            trial = state.clone()
            trial.params = least_error(state, known, samples[:_AUTO_SAMPLES])
            yield trial


def _is_settled(state: CompileState) -> bool:
    """Whether the params came with the model, or weights have scales, which fit the ranges."""
    rules = ((n, rule_of(state.ops, n)) for n in state.graph.nodes)
    layers = (n for n, rule in rules if rule is not None and rule.lowering is Lowering.MAC)
    return bool(state.imported) or any(n.inputs[1].name in state.params for n in layers)


def _worst(noise: F64) -> float:
    """The noise of the output that suffers most."""
    return float(noise.sum(axis=1).max(initial=0))


def _noise(state: CompileState, samples: Sequence[Feeds], wanted: Outputs, fit: Sequence[Pass] = _QUICK) -> F64:
    """What the params of the state do to the outputs of all samples, when `fit` makes up for it; shape (outputs, samples)."""
    trial = state.clone()
    trial.rewrite_limit = None
    stages: Sequence[Pass] = (AlignScales(), ScaleWeights(), *fit, InsertQdq())
    for stage in stages:
        stage.run(trial)
    given = run_all(session(ir.to_proto(trial.graph), consume=True), samples)
    columns = zip(state.graph.outputs, zip(*wanted, strict=True), zip(*given, strict=True), strict=True)
    return np.array([_relative(tensor, a, b) for tensor, a, b in columns])


def _relative(tensor: Tensor, wanted: Sequence[NDArray[Any]], given: Sequence[NDArray[Any]]) -> F64:
    """The noise of one output, shape (samples,): its power relative to that of all samples.

    Of probabilities it is the Kullback-Leibler divergence from the wanted ones, relative to the number of distributions.
    """
    maker = ir.producer(tensor)
    compare = _divergence if maker is not None and maker.op == "Softmax" else _squares
    pairs = list(zip(wanted, given, strict=True))
    found = [compare(a, b) if a.dtype.kind == "f" and a.shape == b.shape else (0.0, 0.0) for a, b in pairs]
    noise, power = np.array(found).reshape(-1, 2).T
    return noise / power.sum() if 0 < power.sum() < np.inf else np.zeros_like(noise)


def _squares(wanted: NDArray[Any], given: NDArray[Any]) -> tuple[float, float]:
    noise, power = (float(np.square(x, dtype=np.float64).sum()) for x in (wanted - given, wanted))
    return noise, power


def _divergence(wanted: NDArray[Any], given: NDArray[Any]) -> tuple[float, float]:
    p, q = (np.maximum(x, _LEAST, dtype=np.float64) for x in (wanted, given))
    return float((p * np.log(p / q)).sum()), float(wanted.sum())
