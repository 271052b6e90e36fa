"""What the benchmark of modes compares."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from qcompiler_passes.targets import ORT_CPU

from qcompiler.plugin import load_registry
from tests.support import model_from_text, ops_of, run

SCRIPT = Path(__file__).parent.parent / "benchmarks/modes.py"
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def modes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("modes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["modes"] = module
    spec.loader.exec_module(module)
    return module


def net() -> onnx.ModelProto:
    text = """g (float[1,16,8,8] x) => (float[1,16,8,8] y) {
        c = Conv(x, w) b = BatchNormalization(c, s, s, s, s) r = Relu(b) y = Conv(r, v)
    }"""
    arrays = {name: RNG.standard_normal((16, 16, 1, 1)).astype(np.float32) for name in ("w", "v")}
    return model_from_text(text, {**arrays, "s": np.ones(16, np.float32)})


@pytest.mark.parametrize(
    ("what", "floats"),
    [
        ("static", []),
        ("static, not fused", ["BatchNormalization", "Relu"]),
        ("static, symmetric activations", []),
        ("static, weights per tensor", []),
        ("its Q/DQ form, compiled again without data", []),
    ],
)
def test_static_variants(modes: ModuleType, tmp_path: Path, what: str, floats: list[str]) -> None:
    model = net()
    onnx.save(model, tmp_path / "net.onnx")
    samples = RNG.standard_normal((8, 1, 16, 8, 8)).astype(np.float32)
    np.save(tmp_path / "calib.npy", samples)
    compilers = modes.variants(load_registry(), tmp_path / "calib.npy")
    after = compilers[what](tmp_path / "net.onnx", {"compare": False})
    ops = ops_of(after)
    assert ops.count("QLinearConv") == 2
    assert [op for op in ops if op in ("BatchNormalization", "Conv", "Relu")] == floats
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in after.graph.initializer}
    first = next(n for n in after.graph.node if n.op_type == "QLinearConv")
    assert constants[first.input[4]].size == (1 if what == "static, weights per tensor" else 16)
    if not floats:
        assert int(constants[first.input[7]]) == (128 if what == "static, symmetric activations" else 0)
    a, b = run(model, {"x": samples[0]})[0], run(after, {"x": samples[0]})[0]
    assert 10 * np.log10(np.square(a).sum() / np.square(a - b).sum()) > 20


def test_symmetric_is_a_value_of_the_target(modes: ModuleType) -> None:
    assert modes.symmetric(ORT_CPU) == replace(ORT_CPU, activation=replace(ORT_CPU.activation, symmetric=True))
