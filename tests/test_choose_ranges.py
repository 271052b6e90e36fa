"""choose-ranges: the collector whose model is most exact at the outputs."""

from __future__ import annotations

import numpy as np
import pytest
from qcompiler_passes.align_scales import AlignScales
from qcompiler_passes.annotate import Annotate
from qcompiler_passes.calibrate import Calibrate
from qcompiler_passes.choose_ranges import ChooseRanges, _noise, _worst
from qcompiler_passes.form_blocks import FormBlocks
from qcompiler_passes.scale_weights import ScaleWeights

from qcompiler import ir
from qcompiler.errors import UserError
from qcompiler.runtime import run_all, session
from qcompiler.state import CompileState
from tests.forms import advance, compiled, graph_text, weights

NET = "g (float[1,4,8,8] x) => (float[] y) { h = Conv<pads=[1,1,1,1]>(x, v) r = Relu(h) y = Conv(r, w) }"


def calibrated(collector: str, text: str = NET) -> CompileState:
    model = graph_text(text, v=weights(8, 4, 3, 3), w=weights(4, 8, 1, 1))
    return compiled(model, FormBlocks(), Annotate(), Calibrate(collector=collector))


def ranges(state: CompileState) -> dict[str, tuple[float, int]]:
    return {name: (float(params.scale), params.zero_point) for name, params in state.params.items()}


def noise(state: CompileState) -> float:
    samples = list(state.calibration or ())
    return _worst(_noise(state, samples, run_all(session(ir.to_proto(state.graph)), samples)))


def test_a_better_collector_wins_and_a_worse_one_does_not() -> None:
    clipping, covering = calibrated("ema"), calibrated("minmax")
    assert noise(covering) < 0.5 * noise(clipping)
    stage = ChooseRanges(collectors="minmax")
    assert stage.run(clipping) == 3
    assert ranges(clipping) == ranges(covering)
    assert stage.run(clipping) == 0
    assert ChooseRanges(collectors="ema").run(covering) == 0
    assert ranges(clipping) == ranges(covering)


def test_a_collector_must_be_better_on_most_samples() -> None:
    state = calibrated("ema")
    assert ChooseRanges(collectors="minmax", most=1.01).run(state) == 0
    assert ChooseRanges(collectors="minmax", most=1.0).run(state) == 3


def test_probabilities_are_compared_by_their_divergence() -> None:
    text = NET.replace("y = Conv(r, w)", "c = Conv(r, w) f = Flatten(c) y = Softmax(f)")
    state = calibrated("minmax", text)
    samples = list(state.calibration or ())
    exact = run_all(session(ir.to_proto(state.graph)), samples)
    assert 0 < _worst(_noise(state, samples, exact)) < 0.001
    doubled = [[2 * y for y in row] for row in exact]
    assert _worst(_noise(state, samples, doubled)) == pytest.approx(np.log(2), rel=0.01)


def test_ranges_stay_once_weights_fit_them() -> None:
    state = advance(calibrated("ema"), AlignScales(), ScaleWeights())
    assert ChooseRanges().run(state) == 0


def test_a_limit_ends_the_pass_early() -> None:
    state = calibrated("ema")
    before = ranges(state)
    state.rewrite_limit = 1
    assert ChooseRanges(collectors="minmax").run(state) == 1
    assert sum(before[name] != now for name, now in ranges(state).items()) == 1


def test_an_unknown_collector_is_named() -> None:
    with pytest.raises(UserError, match=r"no collector is called 'perzentile'; did you mean 'percentile'"):
        ChooseRanges(collectors="minmax perzentile").run(calibrated("ema"))


def test_the_mixture_of_the_best_ranges_is_tried_as_well() -> None:
    mixed, plain = calibrated("ema"), calibrated("ema")
    assert ChooseRanges(collectors="minmax percentile", better=0.0).run(plain) == 0
    trials = list(ChooseRanges(collectors="minmax percentile")._trials(mixed, list(mixed.calibration or ())))
    assert len(trials) == 3
    known = [ranges(mixed), *(ranges(trial) for trial in trials[:2])]
    assert all(value in [k[name] for k in known] for name, value in ranges(trials[2]).items())
    assert len(list(ChooseRanges(collectors="minmax", auto=False)._trials(mixed, []))) == 1
