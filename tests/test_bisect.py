from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest

from qcompiler import cli, ir
from qcompiler.bisect import Culprit, bisect
from qcompiler.errors import UserError
from qcompiler.job import Job, prepare
from qcompiler.pipeline import Pipeline
from qcompiler.plan import CompileOptions
from qcompiler.predicate import Expression, Inaccurate
from qcompiler.rewrite import Rewriter
from qcompiler.state import CompileState, Phase
from qcompiler.text import format_graph
from tests.support import model_from_text, random_feeds

LAYERS = 6

BROKEN = "g (float[1,4,8,8] x) => (float[N,4,8,8] z) { y = Conv<kernel_shape = [1, 1]>(x, w) z = Relu(y) }"
"""The weight has the wrong shape, on which passes rely."""

FLIP = '''
from dataclasses import dataclass
from typing import ClassVar

from qcompiler import ir
from qcompiler.plugin import Plugin
from qcompiler.rewrite import Rewriter
from qcompiler.state import CompileState, Phase


@dataclass(frozen=True)
class FlipBias:
    """Copy every bias, one of them with the wrong sign."""

    name: ClassVar[str] = "flip-bias"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        rewriter = Rewriter(state)
        for node in [n for n in state.graph.nodes if n.op == "Conv"]:
            if not rewriter.exhausted:
                bias = ir.array(node.inputs[2])
                rewriter.set_input(node, 2, rewriter.constant("copied", -bias if rewriter.count == 3 else bias))
                rewriter.count += 1
        return rewriter.finish()


PLUGIN = Plugin("flip", passes=(FlipBias,))
'''


def model() -> onnx.ModelProto:
    rng = np.random.default_rng(2)
    names = ["x", *(f"t{i}" for i in range(1, LAYERS)), "y"]
    body = "\n".join(f"{names[i + 1]} = Conv({names[i]}, w{i}, b{i})" for i in range(LAYERS))
    arrays = {f"b{i}": rng.standard_normal(4).astype(np.float32) for i in range(LAYERS)}
    arrays |= {f"w{i}": np.linalg.qr(rng.standard_normal((4, 4)))[0].reshape(4, 4, 1, 1) for i in range(LAYERS)}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    return model_from_text(f"g (float[1,4,6,6] x) => (float[1,4,6,6] y) {{ {body} }}", arrays)


def job(tmp_path: Path, passes: str = "normalize,flip-bias,cleanup") -> Job:
    plugin = tmp_path / "flip.py"
    plugin.write_text(FLIP)
    source = model()
    samples = [random_feeds(source, seed) for seed in range(12)]
    return prepare(source, samples, CompileOptions(passes=passes, load=[plugin]))


def find(work: Job, expression: str = "sqnr < 20") -> Culprit | None:
    assert work.split is not None
    return bisect(work, Inaccurate(Expression(expression), work.float_model, work.split.held_back))


def test_a_planted_wrong_rewrite_is_named(tmp_path: Path) -> None:
    culprit = find(job(tmp_path))
    assert culprit is not None
    assert (culprit.stage, culprit.position, culprit.rewrite, culprit.rewrites) == ("flip-bias", 2, 4, LAYERS)
    assert culprit.layers == ("Conv_t4",)
    removed, added, *constants = culprit.changes
    assert removed.startswith("- Conv_t4: t4 = Conv")
    assert added.startswith("+ Conv_t4: t4 = Conv")
    (constant,) = constants
    bias = next(t for t in model().graph.initializer if t.name == "b3")
    values = onnx.numpy_helper.to_array(bias)
    worst = int(np.abs(values).argmax())
    assert constant.startswith(f"  input 2: 4 of 4 values differ, most at [{worst}]: {values[worst]:.6g} ->")
    assert culprit.failure.startswith("sqnr ")
    assert culprit.pipeline == "flip-bias"


def test_the_job_is_not_changed(tmp_path: Path) -> None:
    work = job(tmp_path)
    before = format_graph(work.state.graph)
    assert find(work) == find(work)
    assert format_graph(work.state.graph) == before
    assert work.state.rewrite_limit is None


def test_a_pass_that_is_wrong_amid_the_default_pipeline_is_found_and_the_rest_left_out(tmp_path: Path) -> None:
    default = prepare(model(), [random_feeds(model())], CompileOptions()).pipeline
    text = str(default).replace("annotate,", "flip-bias,annotate,")
    culprit = find(job(tmp_path, text))
    assert culprit is not None
    assert (culprit.stage, culprit.rewrite, culprit.pipeline) == ("flip-bias", 4, "flip-bias")


def test_a_model_that_does_not_fail_has_no_culprit(tmp_path: Path) -> None:
    assert find(job(tmp_path, "normalize,cleanup")) is None


def test_quantization_is_bisected_by_tensor(tmp_path: Path) -> None:
    work = job(tmp_path, "normalize,form-blocks,annotate,calibrate,align-scales,scale-weights,insert-qdq")
    culprit = find(work, "max_error > 0")
    assert culprit is not None
    assert (culprit.stage, culprit.rewrite) == ("insert-qdq", 1)
    assert any("QuantizeLinear" in line for line in culprit.changes)
    assert culprit.pipeline.endswith("scale-weights,insert-qdq")


QUANTIZE = "form-blocks,annotate,calibrate,align-scales,scale-weights,{}insert-qdq"


