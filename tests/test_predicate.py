from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from qcompiler.errors import UserError
from qcompiler.predicate import CommandFails, Expression, Inaccurate
from tests.support import model_from_text, random_feeds

METRICS = {"sqnr": 25.0, "cosine": 0.99, "max_error": 0.5, "agreement": 0.9}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("sqnr < 20", False),
        ("sqnr < 26", True),
        ("20 <= sqnr < 25", False),
        ("20 <= sqnr <= 25", True),
        ("sqnr < 20 or agreement < 0.95", True),
        ("sqnr < 30 and agreement < 0.8", False),
        ("not (cosine > 0.9)", False),
        ("max_error != 0.5", False),
        ("max_error == 0.5 and sqnr > -1", True),
    ],
)
def test_expressions_compare_metrics(text: str, holds: bool) -> None:
    assert Expression(text).holds(METRICS) is holds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sqnr",
        "sqnr <",
        "psnr < 20",
        "sqnr < 20 or psnr > 1",
        "True or psnr",
        "sqnr < '20'",
        "sqnr < True",
        "sqnr in cosine",
        "__import__('os').system('true') < 1",
        "sqnr + 1 < 20",
        "(lambda: 1)() < 2",
        "sqnr < 20; 1",
        "(" * 5000,
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--fails"):
        Expression(text)


def test_agreement_needs_an_output_of_classes() -> None:
    with pytest.raises(UserError, match="no output has the shape"):
        Expression("agreement < 1").holds({"sqnr": 1.0})


def scaled(factor: float) -> Inaccurate:
    reference = model_from_text("g (float[4] x) => (float[4] y) { y = Identity(x) }")
    return Inaccurate(Expression("sqnr < 20"), reference, [random_feeds(reference)])


@pytest.mark.parametrize(("factor", "fails"), [(1.05, False), (1.2, True)])
def test_a_model_is_inaccurate_against_the_float_model(factor: float, fails: bool) -> None:
    text = "g (float[4] x) => (float[4] y) { y = Mul(x, f) }"
    model = model_from_text(text, {"f": np.float32(factor)})
    verdict = scaled(factor)(model)
    assert (verdict is not None) is fails
    if verdict:
        assert verdict.startswith("sqnr 13.979")


def test_a_model_that_does_not_run_fails() -> None:
    model = model_from_text("g (float[4] x) => (float[4] y) { y = Neg(x) }")
    model.graph.node[0].op_type = "NoSuchOperator"
    assert "ONNX Runtime" in (scaled(1)(model) or "")


def test_a_command_gets_the_file_and_decides_by_its_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "check it.py"
    script.write_text("import onnx, sys; sys.exit(onnx.load(sys.argv[1]).graph.node[0].op_type == 'Neg')")
    fails = CommandFails(f"{sys.executable} '{script}' {{model}}")
    assert fails(model_from_text("g (float[4] x) => (float[4] y) { y = Neg(x) }")) == "the command exits with 1"
    assert fails(model_from_text("g (float[4] x) => (float[4] y) { y = Abs(x) }")) is None


@pytest.mark.parametrize("command", ["true", "{model}", "", "check '{model}"])
def test_a_command_that_cannot_work_is_refused(command: str) -> None:
    with pytest.raises(UserError, match="--fails-cmd"):
        CommandFails(command)


def test_a_command_that_does_not_exist_is_the_users_error() -> None:
    with pytest.raises(UserError, match="cannot run 'no-such-program'"):
        CommandFails("no-such-program {model}")(model_from_text("g (float[4] x) => (float[4] y) { y = Neg(x) }"))
