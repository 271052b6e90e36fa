from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qcompiler import cli
from qcompiler.compare import Comparison, compare, load_compiled
from qcompiler.compile import compile_model
from qcompiler.data import as_source
from qcompiler.errors import UserError
from qcompiler.load import input_specs, load_model
from tests.support import model_from_text, random_feeds, run

MODELS = Path(__file__).parents[1] / "models"
DIGITS, CALIB = MODELS / "digits_resnet.onnx", MODELS / "mnist_calib"

TEXT = """
g (float[1,4,8,8] x) => (float[1,4] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    b = Relu(a)
    c = Conv<pads=[1,1,1,1]>(b, w2)
    d = Add(b, c)
    e = GlobalAveragePool(d)
    f = Flatten(e)
    y = Gemm(f, w3)
}
"""


def small() -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    weights = {k: rng.standard_normal((4, 4, 3, 3)).astype(np.float32) / 3 for k in ("w1", "w2")}
    others = {"b1": rng.standard_normal(4).astype(np.float32), "w3": rng.standard_normal((4, 4)).astype(np.float32)}
    return model_from_text(TEXT, {**weights, **others})


def compiled(model: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
    samples = [random_feeds(model, seed) for seed in range(8)]
    return compile_model(model, samples, compare=False, **options).model


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "digits.int8.onnx"
    compile_model(DIGITS, CALIB, output=path, samples=24, compare=False)
    return path


def compare_digits(int8: onnx.ModelProto) -> Comparison:
    model = load_model(DIGITS)
    return compare(model, int8, as_source(CALIB, input_specs(model), None, 4))


def rescale(model: onnx.ModelProto, node: onnx.NodeProto, position: int, factor: float) -> None:
    """Multiply the constant that a node reads at a position."""
    constant = next(t for t in model.graph.initializer if t.name == node.input[position])
    constant.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(constant) * np.float32(factor)), constant.name))


def test_every_layer_is_there_in_order() -> None:
    model = small()
    result = compare(model, compiled(model), [random_feeds(model, 9)])
    assert [(r.tensor, r.layer, r.op) for r in result.layers] == [
        ("x", "x", "quantize"),
        ("b", "Conv_a", "Conv"),
        ("c", "Conv_c", "Conv"),
        ("d", "Add_d", "Add"),
        ("e", "GlobalAveragePool_e", "GlobalAveragePool"),
        ("f", "Flatten_f", "Flatten"),
        ("y", "Gemm_y", "Gemm"),
    ]
    assert result.layers[1].layers == ("Conv_a", "Relu_b")
    assert result.layers[1].kernels == ("QLinearConv",)
    assert result.skipped == {}
    assert all(r.float_ms is None and r.int8_ms is None for r in result.layers)


def test_errors_are_those_of_the_tensors() -> None:
    model = small()
    int8 = compiled(model)
    feeds = random_feeds(model, 9)
    result = compare(model, int8, [feeds])
    (x,), (y,) = run(model, feeds), run(int8, feeds)
    noise = np.sum((x.astype(float) - y) ** 2)
    assert result.outputs[0].error.sqnr == pytest.approx(10 * np.log10(np.sum(x.astype(float) ** 2) / noise), abs=2e-3)
    assert result.layers[-1].accumulated == result.outputs[0].error
    first = result.layers[0]  # the input has no layers before it
    assert first.local == first.accumulated
    table = json.loads(next(p.value for p in int8.metadata_props if p.key == "qcompiler.tensors"))
    scale = next(scale for source, scale, _ in table.values() if source == "x")
    assert first.local.max_error <= scale * 0.5001 or first.local.max_error > np.abs(feeds["x"]).max() - 255 * scale


@pytest.mark.parametrize("emit", ["qdq", "integer"])
def test_all_forms_have_the_same_errors(emit: str) -> None:
    model = small()
    samples = [random_feeds(model, seed) for seed in (9, 10)]
    kernels, other = compare(model, compiled(model), samples), compare(model, compiled(model, emit=emit), samples)
    assert {r.tensor: (r.accumulated, r.local, r.layers) for r in other.layers} == {
        r.tensor: (r.accumulated, r.local, r.layers) for r in kernels.layers
    }
    assert other.outputs == kernels.outputs


