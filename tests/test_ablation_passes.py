"""Each pass of the default pipeline left out in turn: the float result stays, and the rest compiles or says what is missing."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qcompiler import ir, runtime
from qcompiler.compile import compile_model
from qcompiler.errors import UserError
from qcompiler.job import prepare
from qcompiler.pipeline import Pipeline, parse_pipeline
from qcompiler.plan import CompileOptions
from qcompiler.plugin import load_registry
from tests.nets import random_net
from tests.support import random_feeds

LAST_FLOAT_PASS = "form-blocks"
REGISTRY = load_registry()
DEFAULT = parse_pipeline(REGISTRY.pipelines["default"], REGISTRY.passes)
NAMES = list(dict.fromkeys(stage.name for stage in DEFAULT.passes))
FLOAT = [name for name in NAMES if name in {p.name for p in DEFAULT.until(LAST_FLOAT_PASS).passes}]
NEEDED = {
    "form-blocks": "needs phase fused",
    "annotate": "needs phase annotated",
    "calibrate": "needs phase calibrated",
    "scale-weights": "run scale-weights before",
    "insert-qdq": "needs phase qdq",
    "fold-scales": "needs phase integer",
}
"""Passes that others cannot do without -> what is said without them."""


def without(name: str) -> Pipeline:
    return Pipeline(tuple(stage for stage in DEFAULT.passes if stage.name != name))


@pytest.fixture(scope="module")
def net() -> onnx.ModelProto:
    return random_net(5, parts=6)


@pytest.mark.parametrize("name", [name for name in FLOAT if name != LAST_FLOAT_PASS])
def test_float_result_without(net: onnx.ModelProto, name: str) -> None:
    calibration = [random_feeds(net, seed) for seed in range(3)]
    job = prepare(net, calibration, CompileOptions(passes=str(without(name).until(LAST_FLOAT_PASS))))
    job.pipeline.run(job.state)
    original, changed = (runtime.session(m, optimize=False) for m in (net, ir.to_proto(job.state.graph)))
    for seed in (10, 11):
        feeds = random_feeds(net, seed)
        for x, y in zip(runtime.run(original, feeds), runtime.run(changed, feeds), strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-3, atol=1e-4 * float(np.abs(x).max()))


@pytest.mark.parametrize("name", NAMES)
def test_compilation_without(net: onnx.ModelProto, name: str) -> None:
    calibration = [random_feeds(net, seed) for seed in range(4)]
    try:
        report = compile_model(net, calibration, passes=str(without(name)), timed=False).report
    except UserError as error:
        assert NEEDED.get(name, "?") in str(error)
        assert "\n" not in str(error)
    else:
        assert name not in NEEDED
        assert not report.warnings
        assert any(layer.quantized for layer in report.layers)
