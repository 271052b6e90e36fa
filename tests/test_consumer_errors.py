"""consumer_errors: what rounding a tensor costs at the outputs of the layers that read it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from qcompiler_passes.annotate import Annotate
from qcompiler_passes.calibrate import Calibrate
from qcompiler_passes.consumer_errors import least_error
from qcompiler_passes.form_blocks import FormBlocks

from qcompiler.quant import QuantParams
from tests.forms import compiled, graph_text, weights


def candidates(params: dict[str, QuantParams], *factors: float) -> list[dict[str, QuantParams]]:
    return [{name: replace(p, scale=p.scale * np.float32(factor)) for name, p in params.items()} for factor in factors]


@pytest.mark.parametrize(("weight_of_spikes", "winner"), [(0.0, 1), (1.0, 0)])
def test_rare_large_values_count_as_much_as_the_weights_that_read_them(weight_of_spikes: float, winner: int) -> None:
    w = weights(5, 4, 1, 1)
    w[:, 3] *= weight_of_spikes
    state = compiled(
        graph_text("g (float[1,4,8,8] x) => (float[] y) { y = Conv(x, w) }", w=w), FormBlocks(), Annotate()
    )
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((1, 4, 8, 8)).astype(np.float32)} for _ in range(4)]
    for feeds in samples:
        feeds["x"][0, 3] *= 8
    state.calibration = samples
    Calibrate(collector="minmax").run(state)
    choices = candidates(state.params, 1.0, 1 / 6)
    assert least_error(state, choices, samples)["x"] is choices[winner]["x"]


def test_tensors_that_share_params_choose_together_and_what_no_layer_reads_keeps_the_first() -> None:
    text = "g (float[1,4,8,8] x) => (float[] y) { r = Reshape(x, s) h = Conv(r, w) y = Sigmoid(h) }"
    model = graph_text(text, s=np.array([1, 4, 4, 16]), w=weights(5, 4, 1, 1))
    state = compiled(model, FormBlocks(), Annotate(), Calibrate(collector="minmax"))
    choices = candidates(state.params, 64.0, 1.0)
    found = least_error(state, choices, list(state.calibration or ()))
    assert found["x"] is choices[1]["x"]
    assert found["r"] is choices[1]["r"]
    assert found["h"] is choices[0]["h"]
