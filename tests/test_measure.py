"""The comparison of a compiled model with the float model, and what it warns of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qcompiler import runtime
from qcompiler.compile import compile_model
from qcompiler.errors import UserError
from qcompiler.measure import WORST_SQNR, compare, warnings_of
from qcompiler.report import OutputMatch
from tests.support import model_from_text
from tests.test_cli import Run, folder, qcompile
from tests.test_compile import net, samples

__all__ = ["folder", "qcompile"]

WRONG = """
from dataclasses import dataclass
from typing import ClassVar
import onnx_graphsurgeon as gs
from qcompiler.plugin import Plugin
from qcompiler.state import Phase

@dataclass(frozen=True)
class Spoil:
    name: ClassVar[str] = "spoil"
    requires: ClassVar = Phase.FLOAT
    establishes: ClassVar = None

    def run(self, state):
        nodes = [n for n in state.graph.nodes if n.op in ("Conv", "Gemm", "MatMul") and isinstance(n.inputs[1], gs.Constant)]
        for node in nodes:
            node.inputs[1].values = -node.inputs[1].values
        return 0

PLUGIN = Plugin("wrong", passes=(Spoil,))
"""


def both(before: str, after: str, x: np.ndarray, opset: int = 17) -> OutputMatch:
    a, b = (runtime.session(model_from_text(text, opset=opset)) for text in (before, after))
    return compare(a, b, [{"x": x}])[0]


def test_an_output_that_is_near_enough() -> None:
    found = both(
        "g (float[4] x) => (float[4] y) { y = Abs(x) }",
        "g (float[4] x) => (float[4] y) { y = Relu(x) }",
        np.array([1, -0.1, 2, 3], np.float32),
    )
    assert found == OutputMatch("y", 31.46, 0.75)
    assert warnings_of([found]) == []


def test_an_output_that_is_far() -> None:
    found = both(
        "g (float[2] x) => (float[2] y) { y = Abs(x) }",
        "g (float[2] x) => (float[2] y) { y = Relu(x) }",
        np.array([-1, -1], np.float32),
    )
    assert warnings_of([found]) == ["output 'y' is far from the float model's: 0.0 dB, below 10 dB"]


def test_values_that_are_not_finite() -> None:
    found = both(
        "g (float[3] x) => (float[3] y) { y = Abs(x) }",
        "g (float[3] x) => (float[3] y) { y = Log(x) }",
        np.array([-1, 0, np.inf], np.float32),
    )
    assert found == OutputMatch("y", WORST_SQNR, 0.333333, 2)
    assert json.loads(json.dumps(found.sqnr)) == WORST_SQNR
    assert warnings_of([found]) == ["output 'y' has 2 values that are inf or NaN, unlike the float model's"]


def test_nan_on_both_sides_is_equal() -> None:
    text = "g (float[2] x) => (float[2] y) { y = Log(x) }"
    assert both(text, text, np.array([-1, 1], np.float32)) == OutputMatch("y", None, 1.0)


def test_another_shape_is_not_equal() -> None:
    found = both(
        "g (float[4] x) => (int64[1,n] y) { y = NonZero(x) }",
        "g (float[4] x) => (int64[1,n] y) { z = Relu(x) y = NonZero(z) }",
        np.array([1, -1, 1, 0], np.float32),
    )
    assert found == OutputMatch("y", None, 0.0)
    assert warnings_of([found]) == ["output 'y' is far from the float model's: 0% of its elements are equal"]


def test_sequences_are_compared_element_by_element() -> None:
    text = "g (float[4] x) => (seq(float[n]) y) { z = %s(x) y = SplitToSequence(z) }"
    found = both(text % "Abs", text % "Relu", np.array([1, -1, 1, -1], np.float32))
    assert found == OutputMatch("y", 3.01, 0.5)


@pytest.fixture
def spoilt(folder: Path) -> list[str]:
    """Arguments with which the output is wrong."""
    (folder / "wrong.py").write_text(WRONG)
    pipeline = str(compile_model(net(), samples(4), level=1, compare=False).report.pipeline)
    return [
        "net.onnx",
        "--calib",
        "calib",
        "--load",
        "wrong.py",
        "--passes",
        pipeline.replace("insert-qdq", "spoil,insert-qdq"),
    ]


def test_the_summary_begins_with_warnings(qcompile: Run, spoilt: list[str]) -> None:
    code, out, err = qcompile(*spoilt)
    assert (code, err) == (0, "")
    assert out.splitlines()[1].startswith("  WARNING    output 'y' is far from the float model's: ")


def test_quiet_and_json_warn_on_stderr(qcompile: Run, spoilt: list[str]) -> None:
    code, out, err = qcompile(*spoilt, "-q")
    assert (code, out) == (0, "")
    assert err.startswith("warning: output 'y' is far from the float model's: ")
    assert len(err.splitlines()) == 2, "not even all of it in float helps"
    code, out, again = qcompile(*spoilt, "--json")
    assert (code, again) == (0, err)
    assert [f"warning: {w}" for w in json.loads(out)["warnings"]] == err.splitlines()


def test_a_good_model_is_quiet(qcompile: Run) -> None:
    assert qcompile("net.onnx", "--calib", "calib", "-q") == (0, "", "")


def test_a_float_model_that_does_not_run_is_the_users_error() -> None:
    text = "g (float[4] x, int64[1] shape) => (float[n] y) { y = Reshape(x, shape) }"
    bad = [{"x": np.zeros(4, np.float32), "shape": np.array([3])}]
    with pytest.raises(UserError, match="ONNX Runtime does not run the model"):
        compile_model(model_from_text(text), bad)