@pytest.mark.parametrize("victim", [0, 2, -1])
def test_a_mis_scaled_layer_ranks_first_and_alone(digits: Path, victim: int) -> None:
    model = load_compiled(digits)
    good = {r.tensor: r for r in compare_digits(model).layers}
    node = [n for n in model.graph.node if n.op_type == "QLinearConv"][victim]
    rescale(model, node, 6, 1.5)  # the scale of its output
    bad = compare_digits(model)
    worst = bad.ranked("local")[0]
    provenance = json.loads(next(p.value for p in model.metadata_props if p.key == "qcompiler.provenance"))
    assert worst.layers == tuple(provenance[node.name])
    assert worst.local.sqnr is not None
    assert worst.local.sqnr < 15
    others = [r for r in bad.layers if r is not worst]
    assert [r.local for r in others] == [good[r.tensor].local for r in others]
    assert bad.outputs[0].error.sqnr is not None


def test_time_goes_to_layers_of_both_models(digits: Path) -> None:
    model = load_model(DIGITS)
    source = as_source(CALIB, input_specs(model), None, 1)
    result = compare(model, load_compiled(digits), source, seconds=0.1)
    assert all(r.int8_ms is not None and r.int8_ms > 0 for r in result.layers)
    convolutions = [r for r in result.layers if r.op == "Conv"]
    assert all(r.float_ms is not None and r.float_ms > 0 for r in convolutions)
    assert result.float_ms is not None
    assert result.int8_ms is not None
    assert sum(r.float_ms or 0 for r in result.layers) <= result.float_ms
    assert sum(r.int8_ms or 0 for r in result.layers) <= result.int8_ms
    slower = [(r.float_ms or 0) - (r.int8_ms or 0) for r in result.ranked("latency")]
    assert slower == sorted(slower)


def test_layers_without_names_are_matched() -> None:
    model = small()
    for node in model.graph.node:
        node.name = ""
    result = compare(model, compiled(model), [random_feeds(model, 9)], seconds=0.02)
    assert [r.op for r in result.layers] == ["quantize", "Conv", "Conv", "Add", "GlobalAveragePool", "Flatten", "Gemm"]
    assert sum(r.float_ms is not None for r in result.layers) >= 2


def test_an_activation_that_saturates_late_is_one_layer_with_its_convolution() -> None:
    text = "g (float[1,4,8,8] x) => (float[1,4,8,8] y) { a = Conv(x, w)  b = Clip(a, low, high)  y = Conv(b, w) }"
    arrays = {"w": np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1), "low": np.float32(-1), "high": np.float32(1)}
    model = model_from_text(text, arrays)
    result = compare(model, compiled(model), [random_feeds(model, 9)])
    assert [r.tensor for r in result.layers] == ["x", "b", "y"]
    assert all(r.local.sqnr is not None and r.local.sqnr > 30 for r in result.layers)


def test_values_that_all_readers_take_for_the_same_are_no_error() -> None:
    text = "g (float[1,4,8,8] x) => (float[1,4,8,8] y) { a = Conv(x, w)  b = HardSwish(a)  y = Conv(b, w) }"
    model = model_from_text(text, {"w": 9 * np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1)})
    int8 = compiled(model, target="integer")
    table = json.loads(next(p.value for p in int8.metadata_props if p.key == "qcompiler.tensors"))
    assert [entry[3:] for entry in table.values() if entry[0] == "a"] == [[-3.0, None]]
    result = compare(model, int8, [random_feeds(model, 9)])
    error = next(r for r in result.layers if r.tensor == "a").local
    assert error.sqnr is not None
    assert error.sqnr > 30


def test_float_layers_between_integers_are_compared() -> None:
    text = "g (float[1,4,8,8] x) => (float[1,4,8,8] y) { a = Conv(x, w)  b = Softplus(a)  y = Conv(b, w) }"
    model = model_from_text(text, {"w": np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1)})
    result = compare(model, compiled(model, keep_float=["Softplus_b"]), [random_feeds(model, 9)])
    assert "Softplus_b" in {layer for r in result.layers for layer in r.layers}
    assert all(r.local.sqnr is None or r.local.sqnr > 25 for r in result.layers)


