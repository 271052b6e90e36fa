"""concrete_shapes: the shapes of all tensors on the first calibration sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompiler import concrete_shapes as module
from qcompiler import ir, runtime
from qcompiler.concrete_shapes import concrete_shapes
from qcompiler.state import CompileState
from tests.forms import graph_text, state_of, weights


def on_sample(text: str, shape: tuple[int, ...], **constants: np.ndarray) -> CompileState:
    state = state_of(graph_text(text, **constants))
    state.calibration = [{"x": np.ones(shape, np.float32)}]
    return state


def counted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the tensors in each model that runs."""
    made: list[list[str]] = []
    original: Callable[..., Any] = runtime.session

    def session(model: Any, **options: Any) -> Any:
        made.append([name for node in model.graph.node if node.op_type != "Shape" for name in node.output])
        return original(model, **options)

    monkeypatch.setattr(module.runtime, "session", session)
    return made


def test_shapes_follow_from_the_sample_without_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "g (float[N,4,H,W] x) => (float[] y) { c = Conv(x, w) g = com.microsoft.QuickGelu<alpha=1.0>(c)"
        " t = com.microsoft.Gelu(g) y = Relu(t) }"
    )
    made = counted(monkeypatch)
    shapes = concrete_shapes(on_sample(text, (2, 4, 7, 9), w=weights(8, 4, 3, 3)))
    assert shapes is not None
    assert all(shapes[name] == (2, 8, 5, 7) for name in ("c", "g", "t", "y"))
    assert made == []


def test_the_model_runs_no_further_than_inference_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "g (float[N,3] x) => (float[] y) { i = NonZero(x) t = Cast<to=1>(i) m = MatMul(t, w) y = Relu(m) }"
    made = counted(monkeypatch)
    shapes = concrete_shapes(on_sample(text, (2, 3), w=weights(6, 5)))
    assert shapes is not None
    assert (shapes["i"], shapes["m"], shapes["y"]) == ((2, 6), (2, 5), (2, 5))
    assert made == [["i"]]


def test_a_model_that_does_not_run_has_no_shapes() -> None:
    state = on_sample("g (float[N,3] x) => (float[] y) { i = NonZero(x) f = Cast<to=1>(i) y = MatMul(f, w) }", (2, 3))
    state.calibration = [{"x": np.ones((2, 4), np.float32)}]
    state.graph.nodes[0].op = "Unknown"
    assert concrete_shapes(state) is None
    assert all(ir.static_shape(t) is None for t in state.graph.outputs)