def test_a_wrong_pass_before_quantization_is_found_by_leaving_it_out(tmp_path: Path) -> None:
    culprit = find(job(tmp_path, f"normalize,{QUANTIZE.format('flip-bias,')},lower-integer,cleanup"))
    assert culprit is not None
    assert (culprit.stage, culprit.rewrite, culprit.rewrites, culprit.layers) == ("flip-bias", 4, LAYERS, ("Conv_t4",))
    assert culprit.pipeline == "flip-bias"


def test_a_pass_that_prepares_for_quantization_is_not_blamed_for_it(tmp_path: Path) -> None:
    culprit = find(job(tmp_path, f"normalize,{QUANTIZE.format('correct-bias,')},cleanup"), "max_error > 0")
    assert culprit is not None
    assert culprit.stage == "insert-qdq"


def test_a_failing_float_model_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fails before any pass"):
        find(job(tmp_path), "sqnr > 0")


@dataclass(frozen=True)
class Scale:
    """Double the last weight at once, whatever the limit; break if asked to."""

    breaks_at: int = 0

    name: ClassVar[str] = "scale"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        rewriter = Rewriter(state)
        for i, node in enumerate([n for n in state.graph.nodes if n.op == "Conv"], 1):
            if self.breaks_at:
                if rewriter.exhausted:
                    break
                if i == self.breaks_at:
                    raise ValueError("no such thing")
            elif i == LAYERS:
                rewriter.set_input(node, 1, rewriter.constant("doubled", 2 * ir.array(node.inputs[1])))
            rewriter.count += 1
        return rewriter.finish()


def with_pass(work: Job, *stages: Scale) -> Job:
    return Job(work.state, Pipeline((*work.pipeline.passes, *stages)), work.float_model, work.split, work.registry)


def test_a_pass_without_single_rewrites_counts_as_one(tmp_path: Path) -> None:
    culprit = find(with_pass(job(tmp_path, "normalize"), Scale()))
    assert culprit is not None
    assert (culprit.stage, culprit.rewrite, culprit.layers) == ("scale", None, ("Conv_y",))


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_pass_that_breaks_is_bisected_too(tmp_path: Path, at: int) -> None:
    culprit = find(with_pass(job(tmp_path, "normalize"), Scale(at)))
    assert culprit is not None
    assert culprit.stage == f"scale{{breaks_at={at}}}"
    assert culprit.failure.startswith("pass scale")
    assert culprit.failure.endswith("ValueError: no such thing")
    assert culprit.rewrite == at
    assert culprit.pipeline == culprit.stage


def test_damage_that_a_later_pass_mends_is_none(tmp_path: Path) -> None:
    work = job(tmp_path, "normalize,flip-bias,flip-bias")
    assert find(work) is None


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    source = model()
    onnx.save(source, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=np.concatenate([random_feeds(source, i)["x"] for i in range(12)]))
    (tmp_path / "flip.py").write_text(FLIP)
    files = ["--calib", str(tmp_path / "x.npz"), "--load", str(tmp_path / "flip.py")]
    return ["bisect", str(tmp_path / "m.onnx"), *files]


def command(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return stop.value.code


def test_the_command_names_the_culprit_and_saves_the_pipeline(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "pipeline.txt"
    options = ["--passes", "normalize,fold-bias,flip-bias", "--fails", "sqnr < 20", "-o", str(saved)]
    assert command([*arguments, *options]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["pass      flip-bias (number 3)", f"rewrite   4 of {LAYERS}"]
    assert lines[3] == "layers    Conv_t4"
    assert lines[-1] == f"pipeline  flip-bias (saved in {saved})"
    assert saved.read_text() == "flip-bias\n"


def test_the_command_gives_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command([*arguments, "--passes", "normalize,flip-bias", "--fails", "sqnr < 20", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["culprit"]["rewrite"] == 4


def test_the_command_says_that_nothing_fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command([*arguments, "--fails", "sqnr < 5"]) == 0
    assert capsys.readouterr().out == "the compiled model does not fail\n"


def test_a_command_can_decide(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = tmp_path / "check.py"
    check.write_text("import sys; sys.exit(b'copied_4' in open(sys.argv[1], 'rb').read())")
    options = ["--passes", "normalize,flip-bias", "--fails-cmd", f"{sys.executable} {check} {{model}}"]
    assert command([*arguments, *options]) == 1
    assert "rewrite   5 of 6" in capsys.readouterr().out


@pytest.mark.parametrize("extra", [[], ["--fails", "sqnr < 1", "--fails-cmd", "x {model}"], ["--fails", "import os"]])
def test_wrong_use_is_the_users_error(
    arguments: list[str], extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command([*arguments, *extra]) == 2
    assert "--fails" in capsys.readouterr().err


def broken() -> onnx.ModelProto:
    return model_from_text(BROKEN, {"w": np.ones(4, np.float32)})


def test_a_model_that_does_not_run_is_not_the_fault_of_a_pass() -> None:
    data = [np.ones((1, 4, 8, 8), np.float32)]
    prepared = prepare(broken(), data, CompileOptions())
    with pytest.raises(UserError, match="X num_dims does not match W num_dims"):
        bisect(prepared, lambda model: None)
    assert prepared.split is not None
    with pytest.raises(UserError, match=r"does not run the model.*\(the float model\)"):
        Inaccurate(Expression("sqnr < 20"), broken(), prepared.split.held_back)