def test_rows_and_scaled_tensors_are_compared() -> None:
    text = """g (float[2,4,6] x) => (float[2,2,4,4] y) {
        n = Tanh(x)
        p = MatMul(n, w)
        s = Add(p, row)
        r = Reshape(s, heads)
        t = Transpose<perm=[0,2,1,3]>(r)
        k = Div(t, four)
        u = Transpose<perm=[0,1,3,2]>(k)
        y = MatMul(k, u)
    }"""
    rng = np.random.default_rng(2)
    arrays = {"w": rng.standard_normal((6, 6)), "row": rng.standard_normal(6), "four": np.array(4)}
    floats = {name: array.astype(np.float32) for name, array in arrays.items()}
    model = model_from_text(text, {**floats, "heads": np.array([2, 4, 2, 3])})
    result = compare(model, compiled(model), [random_feeds(model, 9)])
    assert result.skipped == {}
    rows = {r.tensor: r for r in result.layers}
    assert rows["n"].op == "quantize"
    assert rows["r"].op == "MatMul"
    assert all(r.local.sqnr is not None and r.local.sqnr > 30 for r in result.layers)


def test_another_float_model_is_refused(digits: Path) -> None:
    with pytest.raises(UserError, match="not made from this float model"):
        compare(small(), load_compiled(digits), [])
    with pytest.raises(UserError, match="not made from this float model"):
        other = load_model(DIGITS)
        kept = {v.name for v in (*other.graph.input, *other.graph.output)}
        for node in other.graph.node:
            node.input[:] = [name if name in kept else f"other_{name}" for name in node.input]
            node.output[:] = [name if name in kept else f"other_{name}" for name in node.output]
        compare(other, load_compiled(digits), [])


def test_models_of_other_makers_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="compile it with this version"):
        load_compiled(DIGITS)
    broken = tmp_path / "x.onnx"
    broken.write_bytes(b"\xff\xff\xff")
    with pytest.raises(UserError, match=r"x\.onnx"):
        load_compiled(broken)
    with pytest.raises(UserError, match="no such model file"):
        load_compiled(tmp_path / "none.onnx")


def test_the_command_prints_a_table(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", str(DIGITS), str(digits), "--calib", str(CALIB), "--samples", "2"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--no-latency", "--top", "3"])
    assert stop.value.code == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["layer", "op", "local", "accumulated"]
    decibels = [float(row.split()[2]) for row in rows[:3]]
    assert decibels == sorted(decibels)
    assert re.fullmatch(r"3 of \d+ layers, 2 samples", rows[3])
    assert rows[4].startswith("output logits: SQNR ")
    assert "top-1 agreement" in rows[4]


def test_the_command_gives_json(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", str(DIGITS), str(digits), "--calib", str(CALIB), "--samples", "2", "--json"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--no-latency", "--sort", "accumulated", "--top", "2"])
    assert stop.value.code == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["layers"]) == 2
    assert data["layers"][0]["accumulated"]["sqnr"] <= data["layers"][1]["accumulated"]["sqnr"]
    assert data["samples"] == 2


def test_the_command_needs_data(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", str(DIGITS), str(digits)])
    assert stop.value.code == 2
    assert "--calib" in capsys.readouterr().err


def test_a_model_in_which_nothing_is_quantized_has_no_layers() -> None:
    model = small()
    found = compare(model, compiled(model, keep_float=["*"]), [random_feeds(model)])
    assert found.layers == []
    assert all(output.error.sqnr is None or output.error.sqnr > 80 for output in found.outputs)


def test_layers_with_added_channels_are_compared() -> None:
    """pad-channels makes 32 of the 24 channels that a depthwise convolution has."""
    text = """g (float[1,4,12,12] x) => (float[1,8,12,12] y) {
        a = Conv(x, w)
        c = Conv<pads=[1,1,1,1], group=24>(a, d)
        r = Relu(c)
        y = Conv(r, v)
    }"""
    rng = np.random.default_rng(8)
    shapes = {"w": (24, 4, 1, 1), "d": (24, 1, 3, 3), "v": (8, 24, 1, 1)}
    model = model_from_text(text, {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()})
    int8 = compiled(model, optimize="size")
    assert [32, 1, 3, 3] in [i.dims for i in int8.graph.initializer]
    result = compare(model, int8, [random_feeds(model, 9)])
    assert {layer.tensor for layer in result.layers} == {"x", "a", "r", "y"}
    assert not any("shape" in reason for reason in result.skipped.values())
    assert all((layer.local.sqnr or 99) > 25 for layer in result.layers)
