"""Means of channels against NumPy."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qcompiler import relay
from qcompiler.channel_means import ChannelMeans, Channels
from qcompiler.collectors import MinMax
from qcompiler.observe import observe
from tests.support import model_from_text

TEXT = """g (float[N,3,12,10] x) => (float[N,5] y) {
    c = Conv (x, w)
    r = Relu (c)
    p = GlobalAveragePool (r)
    f = Flatten (p)
    y = Gemm (f, v)
}"""
RNG = np.random.default_rng(0)
W = RNG.standard_normal((8, 3, 1, 1)).astype(np.float32)
V = RNG.standard_normal((8, 5)).astype(np.float32)
SAMPLES = [{"x": RNG.standard_normal((1, 3, 12, 10)).astype(np.float32)} for _ in range(6)]
CHANNELS = [
    Channels("c", 8, (4, 3), low=-0.5, high=0.25),
    Channels("r", 8, (1, 1), low=0.0, clipped=True),
    Channels("y", 5, ()),
]


def model(opset: int = 18) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(model_from_text(TEXT, {"w": W, "v": V}, opset))


def measured(samples: int, opset: int = 18, workers: int = 1) -> dict[str, np.ndarray]:
    means = ChannelMeans(CHANNELS, samples)
    observe(model(opset), ["c", "r", "y"], SAMPLES, MinMax, means=means, workers=workers)
    return means.finish()


def conv(sample: dict[str, np.ndarray]) -> np.ndarray:
    return np.einsum("oi,nihw->nohw", W[:, :, 0, 0], sample["x"])


@pytest.mark.parametrize("opset", [17, 18])
def test_means_are_those_of_each_sample_within_the_bounds_at_the_positions_that_count(opset: int) -> None:
    found = measured(6, opset)
    for i, sample in enumerate(SAMPLES):
        inner = np.clip(conv(sample)[:, :, ::4, ::3], -0.5, 0.25)
        rectified = np.maximum(conv(sample), 0).mean(axis=(0, 2, 3))
        np.testing.assert_allclose(found["c"][i], inner.mean(axis=(0, 2, 3)), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found["r"][i], rectified, rtol=1e-4)
        np.testing.assert_allclose(found["y"][i], rectified @ V, rtol=1e-4)


def test_only_the_first_samples_are_kept_in_order_whoever_runs_them() -> None:
    alone, team = measured(6), measured(4, workers=2)
    for name, means in team.items():
        assert means.dtype == np.float32
        np.testing.assert_array_equal(means, alone[name][:4])


def test_sections_of_a_long_model_give_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(6)
    monkeypatch.setattr("qcompiler.observe.SECTION", 6)
    assert len(relay.split(model(), 2)) > 1
    parts = measured(6)
    assert list(parts) == list(whole)
    for name, means in parts.items():
        np.testing.assert_allclose(means, whole[name], rtol=1e-5)
