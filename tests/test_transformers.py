"""Transformers as exporters write them, through the whole compiler."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompiler import compile_model
from qcompiler.compile import CompileResult
from tests.forms import ops_between
from tests.support import ops_of, run
from tests.swin import swin_model, swin_reference, swin_weights

MODELS = Path(__file__).parent.parent / "models"
SWIN = swin_weights()


def images(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(1, 3, 16, 16)).astype(np.float32)} for _ in range(count)]


def sqnr(model: onnx.ModelProto, compiled: onnx.ModelProto, samples: list[dict[str, np.ndarray]]) -> float:
    """How far the first output is from that of the float model, in dB."""
    wanted = np.stack([run(model, feeds)[0] for feeds in samples])
    noise = np.stack([run(compiled, feeds, optimize=True)[0] for feeds in samples]) - wanted
    return float(10 * np.log10((wanted**2).sum() / (noise**2).sum()))


def test_the_exported_swin_is_the_described_one() -> None:
    model = swin_model(SWIN)
    onnx.checker.check_model(model, full_check=True)
    for feeds in images(3):
        np.testing.assert_allclose(run(model, feeds)[0], swin_reference(feeds["x"], SWIN), rtol=1e-4, atol=1e-5)


def test_swin_on_ort_cpu() -> None:
    model = swin_model(SWIN)
    forms = {
        form: compile_model(model, images(16, 1), emit=form, level=1, optimize="size", compare=False).model
        for form in ("kernels", "integer", "qdq")
    }
    counts = Counter(ops_of(forms["kernels"]))
    assert (counts["LayerNormalization"], counts["Gelu"], counts["Softmax"]) == (9, 3, 3)
    assert not {"ReduceMean", "Pow", "Erf"} & set(counts)
    assert counts["QGemm"] + counts["MatMulIntegerToFloat"] == 14
    assert counts["MatMul"] == 6  # both of each attention: their factors are activations
    samples = images(8, 2)
    assert sqnr(model, forms["kernels"], samples) > 25
    for feeds in samples[:2]:
        first, *others = (run(form, feeds, optimize=True)[0] for form in forms.values())
        for other in others:
            np.testing.assert_array_equal(first, other)


def test_swin_in_integers() -> None:
    model = swin_model(SWIN)
    integer = compile_model(model, images(16, 1), target="integer", emit="integer", compare=False).model
    assert not ops_between(integer)
    assert sqnr(model, integer, images(8, 2)) > 18


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [400, 1, 28, 28] and their classes."""
    with np.load(MODELS / "mnist_test.npz") as rows:
        return rows["x"][:400, None].astype(np.float32) / np.float32(255), rows["y"][:400]


def tiny_vit(**options: object) -> CompileResult:
    return compile_model(MODELS / "tiny_vit.onnx", MODELS / "mnist_calib", samples=40, compare=False, **options)


def accuracy(model: onnx.ModelProto, digits: tuple[np.ndarray, np.ndarray]) -> float:
    """In percent."""
    return float(100 * (run(model, {"image": digits[0]}, optimize=True)[0].argmax(1) == digits[1]).mean())


def test_vision_transformer_on_ort_cpu(digits: tuple[np.ndarray, np.ndarray]) -> None:
    result = tiny_vit(level=1, optimize="size")
    before = accuracy(onnx.load(MODELS / "tiny_vit.onnx"), digits)
    assert accuracy(result.model, digits) >= before - 0.5
    counts = Counter(ops_of(result.model))
    assert (counts["QGemm"], counts["LayerNormalization"], counts["Gelu"], counts["Softmax"]) == (17, 9, 4, 4)
    assert not {"Erf", "Pow", "Sqrt", "ReduceMean"} & set(counts)
    assert counts["QuantizeLinear"] == 18  # queries, keys and values share one
    for form in ("integer", "qdq"):
        other = tiny_vit(emit=form, level=1, optimize="size").model
        for rows in np.split(digits[0][:100], 2):
            feeds = {"image": rows}
            np.testing.assert_array_equal(run(result.model, feeds, True)[0], run(other, feeds, True)[0])


def test_vision_transformer_in_integers(digits: tuple[np.ndarray, np.ndarray]) -> None:
    integer = tiny_vit(target="integer", emit="integer").model
    assert not ops_between(integer)
    assert accuracy(integer, digits) >= accuracy(onnx.load(MODELS / "tiny_vit.onnx"), digits) - 0.5


def test_vision_transformer_without_data(digits: tuple[np.ndarray, np.ndarray]) -> None:
    model = compile_model(MODELS / "tiny_vit.onnx", mode="dynamic").model
    assert accuracy(model, digits) >= accuracy(onnx.load(MODELS / "tiny_vit.onnx"), digits) - 0.5
    assert Counter(ops_of(model))["DynamicQuantizeMatMul"] == 16
