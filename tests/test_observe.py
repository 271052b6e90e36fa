from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import pytest

from qcompiler import runtime
from qcompiler.collectors import MinMax, Omse
from qcompiler.errors import UserError
from qcompiler.observe import observe
from tests.support import model_from_text

CHAIN = """g (float[N,C,H,W] x) => (float[N,D,P,Q] y) {
    c = Conv <kernel_shape = [1, 1]> (x, w)
    r = Relu (c)
    y = Sigmoid (r)
}"""
WEIGHT = np.random.default_rng(0).standard_normal((8, 3, 1, 1)).astype(np.float32)


class Recorder(MinMax):
    """Keeps all that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, float, np.ndarray]] = []

    def observe(self, low: float, high: float, values: np.ndarray) -> None:
        super().observe(low, high, values)
        self.seen.append((low, high, values.copy()))

    def merge(self, other: Recorder) -> None:
        super().merge(other)
        self.seen += other.seen


def chain() -> onnx.ModelProto:
    return model_from_text(CHAIN, {"w": WEIGHT})


def samples(*sizes: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1, 3, s, s + 1)).astype(np.float32)} for s in sizes]


def values_of(model: onnx.ModelProto, name: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """A tensor of the model, by making it an output."""
    if name in feeds:
        return feeds[name]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.append(onnx.ValueInfoProto(name=name))
    return runtime.run(runtime.session(copy), feeds)[0]


def test_bounds_are_exact_for_inputs_inner_tensors_and_outputs():
    data = samples(5, 9, 40)
    names = ["x", "c", "r", "y"]
    got = observe(chain(), names, data, Recorder, workers=1)
    assert list(got) == names
    for name in names:
        for (low, high, _), feeds in zip(got[name].seen, data, strict=True):
            wanted = values_of(chain(), name, feeds)
            np.testing.assert_allclose([low, high], [wanted.min(), wanted.max()], rtol=1e-6, atol=1e-7)


def test_small_tensors_are_sampled_whole_and_large_ones_with_a_stride():
    data = samples(5, 60)
    got = observe(chain(), ["x"], data, Recorder, sample_size=100, workers=1)["x"].seen
    np.testing.assert_array_equal(got[0][2], data[0]["x"].reshape(-1))
    flat = data[1]["x"].reshape(-1)
    assert 90 <= got[1][2].size <= 200
    positions = np.flatnonzero(np.isin(flat, got[1][2]))
    assert positions.size == got[1][2].size
    assert len(set(np.diff(positions))) == 1
    assert np.diff(positions)[0] % 2 == 1


def test_samples_start_at_different_places():
    data = samples(60) * 6
    got = observe(chain(), ["x"], data, Recorder, sample_size=50, workers=1)["x"].seen
    assert len({values[0] for _, _, values in got}) > 3


@pytest.mark.parametrize("workers", [2, 3, None])
def test_the_number_of_workers_changes_nothing(workers):
    data = samples(30, 7, 12, 50, 41, 23, 8)
    alone = observe(chain(), ["x", "r", "y"], data, Omse, sample_size=64, workers=1)
    team = observe(chain(), ["x", "r", "y"], data, Omse, sample_size=64, workers=workers)
    for name, collector in alone.items():
        assert (collector.low, collector.high) == (team[name].low, team[name].high)
        np.testing.assert_array_equal(collector.counts, team[name].counts)
        assert collector.counts.sum() > 0


def test_the_source_is_read_once_and_one_sample_at_a_time():
    active = 0

    def source() -> Iterator[dict[str, np.ndarray]]:
        nonlocal active
        for feeds in samples(4, 5, 6):
            active += 1
            yield feeds

    iterator = source()
    got = observe(chain(), ["y"], iterator, Recorder, workers=1)
    assert active == len(got["y"].seen) == 3
    assert next(iterator, None) is None


def test_progress_counts_the_samples():
    calls: list[tuple[int, int | None]] = []
    observe(chain(), ["y"], samples(4, 5, 6), MinMax, lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    calls.clear()
    observe(chain(), ["y"], iter(samples(4)), MinMax, lambda done, total: calls.append((done, total)))
    assert calls == [(1, None)]


def test_empty_tensors_are_passed_over():
    model = model_from_text("""g (float[N,M] x) => (float[K,M] y) {
        zero = Constant <value = int64[1] {0}> ()
        three = Constant <value = int64[1] {3}> ()
        n = Shape <start = 0, end = 1> (x)
        y = Slice (x, three, n, zero)
    }""")
    data = [{"x": np.full((rows, 2), rows, np.float32)} for rows in (5, 2, 0, 4)]
    got = observe(model, ["x", "y"], data, Recorder, workers=1)
    assert [low for low, _, _ in got["x"].seen] == [5, 2, 4]
    assert [low for low, _, _ in got["y"].seen] == [5, 4]


def test_tensors_that_are_not_float32_are_refused():
    model = model_from_text("g (float[N] x) => (int64[M] s) { s = Shape (x) }")
    with pytest.raises(ValueError, match=r"'s' is not float32, but int64"):
        observe(model, ["x", "s"], [], MinMax)


def test_unknown_tensors_are_refused():
    with pytest.raises(ValueError, match="no tensor 'z'"):
        observe(chain(), ["x", "z"], samples(4), MinMax)


def test_nothing_to_observe_reads_nothing():
    assert observe(chain(), [], iter(()), MinMax) == {}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", [MinMax, Omse])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_names_tensor_and_sample(kind, bad, workers):
    data = samples(6, 6, 6, 6, 6)
    data[2]["x"][0, 1, 3, 3] = bad
    data[3]["x"][0, 1, 3, 3] = bad
    with pytest.raises(UserError, match=r"tensor 'x': a value is not finite \(calibration sample 2\)"):
        observe(chain(), ["x", "c"], data, kind, workers=workers)


def test_a_sample_that_does_not_fit_is_named():
    data = [*samples(4, 4), {"x": np.zeros((1, 5, 4, 4), np.float32)}]
    with pytest.raises(UserError, match="calibration sample 2"):
        observe(chain(), ["y"], data, MinMax)
    with pytest.raises(UserError, match=r"does not take these inputs.*calibration sample 0"):
        observe(chain(), ["y"], [{"z": np.zeros(1, np.float32)}], MinMax)


def test_errors_of_the_source_come_through():
    def source() -> Iterator[dict[str, np.ndarray]]:
        yield from samples(4)
        raise UserError("the file is broken", "a.png")

    with pytest.raises(UserError, match=r"the file is broken \(a.png\)"):
        observe(chain(), ["y"], source(), MinMax)


def test_an_operator_that_fails_on_a_sample_names_the_sample():
    model = model_from_text("""g (float[N] x) => (float[M] y) {
        a = Neg (x)
        seven = Constant <value = int64[1] {7}> ()
        y = Reshape (a, seven)
    }""")
    data = [{"x": np.zeros(n, np.float32)} for n in (7, 7, 3)]
    with pytest.raises(UserError, match=r"Reshape.*calibration sample 2"):
        observe(model, ["a"], data, MinMax)


@pytest.mark.parametrize("opset", [13, 17, 18, 22])
def test_any_opset_will_do(opset):
    data = samples(20)
    got = observe(model_from_text(CHAIN, {"w": WEIGHT}, opset), ["r"], data, Recorder)["r"].seen
    wanted = values_of(chain(), "r", data[0])
    assert got[0][1] == pytest.approx(float(wanted.max()), rel=1e-6)
    assert got[0][2].size == wanted.size


def test_tensors_read_in_a_subgraph_and_its_outputs_can_be_observed():
    model = model_from_text("""g (bool c, float[4] x) => (float[4] y) {
        a = Neg (x)
        y = If (c) <then_branch = t () => (float[4] p) { p = Relu (a) }, else_branch = e () => (float[4] q) { q = Abs (a) }>
    }""")
    x = np.array([-1, 2, -3, 4], np.float32)
    data = [{"c": np.array(flag), "x": x} for flag in (True, False)]
    got = observe(model, ["a", "y"], data, Recorder, workers=1)
    assert [high for _, high, _ in got["y"].seen] == [3, 4]
    assert (got["a"].low, got["a"].high) == (-4, 3)


def test_values_are_clipped_at_the_limits_of_their_tensor():
    found = observe(chain(), ["c", "r"], samples(5, 6), Recorder, limits={"c": (-0.5, 0.25)})
    for name, low, high in (("c", -0.5, 0.25), ("r", 0.0, np.inf)):
        collector = found[name]
        assert isinstance(collector, Recorder)
        for seen_low, seen_high, values in collector.seen:
            assert low <= seen_low <= values.min()
            assert values.max() <= seen_high <= high
    assert (found["c"].low, found["c"].high) == (-0.5, 0.25)


def test_a_value_that_is_not_finite_is_an_error_beyond_the_limits_too():
    feeds = [{"x": np.full((1, 3, 2, 2), np.inf, np.float32)}]
    with pytest.raises(UserError, match="not finite"):
        observe(chain(), ["x"], feeds, MinMax, limits={"x": (-1.0, 1.0)})
