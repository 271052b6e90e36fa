"""Modes: pipelines that need no data, and options that make no sense with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from qcompiler_passes import MODES

from qcompiler import ir
from qcompiler.cli import cli
from qcompiler.compile import compile_model
from qcompiler.errors import UserError
from qcompiler.shapes import infer_shapes
from tests.support import model_from_text, ops_of, random_feeds, run

RNG = np.random.default_rng(0)
ROOT = Path(__file__).parent.parent


def net() -> onnx.ModelProto:
    weights = {"w": RNG.standard_normal((256, 256)).astype(np.float32) / 16, "b": np.ones(256, np.float32)}
    text = "g (float[N,256] x) => (float[N,256] y) { m = MatMul(x, w) a = Add(m, b) y = Relu(a) }"
    return model_from_text(text, weights)


@pytest.mark.parametrize(
    ("options", "op", "size", "sqnr", "how"),
    [
        ({"mode": "dynamic"}, "DynamicQuantizeMatMul", 0.3, 35, "dynamic"),
        ({"mode": "weight-only"}, "MatMulNBits", 0.2, 15, "int4 weights"),
        ({"mode": "weight-only", "bits": 8}, "MatMulNBits", 0.31, 35, "int8 weights"),
        ({"mode": "float16"}, "MatMul", 0.51, 55, "float16"),
    ],
)
def test_modes_need_no_data(options: dict[str, Any], op: str, size: float, sqnr: float, how: str) -> None:
    model = net()
    result = compile_model(model, **options)
    assert [name for name in ops_of(result.model) if name not in ("Cast", "Add")] == [op, "Relu"]
    assert result.model.ByteSize() < size * model.ByteSize()
    (layer,) = result.report.layers
    assert (layer.op, layer.quantized) == ("MatMul", True)
    assert dict(result.report.rows())[how] == "MatMul 1/1"
    feeds = random_feeds(model, dynamic=5)
    a, b = run(model, feeds)[0], run(result.model, feeds)[0]
    assert 10 * np.log10(np.square(a).sum() / np.square(a - b).sum()) > sqnr


def test_data_that_is_given_is_compared() -> None:
    report = compile_model(net(), RNG.standard_normal((8, 1, 256)).astype(np.float32), mode="dynamic").report
    assert report.outputs[0].sqnr is not None
    assert report.outputs[0].sqnr > 30


def test_a_model_without_layers_says_so() -> None:
    report = compile_model(model_from_text("g (float[4] x) => (float[4] y) { y = Relu(x) }"), mode="dynamic").report
    assert dict(report.rows())["quantized"] == "nothing: there is no layer to quantize"


def test_static_is_the_default_by_name() -> None:
    with pytest.raises(UserError, match="calibration data is missing"):
        compile_model(net(), mode="static")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "dinamic"}, "did you mean 'dynamic'"),
        ({"mode": "O3"}, "no mode is called 'O3'"),
        ({"mode": "dynamic", "level": 2}, r"mode dynamic is a pipeline of its own.*\(--mode and -O\)"),
        ({"mode": "dynamic", "passes": "cleanup"}, "--mode and --passes"),
        ({"mode": "dynamic", "emit": "qdq"}, r"mode dynamic has no pass insert-qdq.*\(--emit qdq\)"),
        ({"mode": "weight-only", "collector": "minmax"}, "mode weight-only has no pass calibrate"),
        ({"mode": "dynamic", "optimize": "size"}, "mode dynamic has no pass place"),
        ({"mode": "dynamic", "bits": 4}, "mode dynamic has no pass quantize-blocks"),
        ({"bits": 4}, "it is for mode weight-only"),
        ({"mode": "dynamic", "min_sqnr": 20}, "cannot be tuned"),
    ],
)
def test_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compile_model(net(), **options)


def test_quantized_models_are_refused() -> None:
    text = "g (float[N,256] x) => (float[N,256] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
    model = model_from_text(text, {"s": np.float32(0.1), "z": np.uint8(0)})
    with pytest.raises(UserError, match="the model is quantized already"):
        compile_model(model, mode="dynamic")


def test_explain_tells_what_a_mode_makes_of_a_layer(tmp_path: Path) -> None:
    onnx.save(net(), tmp_path / "net.onnx")
    result = CliRunner().invoke(cli, ["explain", str(tmp_path / "net.onnx"), "MatMul_m", "--mode", "dynamic"])
    assert result.exit_code == 0
    assert "quantize-dynamic    MatMul -> com.microsoft.DynamicQuantizeMatMul, together with Add_a" in result.output
    assert "becomes     com.microsoft.DynamicQuantizeMatMul" in result.output


def condenser(mode: str) -> onnx.ModelProto:
    """The model with attention condensers, compiled as a column of the document's table says."""
    model, calib = ROOT / "models/condenser.onnx", ROOT / "models/mnist_calib"
    if mode == "`static`":
        return compile_model(model, calib, compare=False).model
    if mode == "Q/DQ form":
        return compile_model(compile_model(model, calib, emit="qdq", compare=False).model, compare=False).model
    name, _, options = mode.replace("`", "").partition(", ")
    passes = MODES[name].replace("quantize-dynamic", f"quantize-dynamic{{{options}}}")
    return compile_model(model, passes=passes, compare=False).model


@pytest.mark.parametrize("column", range(1, 6))
def test_the_document_tells_what_runs_in_which_type(column: int) -> None:
    lines = (ROOT / "docs/modes.md").read_text().partition("\n| operator |")[2].split("\n\n")[0].splitlines()
    modes, *rows = [
        [cell.strip() for cell in f"{line}".strip("|").split("|")] for line in (f"operator |{lines[0]}", *lines[2:])
    ]
    graph = ir.from_proto(condenser(modes[column]))
    infer_shapes(graph)
    found = [f"{node.op} {node.outputs[0].dtype}" for node in graph.nodes]
    original = [node.op for node in ir.from_proto(onnx.load(ROOT / "models/condenser.onnx")).nodes]
    assert len(rows) == 8
    for row in rows:
        op, count = row[0].split(", ")
        assert original.count(op) >= int(count)
        if row[column] == "none":
            assert not any(name.startswith(f"{op} ") for name in found)
        else:
            assert found.count(row[column]) == int(count) or (op == "Mul" and row[column] in found)
