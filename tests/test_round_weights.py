"""round-weights: rounding errors of a layer that cancel on its data."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from qcompiler_passes.align_scales import AlignScales
from qcompiler_passes.annotate import Annotate
from qcompiler_passes.calibrate import Calibrate
from qcompiler_passes.correct_bias import CorrectBias
from qcompiler_passes.form_blocks import FormBlocks
from qcompiler_passes.insert_qdq import InsertQdq
from qcompiler_passes.layer_inputs import vectors
from qcompiler_passes.nearest_plane import nearest_plane
from qcompiler_passes.round_weights import RoundWeights
from qcompiler_passes.scale_weights import ScaleWeights

from qcompiler import ir
from qcompiler.quant import quantize
from qcompiler.state import CompileState
from tests.forms import advance, compiled, graph_text, weights
from tests.support import model_from_text, run

BEFORE = (FormBlocks(), Annotate(), Calibrate(collector="minmax"), AlignScales(), ScaleWeights())


def correlated(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, 3)) @ rng.standard_normal((3, columns))
    return (mixed + 0.1 * rng.standard_normal((rows, columns))).astype(np.float32)


def damage(q: np.ndarray, w: np.ndarray, scale: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    error = q * scale - w
    return np.einsum("grk,gkl,grl->gr", error, hessian, error)


def test_independent_inputs_are_rounded_to_nearest() -> None:
    w = weights(1, 5, 300)
    scale = np.full((1, 5, 300), 0.02, np.float32)
    hessian = np.diag(np.linspace(1, 9, 300)).astype(np.float32)[None]
    np.testing.assert_array_equal(nearest_plane(w, scale, hessian, -128, 127), np.clip(np.rint(w / 0.02), -128, 127))


@pytest.mark.parametrize("columns", [9, 128, 300])
def test_correlated_inputs_let_errors_cancel(columns: int) -> None:
    w, scale = weights(2, 7, columns), np.full((2, 7, columns), 0.1, np.float32)
    x = np.stack([correlated(2000, columns, seed) for seed in (1, 2)])
    hessian = x.transpose(0, 2, 1) @ x / 2000
    q = nearest_plane(w, scale, hessian, -20, 20)
    assert np.all((q == np.rint(q)) & (np.abs(q) <= 20))
    nearest = np.clip(np.rint(w / 0.1), -20, 20)
    assert damage(q, w, scale, hessian).sum() < 0.5 * damage(nearest, w, scale, hessian).sum()


def test_two_columns_match_an_exhaustive_search() -> None:
    w = np.array([[[0.49, 0.49], [0.3, -0.2], [1.4, 0.6]]], np.float32)
    scale = np.ones((1, 3, 2), np.float32)
    hessian = np.array([[[1.0, 0.95], [0.95, 1.1]]], np.float32)
    q = nearest_plane(w, scale, hessian, -2, 2)
    grid = np.stack(np.meshgrid(*[np.arange(-2, 3)] * 2), axis=-1).reshape(-1, 2).astype(np.float32)
    best = [
        min(float(damage(g[None, None], w[:, r : r + 1], scale[:, :1], hessian)[0, 0]) for g in grid) for r in range(3)
    ]
    np.testing.assert_allclose(damage(q, w, scale, hessian)[0], best, rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "size", "attrs"),
    [
        ((6, 4, 3, 3), (7, 8), ""),
        ((6, 4, 3, 3), (7, 8), "<pads=[1,0,2,1], strides=[2,1]>"),
        ((6, 4, 2, 3), (7, 9), "<dilations=[2,3], pads=[1,1,1,1]>"),
        ((6, 2, 3, 3), (7, 8), "<group=2, strides=[2,2]>"),
        ((4, 1, 3, 3), (7, 8), "<group=4, pads=[1,1,1,1]>"),
        ((6, 4, 3), (9,), "<pads=[2,0], strides=[2]>"),
    ],
)
def test_the_inputs_of_a_convolution_times_its_weights_are_its_outputs(
    shape: tuple[int, ...], size: tuple[int, ...], attrs: str
) -> None:
    w, x = weights(*shape), np.random.default_rng(0).standard_normal((2, 4, *size)).astype(np.float32)
    dims = ",".join(map(str, x.shape))
    model = model_from_text(f"g (float[{dims}] x) => (float[] y) {{ y = Conv{attrs}(x, w) }}", {"w": w})
    layer = ir.from_proto(model).nodes[0]
    inputs = vectors(layer, w.shape, x, 10**6, 0)
    groups = len(inputs)
    rows = w.reshape(groups, w.shape[0] // groups, -1)
    found = (inputs @ rows.transpose(0, 2, 1)).transpose(1, 0, 2).reshape(-1, w.shape[0])
    wanted = np.moveaxis(run(model, {"x": x})[0], 1, -1).reshape(-1, w.shape[0])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def rounded(text: str, **constants: np.ndarray) -> tuple[CompileState, RoundWeights]:
    stage = RoundWeights(samples=4)
    return compiled(graph_text(text, **constants), *BEFORE, stage), stage


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("g (float[1,4,9,9] x) => (float[] y) { h = Conv<pads=[1,1,1,1]>(x, v) y = Conv(h, w) }", (8, 6, 3, 3)),
        ("g (float[1,4,9,9] x) => (float[] y) { h = Conv(x, v) y = Conv<group=6>(h, w) }", (6, 1, 5, 5)),
        (
            "g (float[1,4,9,9] x) => (float[] y) { h = Conv(x, v) r = Transpose<perm=[0,2,3,1]>(h) y = MatMul(r, w) }",
            (6, 8),
        ),
    ],
)
def test_a_layer_gets_integers_that_insert_qdq_uses(text: str, shape: tuple[int, ...]) -> None:
    w = weights(*shape)
    state, stage = rounded(text, v=np.abs(weights(6, 4, 3, 3)), w=w)
    integers = state.integers["w"]
    assert integers.dtype == np.int8
    nearest = quantize(w, state.params["w"])
    assert np.any(integers != nearest)
    assert np.abs(integers.astype(int) - nearest).max() <= 12
    assert stage.run(state) == 0
    InsertQdq().run(state)
    stored: list[Any] = [ir.array(t) for t in ir.tensors(state.graph) if ir.is_constant(t)]
    assert any(a.shape == integers.shape and a.dtype == np.int8 and np.array_equal(a, integers) for a in stored)


def test_a_layer_makes_up_for_what_the_layers_before_lose() -> None:
    text = "g (float[1,4,9,9] x) => (float[1,6,7,7] y) { h = Conv(x, v) y = Conv(h, w) }"
    model = graph_text(text, v=weights(6, 4, 3, 3), w=weights(6, 6, 1, 1))
    errors = []
    for compensate in (False, True):
        state = compiled(model, *BEFORE[:-1])
        clipped = state.params["h"]
        state.params["h"] = replace(clipped, scale=clipped.scale / 2)
        advance(state, ScaleWeights(), RoundWeights(samples=32, compensate=compensate), CorrectBias(), InsertQdq())
        emitted = ir.to_proto(state.graph)
        feeds = list(islice(state.calibration or (), 32))
        errors.append(sum(float(np.square(run(emitted, x)[0] - run(model, x)[0]).sum()) for x in feeds))
    assert errors[1] < 0.9 * errors[0]


def test_layers_with_many_weights_are_left_alone() -> None:
    text = "g (float[1,4,9,9] x) => (float[] y) { h = Conv(x, v) y = Conv(h, w) }"
    constants = {"v": weights(6, 4, 3, 3), "w": weights(8, 6, 1, 1)}
    state = compiled(graph_text(text, **constants), *BEFORE, RoundWeights(samples=4, largest=6))
    assert list(state.integers) == ["w"]
