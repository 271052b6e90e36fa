from __future__ import annotations

import numpy as np
import onnx
import pytest

from qcompiler import runtime
from qcompiler.collectors import MinMax
from qcompiler.errors import UserError
from qcompiler.observe import observe
from qcompiler.relay import Relay, relay, split
from tests.support import model_from_text

SKIPS = """g (float[N,4] x, bool b) => (float[N,4] a, float[N,4] y) {
    h0 = MatMul (x, w)
    a = Relu (h0)
    h1 = MatMul (a, w)
    h2 = Add (h1, h0)
    h3 = If (b) <
        then_branch = t () => (float[N,4] u) { u = Add (h2, h0) },
        else_branch = e () => (float[N,4] v) { v = Mul (h1, w0) }
    >
    h4 = Sigmoid (h3)
    h5 = Add (h4, x)
    y = MatMul (h5, w)
}"""
RNG = np.random.default_rng(0)
WEIGHTS = {n: RNG.standard_normal(s).astype(np.float32) for n, s in (("w", (4, 4)), ("w0", (4,)))}


def model() -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(model_from_text(SKIPS, WEIGHTS))


def feeds(flag: bool) -> dict[str, np.ndarray]:
    return {"x": RNG.standard_normal((3, 4)).astype(np.float32), "b": np.array(flag)}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("flag", [True, False])
def test_sections_compute_what_the_model_does(size: int, flag: bool) -> None:
    given = feeds(flag)
    wanted = runtime.run(runtime.session(model()), given)
    for got, expected in zip(runtime.run(relay(model(), size), given), wanted, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_sections_hold_every_node_once_and_only_the_weights_that_they_read(size: int) -> None:
    sections = split(model(), size)
    assert sorted(n.output[0] for s in sections for n in s.graph.node) == sorted(
        n.output[0] for n in model().graph.node
    )
    assert max(len(s.graph.node) for s in sections) <= size
    for section in sections:
        onnx.checker.check_model(section)
        read = {name for node in section.graph.node for name in node.input}
        assert len(sections) == 1 or {w.name for w in section.graph.initializer} <= read | {"w0"}


def test_a_short_model_stays_as_it_is() -> None:
    whole = model()
    assert split(whole, 8) == [whole]


def test_no_cut_where_a_type_is_not_known() -> None:
    untyped = model_from_text(SKIPS, WEIGHTS)
    del untyped.graph.value_info[:]
    assert [len(s.graph.node) for s in split(untyped, 2)] == [8]


def test_wrong_feeds_are_refused() -> None:
    with pytest.raises(UserError):
        runtime.run(relay(model(), 2), {"x": np.zeros((1, 4), np.float32), "b": np.array(True), "c": np.zeros(1)})
    with pytest.raises(UserError):
        runtime.run(relay(model(), 2), {"x": np.zeros((1, 4), np.float32)})


def test_values_are_let_go_as_soon_as_nobody_reads_them() -> None:
    runner = Relay(split(model(), 1), ["y"])
    assert "h4" in {name for names in runner._dead for name in names}
    assert not any("y" in names for names in runner._dead)


def test_calibration_sees_the_same_in_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["h2", "x", "y", "h0", "a"]
    data = [feeds(True), feeds(False)]
    whole = observe(model(), names, data, MinMax, workers=1)
    monkeypatch.setattr("qcompiler.observe.SECTION", 6)
    parts = observe(model(), names, data, MinMax, workers=1)
    assert list(parts) == list(whole) == names
    for name in names:
        np.testing.assert_allclose((parts[name].low, parts[name].high), (whole[name].low, whole[name].high), rtol=1e-6)


def test_sections_without_outputs_do_not_run() -> None:
    sections, given = split(model(), 3), feeds(True)
    del sections[-1].graph.output[:]
    wanted = runtime.run(runtime.session(model()), given)[0]
    np.testing.assert_allclose(Relay(sections, ["a"]).run(None, given)[0], wanted, rtol=1e-6)
