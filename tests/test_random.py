"""Random CNNs: the float passes keep what they compute, the quantized forms agree, and none is wrong without a warning.

More examples than the suite runs: `HYPOTHESIS_PROFILE=thorough python -m pytest tests/test_random.py`.
"""

from __future__ import annotations

import os

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings

from qcompiler import ir, runtime
from qcompiler.compile import compile_model
from qcompiler.job import prepare
from qcompiler.measure import SQNR_FLOOR, compare
from qcompiler.plan import CompileOptions
from qcompiler.runtime import Feeds
from tests.random_cnns import SIZE, cnns

PROFILES = {
    "suite": settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)),
    "thorough": settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck)),
}
PROFILE = PROFILES[os.environ.get("HYPOTHESIS_PROFILE", "suite")]


def samples(model: onnx.ModelProto, count: int) -> list[Feeds]:
    channels = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    rng = np.random.default_rng(count)
    return [{"x": rng.standard_normal((1, channels, SIZE, SIZE)).astype(np.float32)} for _ in range(count)]


@PROFILE
@given(model=cnns())
def test_float_passes_keep_the_function(model: onnx.ModelProto) -> None:
    job = prepare(model, samples(model, 4), CompileOptions(until="form-blocks"))
    job.pipeline.run(job.state)
    feeds = samples(model, 2)
    original, changed = (runtime.session(m, optimize=False) for m in (model, ir.to_proto(job.state.graph)))
    for sample in feeds:
        for x, y in zip(runtime.run(original, sample), runtime.run(changed, sample), strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-3, atol=2e-4 * max(float(np.abs(x).max()), 1e-6))


@PROFILE
@given(model=cnns())
def test_the_forms_are_bit_identical_and_near(model: onnx.ModelProto) -> None:
    calibration, feeds = samples(model, 8), samples(model, 3)
    kernels, *results = (
        compile_model(model, calibration, emit=emit, compare=False).model for emit in ("kernels", "integer", "qdq")
    )
    expected = [runtime.run(runtime.session(kernels), sample) for sample in feeds]
    for other in results:
        session = runtime.session(other)
        for sample, wanted in zip(feeds, expected, strict=True):
            for x, y in zip(wanted, runtime.run(session, sample), strict=True):
                np.testing.assert_array_equal(y, x)
    matches = compare(runtime.session(model), runtime.session(kernels), feeds)
    wrong = [m.name for m in matches if m.not_finite or (m.sqnr is not None and m.sqnr < SQNR_FLOOR - 6)]
    if wrong:
        report = compile_model(model, calibration, timed=False).report
        assert report.warnings or report.reached
