from __future__ import annotations

import numpy as np
import onnx
import pytest
from qcompiler_passes.calibrate import Calibrate

from qcompiler import runtime
from qcompiler.collectors import COLLECTORS, MinMax
from qcompiler.errors import UserError
from qcompiler.pipeline import Pipeline, format_pass, parse_pipeline
from qcompiler.quant import QuantSpec, params_from_range
from qcompiler.state import CompileState, Phase
from tests.support import model_from_text, random_feeds, state_of

U8 = QuantSpec("uint8", 0, 255)

NET = """g (float[1,4,8,8] x) => (float[1,8,4,4] y) {
    c = Conv <kernel_shape = [1, 1]> (x, w)
    r = Relu (c)
    p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
    q = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)
    s = Add (p, k)
    y = Concat <axis = 1> (s, q)
}"""
CONSTANTS = {
    "w": np.random.default_rng(0).standard_normal((4, 4, 1, 1)).astype(np.float32),
    "k": np.array([[[[-0.5]], [[0.25]], [[0.1]], [[0.3]]]], np.float32),
}


def net() -> onnx.ModelProto:
    return model_from_text(NET, CONSTANTS)


def annotated(*names: str, ties: dict[str, str] | None = None, model: onnx.ModelProto | None = None) -> CompileState:
    model = model or net()
    state = state_of(model, phase=Phase.ANNOTATED)
    state.specs = dict.fromkeys(names, U8)
    state.ties = dict(ties or {})
    state.calibration = [random_feeds(model, seed) for seed in range(4)]
    return state


def ranges(state: CompileState, *names: str) -> list[tuple[float, float]]:
    """The exact ranges of tensors over the calibration data."""
    model = net()
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = runtime.session(model)
    runs = [runtime.run(session, feeds) for feeds in state.calibration or ()]
    return [(min(float(r[i].min()) for r in runs), max(float(r[i].max()) for r in runs)) for i in range(len(names))]


def assert_range(state: CompileState, name: str, low: float, high: float) -> None:
    wanted = params_from_range(low, high, U8)
    assert state.params[name].zero_point == wanted.zero_point
    np.testing.assert_allclose(state.params[name].scale, wanted.scale, rtol=1e-6)


def test_every_tensor_with_a_spec_gets_params_and_a_second_run_does_nothing():
    names = ("x", "r", "s", "y")
    state = annotated(*names)
    Pipeline((Calibrate(collector="minmax"),)).run(state)
    assert state.phase is Phase.CALIBRATED
    assert list(state.params) == list(names)
    for name, (low, high) in zip(names[1:], ranges(state, *names[1:]), strict=True):
        assert_range(state, name, low, high)
    assert state.params["r"].zero_point == 0
    state.calibration = None
    assert Calibrate(collector="minmax").run(state) == 0


def test_the_count_is_that_of_tensors():
    assert Calibrate(collector="minmax").run(annotated("x", "r", "p", ties={"p": "r"})) == 3


def test_tied_tensors_share_params_measured_together():
    state = annotated("s", "q", "y", ties={"s": "y", "q": "y"})
    Calibrate(collector="minmax").run(state)
    bounds = ranges(state, "s", "q", "y")
    assert_range(state, "y", min(b[0] for b in bounds), max(b[1] for b in bounds))
    assert state.params["s"] is state.params["q"] is state.params["y"]


def test_a_tensor_that_only_moves_values_is_not_measured(monkeypatch):
    measured = []
    original = MinMax.observe
    monkeypatch.setattr(
        MinMax, "observe", lambda self, low, high, v: measured.append(v.size) or original(self, low, high, v)
    )
    state = annotated("r", "p", ties={"p": "r"})
    Calibrate(collector="minmax").run(state)
    assert measured == [256] * 4, "r alone, four samples"
    assert state.params["p"] is state.params["r"]


def test_a_moved_tensor_is_measured_where_its_source_is_not_in_the_class():
    state = annotated("p")
    Calibrate(collector="minmax").run(state)
    assert_range(state, "p", *ranges(state, "p")[0])


def test_constants_are_measured_exactly_without_data():
    state = annotated("k")
    state.calibration = None
    assert Calibrate("omse").run(state) == 1
    assert_range(state, "k", -0.5, 0.3)


def test_the_graph_is_left_alone():
    state = annotated("x", "r", "y")
    before = [n.name for n in state.graph.nodes]
    Calibrate(collector="minmax").run(state)
    assert [n.name for n in state.graph.nodes] == before
    assert [t.name for t in state.graph.inputs] == ["x"]
    assert [t.name for t in state.graph.outputs] == ["y"]


@pytest.mark.parametrize("collector", COLLECTORS)
def test_the_order_of_the_data_changes_nothing(collector):
    a, b = annotated("x", "r", "y"), annotated("x", "r", "y")
    b.calibration = list(reversed(list(b.calibration)))
    Calibrate(collector).run(a)
    Calibrate(collector).run(b)
    assert all(a.params[n].same_as(b.params[n]) for n in a.specs)


def test_collectors_come_from_the_state():
    class Fixed(MinMax):
        def finish(self, spec):
            return params_from_range(-1.0, 1.0, spec)

    state = annotated("x")
    state.collectors = {"fixed": Fixed}
    Calibrate("fixed").run(state)
    assert_range(state, "x", -1, 1)


def test_an_unknown_collector_is_named():
    with pytest.raises(UserError, match=r"no collector is called 'minmix'; did you mean 'minmax'\?"):
        Calibrate("minmix").run(annotated("x"))


def test_missing_data_is_the_users_error():
    state = annotated("x")
    state.calibration = None
    with pytest.raises(UserError, match="there is no calibration data"):
        Calibrate(collector="minmax").run(state)


def test_an_empty_source_is_the_users_error():
    state = annotated("r")
    state.calibration = []
    with pytest.raises(UserError, match="no range for tensor 'r': no value was observed"):
        Calibrate(collector="minmax").run(state)


def test_a_senseless_sample_size_is_the_users_error():
    with pytest.raises(UserError, match="samples_per_tensor must be at least 1, not 0"):
        Calibrate(samples_per_tensor=0).run(annotated("x"))


def test_values_that_are_not_finite_name_the_tensor():
    state = annotated("x", "r")
    state.calibration[1]["x"][0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"tensor 'x': a value is not finite \(calibration sample 1\)"):
        Calibrate(collector="minmax").run(state)


def test_a_tensor_that_is_always_zero_gets_valid_params():
    state = annotated("x", "c", "r")
    state.calibration = [{"x": np.zeros((1, 4, 8, 8), np.float32)}]
    Calibrate(collector="minmax").run(state)
    assert all(state.params[n].scale > 0 for n in state.specs)


def test_progress_reaches_the_end():
    state = annotated("x")
    calls = []
    state.progress = lambda done, total: calls.append((done, total))
    Calibrate(collector="minmax").run(state)
    assert calls[-1] == (4, 4)


def test_options_survive_the_text_form():
    text = "calibrate{collector=minmax samples_per_tensor=100}"
    [stage] = parse_pipeline(text, {"calibrate": Calibrate}).passes
    assert stage == Calibrate("minmax", 100)
    assert format_pass(stage) == text
