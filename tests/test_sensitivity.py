"""Sensitivity: single roundings, predictions against true compilations, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompiler import UserError, ir, runtime
from qcompiler.cli import main
from qcompiler.compile import compile_model
from qcompiler.job import Job, prepare
from qcompiler.plan import CompileOptions
from qcompiler.sensitivity import FloatModel, Sensitivity, before_qdq, sensitivity
from tests.support import model_from_text, run

NET = """
net (float[N,16,8,8] x) => (float[N,4] y, float[N,16,8,8] z) {
    c = Conv<pads = [1, 1, 1, 1]>(x, w, b)
    r = Relu(c)
    d = Conv<pads = [1, 1, 1, 1]>(r, u)
    s = Add(r, d)
    z = Conv(s, v)
    p = GlobalAveragePool(s)
    f = Flatten(p)
    y = Gemm(f, g, h)
}"""
SHAPES = {"w": (16, 16, 3, 3), "b": (16,), "u": (16, 16, 3, 3), "v": (16, 16, 1, 1), "g": (16, 4), "h": (4,)}


def net(outlier: float = 1.0) -> onnx.ModelProto:
    """`outlier`: the factor by which one output channel of the last Conv is larger."""
    rng = np.random.default_rng(0)
    arrays = {k: (rng.standard_normal(s) / np.sqrt(np.prod(s[1:]))).astype(np.float32) for k, s in SHAPES.items()}
    arrays["v"][0] *= outlier
    model = model_from_text(NET, arrays)
    for node in model.graph.node:
        node.name = f"/{node.output[0]}"
    return model


def samples(count: int = 200) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1, 16, 8, 8)).astype(np.float32)} for _ in range(count)]


def job(model: onnx.ModelProto, **options: object) -> Job:
    return prepare(model, samples(), CompileOptions(optimize="size", **options))  # type: ignore[arg-type]


def found(model: onnx.ModelProto, **options: object) -> Sensitivity:
    work = job(model, **options)
    assert work.split is not None
    return sensitivity(work.state, work.pipeline, work.split.spread(8))


def test_every_quantized_layer_is_ranked_worst_first() -> None:
    rows = found(net()).ranking()
    assert {row.layer[1:] for row in rows} == set("cdszpy")  # f passes on what is rounded already
    figures = [np.inf if row.sqnr is None else row.sqnr for row in rows]
    assert figures == sorted(figures)
    assert 0.5 < sum(row.cost for row in rows) <= 1
    by_name = {row.layer: row for row in rows}
    assert by_name["/s"].weights is None
    assert by_name["/d"].cost > by_name["/z"].cost  # nine taps against one


def test_a_harmful_layer_leads() -> None:
    rows = found(net(outlier=300)).ranking()
    assert rows[0].layer == "/z"
    assert rows[0].activations is not None
    assert rows[0].weights is not None
    assert rows[0].activations < rows[0].weights


@pytest.mark.parametrize("level", [0, 1, 2])
def test_predictions_come_near_the_truth(level: int) -> None:
    predicted = found(net(), level=level).sqnr()
    report = compile_model(net(), samples(), level=level, optimize="size").report
    true = min(o.sqnr for o in report.outputs if o.sqnr is not None)
    assert predicted == pytest.approx(true, abs=2)


def test_layers_in_float_make_no_noise() -> None:
    result = found(net(outlier=300))
    everything = list(result.layers)
    assert result.sqnr(everything) is None
    assert (result.noise(["/z"]) <= result.noise()).all()
    z = result.outputs.index("z")
    assert result.noise(["/z"])[z] < 0.8 * result.noise()[z]


def test_one_rounding_is_what_numpy_computes() -> None:
    """The weights of the last Conv, alone: its inputs are those of the float model."""
    work = job(net(), level=0)
    assert work.split is not None
    probes = work.split.spread(3)
    keeper = FloatModel()
    before_qdq(work.pipeline)[0].run(work.state, [keeper])
    node = next(n for n in work.state.graph.nodes if n.name == "/z")
    weights, params = ir.array(node.inputs[1]), work.state.params[node.inputs[1].name]
    scale = params.scale.reshape(-1, 1, 1, 1)
    gap = np.clip(np.rint(weights / scale), -128, 127) * scale - weights
    model = net()
    model.graph.output.append(onnx.ValueInfoProto(name="s"))
    noise = signal = 0.0
    for feeds in probes:
        _, z, s = run(model, feeds)
        noise += float(np.square(np.einsum("nchw,oc->nohw", s, gap[:, :, 0, 0])).sum())
        signal += float(np.square(z).sum())
    row = next(r for r in found_again(probes) if r.layer == "/z")
    assert row.weights == pytest.approx(-10 * np.log10(noise / signal), abs=0.02)


def found_again(probes: list[dict[str, np.ndarray]]) -> list[object]:
    work = job(net(), level=0)
    return list(sensitivity(work.state, work.pipeline, probes).ranking())


def test_it_is_deterministic() -> None:
    assert found(net()).ranking() == found(net()).ranking()


def test_pipelines_that_quantize_nothing_are_refused() -> None:
    work = prepare(net(), samples(), CompileOptions(passes="normalize"))
    with pytest.raises(UserError, match="the pipeline quantizes nothing"):
        sensitivity(work.state, work.pipeline, samples(2))


def test_a_model_without_float_outputs_is_refused() -> None:
    text = "g (float[1,4] x) => (int64[1] y) { m = MatMul(x, w) y = ArgMax<axis = 1, keepdims = 0>(m) }"
    model = model_from_text(text, {"w": np.eye(4, dtype=np.float32)})
    data = [{"x": np.random.default_rng(i).standard_normal((1, 4)).astype(np.float32)} for i in range(4)]
    work = prepare(model, data, CompileOptions())
    with pytest.raises(UserError, match="no output of the model is float"):
        sensitivity(work.state, work.pipeline, data)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(net(300), "net.onnx")
    np.savez("calib.npz", x=np.concatenate([s["x"] for s in samples()]))
    arguments = ["sensitivity", "net.onnx", "--calib", "calib.npz", "--top", "2", "--optimize", "size"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--json"])
    assert done.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["outputs"], told["probes"], len(told["layers"])) == (["y", "z"], 4, 2)
    assert told["layers"][0]["layer"] == "/z"
    with pytest.raises(SystemExit):
        main(arguments)
    head, first, _, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["layer", "op", "SQNR", "weights", "activations", "noise", "cost"]
    assert first.startswith("/z")
    assert last.startswith("2 of 6 layers. All of them quantized: about ")


def test_runtime_is_silent_about_pieces(capfd: pytest.CaptureFixture[str]) -> None:
    found(net())
    assert capfd.readouterr() == ("", "")
    assert runtime.session(net()) is not None
