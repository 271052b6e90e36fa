"""quantize-blocks: MatMulNBits and GatherBlockQuantized hold what the float weights were, rounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qcompiler_passes.blockwise import pack, quantize_blocks
from qcompiler_passes.form_blocks import FormBlocks
from qcompiler_passes.quantize_blocks import QuantizeBlocks
from qcompiler_passes.targets import ORT_CPU

from qcompiler import ir
from qcompiler.errors import UserError
from qcompiler.instrument import Verify
from qcompiler.pipeline import Pipeline
from tests.support import model_from_text, ops_of, random_feeds, run, run_passes, state_of

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@given(st.integers(0, 99), st.sampled_from([4, 8]), st.integers(1, 70))
def test_blocks_are_near_the_weights(seed: int, bits: int, width: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((3, width)).astype(np.float32)
    integers, scales = quantize_blocks(rows, bits, 16)
    assert integers.shape == (3, -(-width // 16), 16)
    assert integers.min() >= -(2 ** (bits - 1))
    assert integers.max() < 2 ** (bits - 1)
    back = (integers * scales[..., None]).reshape(3, -1)
    assert not back[:, width:].any()
    plain = np.abs(rows).max() / (2 ** (bits - 1) - 1) / 2
    assert np.sqrt(np.square(back[:, :width] - rows).mean()) <= plain


def test_the_search_beats_the_widest_scale() -> None:
    rows = floats(64, 32)
    integers, scales = quantize_blocks(rows, 4, 32)
    widest = np.abs(rows).max(axis=1, keepdims=True) / 7
    plain = np.square(np.rint(rows / widest) * widest - rows).sum()
    assert np.square(integers[:, 0] * scales - rows).sum() < 0.8 * plain


def test_zeros_stay_zeros() -> None:
    integers, scales = quantize_blocks(np.zeros((2, 16), np.float32), 4, 16)
    assert not integers.any()
    assert np.isfinite(scales).all()


def test_two_integers_to_a_byte() -> None:
    np.testing.assert_array_equal(pack(np.array([[-8, 7, 0, 1]], np.int8), 4), [[0xF0, 0x98]])
    np.testing.assert_array_equal(pack(np.array([[-128, 127]], np.int8), 8), [[0, 255]])


@pytest.mark.parametrize(("bits", "least", "exact"), [(4, 15, True), (8, 38, True), (4, 15, False), (8, 35, False)])
@pytest.mark.parametrize("body", ["m = MatMul(x, w) y = Add(m, b)", "y = Gemm<transB=1>(x, w, b)"])
def test_products(body: str, bits: int, least: float, exact: bool) -> None:
    w = floats(48, 70) if "transB" in body else floats(70, 48)
    model = model_from_text(f"g (float[N,70] x) => (float[N,48] y) {{ {body} }}", {"w": w, "b": floats(48)})
    stage = QuantizeBlocks(bits=bits, least=1, exact=exact)
    after, state = run_passes(model, FormBlocks(), stage, target=ORT_CPU)
    assert stage.run(state) == 0
    assert ops_of(after) == ["MatMulNBits"]
    feeds = random_feeds(model, dynamic=5)
    a, b = run(model, feeds)[0], run(after, feeds)[0]
    assert 10 * np.log10(np.square(a).sum() / np.square(a - b).sum()) > least


@pytest.mark.parametrize(("bits", "least"), [(4, 17), (8, 40)])
def test_tables(bits: int, least: float) -> None:
    model = model_from_text("g (int64[N] i) => (float[N,48] y) { y = Gather(t, i) }", {"t": floats(9, 48)})
    after, state = run_passes(model, FormBlocks(), QuantizeBlocks(bits=bits, least=64), target=ORT_CPU)
    assert ops_of(after) == ["GatherBlockQuantized"]
    assert [block.quantized for block in state.blocks.values()] == [True]
    feeds = random_feeds(model, dynamic=5)
    a, b = run(model, feeds)[0], run(after, feeds)[0]
    assert 10 * np.log10(np.square(a).sum() / np.square(a - b).sum()) > least


@pytest.mark.parametrize("stage", [QuantizeBlocks(bits=3), QuantizeBlocks(block=24), QuantizeBlocks(block=8)])
def test_blocks_that_no_kernel_takes(stage: QuantizeBlocks) -> None:
    with pytest.raises(UserError, match=r"kernels take|power of 2"):
        stage.run(state_of(model_from_text("g (float[1] x) => (float[1] y) { y = Relu(x) }")))


@pytest.mark.parametrize(("op", "w"), [("MatMul(x, w)", (96, 64)), ("Gemm<transB=1, alpha=2.0>(x, w)", (64, 96))])
def test_data_lets_rounding_errors_cancel(op: str, w: tuple[int, int]) -> None:
    model = model_from_text(
        f"g (float[N,96] x) => (float[N,64] y) {{ h = {op} y = MatMul(h, v) }}", {"w": floats(*w), "v": floats(64, 64)}
    )
    mixed = floats(4, 96)
    samples = [{"x": floats(20, 4) @ mixed + floats(20, 96) / 10} for _ in range(24)]
    stage = QuantizeBlocks(least=1, exact=True)
    errors = []
    for data in (None, samples[:16]):
        state = state_of(model, ORT_CPU)
        state.calibration = data
        Pipeline((FormBlocks(), stage)).run(state, [Verify()])
        after = ir.to_proto(state.graph)
        assert ops_of(after) == ["MatMulNBits", "MatMulNBits"]
        errors.append(sum(np.square(run(model, s)[0] - run(after, s)[0]).sum() for s in samples[16:]))
    assert errors[1] < 0.5 * errors[0]
