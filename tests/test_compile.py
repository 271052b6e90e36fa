"""compile_model from end to end, its options, and what it refuses to load."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler import UserError, compile_model, runtime
from qcompiler.data import as_source
from qcompiler.load import input_specs, load_model
from qcompiler.report import Layer, Report
from qcompiler.split import MAX_HELD_BACK, Split
from tests.support import assert_same_function, model_from_text, ops_of, run

NET = """
net (float[N,3,8,8] x) => (float[N,5] y) {
    c = Conv<pads = [1, 1, 1, 1]>(x, w, b)
    r = Relu(c)
    p = GlobalAveragePool(r)
    f = Flatten(p)
    y = Gemm(f, v)
}"""


def net(seed: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    shapes = {"w": (16, 3, 3, 3), "b": (16,), "v": (16, 5)}
    model = model_from_text(NET, {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()})
    for node in model.graph.node:
        node.name = f"/{node.op_type.lower()}"
    model.metadata_props.add(key="character", value="abc")
    return model


def samples(count: int = 20) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {p.key: p.value for p in model.metadata_props}


def test_a_whole_compilation(tmp_path: Path) -> None:
    result = compile_model(net(), samples(), output=tmp_path / "small.onnx")
    assert "QLinearConv" in ops_of(result.model)
    assert onnx.load(tmp_path / "small.onnx") == result.model
    report = result.report
    assert (report.samples, report.held_back) == (18, 2)
    assert {(la.op, la.quantized) for la in report.layers if la.op in ("Conv", "Gemm")} == {
        ("Conv", True),
        ("Gemm", True),
    }
    assert report.outputs[0].name == "y"
    assert report.outputs[0].sqnr is not None
    assert report.outputs[0].sqnr > 25
    assert report.speed is not None
    assert report.speed.float_ms > 0
    assert any("QLinearConv" in kernel for kernel in report.kernels)
    made_by = metadata(result.model)
    assert made_by["character"] == "abc"
    assert made_by["qcompiler.emit"] == "kernels"
    assert made_by["qcompiler.calibration"] == as_source(samples(), input_specs(net())).digest()
    layers = {layer for names in json.loads(made_by["qcompiler.provenance"]).values() for layer in names}
    assert layers <= {n.name for n in net().graph.node} | {n.name for n in result.model.graph.node}


def test_two_compilations_give_the_same_bytes() -> None:
    first, second = (compile_model(net(), samples(), compare=False).model for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_the_three_forms_compute_the_same() -> None:
    forms = {
        emit: compile_model(net(), samples(), emit=emit, compare=False).model for emit in ("qdq", "integer", "kernels")
    }
    assert "DequantizeLinear" in ops_of(forms["qdq"])
    assert "ConvInteger" in ops_of(forms["integer"])
    for feeds in samples(5):
        expected = run(forms["kernels"], feeds)[0]
        np.testing.assert_array_equal(run(forms["integer"], feeds)[0], expected)
        np.testing.assert_array_equal(run(forms["qdq"], feeds, optimize=True)[0], expected)


def test_per_tensor_weights() -> None:
    def scales(per_tensor: bool) -> set[int]:
        model = compile_model(net(), samples(), emit="qdq", per_tensor=per_tensor, compare=False).model
        constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        dequantize = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
        return {constants[n.input[1]].size for n in dequantize if n.input[1] in constants}

    assert 64 in scales(False)  # 16 filters, for each of the 4 columns that fold-width makes one
    assert scales(True) == {1}


def test_keep_float_takes_node_and_output_names() -> None:
    for pattern in ("/gem*", "y"):
        report = compile_model(net(), samples(), keep_float=[pattern], compare=False).report
        kept = [layer for layer in report.layers if layer.op == "Gemm"]
        assert kept == [Layer("/gemm", "Gemm", False, f"kept in float as {pattern!r} asks")]


def test_nothing_to_quantize_still_gives_a_valid_model() -> None:
    model = model_from_text("g (float[2,2] x) => (float[2,2] y) { y = Sin(x) }")
    result = compile_model(model, [{"x": np.ones((2, 2), np.float32)}] * 3)
    assert_same_function(model, result.model)
    assert ("quantized", "nothing: the model stays float") in list(result.report.rows())


def test_one_sample_serves_both_ends() -> None:
    report = compile_model(net(), samples(1)).report
    assert (report.samples, report.held_back) == (1, 1)
    assert any("only sample" in note for note in report.notes)


@pytest.mark.parametrize(("count", "held"), [(2, 1), (10, 1), (19, 1), (20, 2), (159, 15), (500, MAX_HELD_BACK)])
def test_samples_are_split_once_and_for_all(count: int, held: int) -> None:
    data = [{"x": np.full((1, 2), i, np.float32)} for i in range(count)]
    spec = model_from_text("g (float[1,2] x) => (float[1,2] y) { y = Relu(x) }")
    split = Split(as_source(data, input_specs(spec)))
    before = [int(s["x"][0, 0]) for s in split.held_back]
    calibrating = [int(s["x"][0, 0]) for s in split]
    assert len(before) == held
    assert len(split) == len(calibrating) == count - held
    assert sorted(before + calibrating) == list(range(count))
    assert [int(s["x"][0, 0]) for s in split.held_back] == before


def test_limits_on_samples() -> None:
    assert compile_model(net(), samples(), samples=10, compare=False).report.samples == 9


def test_pipelines_in_text_form() -> None:
    result = compile_model(net(), passes="normalize,cleanup")
    assert result.report.pipeline == "normalize,cleanup"
    assert metadata(result.model)["qcompiler.emit"] == "float"
    assert_same_function(net(), result.model)


def test_levels_are_pipelines() -> None:
    texts = [compile_model(net(), samples(4), level=n, compare=False).report.pipeline for n in range(4)]
    assert len(set(texts)) == 4
    assert texts[2] == compile_model(net(), samples(4), compare=False).report.pipeline
    assert "calibrate{collector=minmax means=0}" in texts[0]
    assert "correct-bias" not in texts[0] + texts[1]


def test_a_level_goes_with_a_form_and_a_collector() -> None:
    report = compile_model(net(), samples(4), level=0, emit="qdq", collector="omse", compare=False).report
    assert report.emit == "qdq"
    assert (
        "calibrate{means=0},power-of-two-factors,align-scales,scale-weights{search=false},insert-qdq,guard-float,cleanup"
        in report.pipeline
    )
    named = compile_model(net(), samples(4), passes="O0", emit="qdq", collector="omse", compare=False).report
    assert named.pipeline == report.pipeline


def test_until_a_phase_and_a_pass() -> None:
    fused = compile_model(net(), samples(), until="fused", compare=False)
    assert fused.report.emit == "fused"
    assert_same_function(net(), fused.model)
    assert compile_model(net(), samples(), until="normalize", compare=False).report.pipeline == "normalize"


def test_dump_and_times(tmp_path: Path) -> None:
    report = compile_model(net(), samples(2), dump=tmp_path, compare=False).report
    dumps = sorted(p.name for p in tmp_path.glob("*.onnx"))
    assert dumps == [f"{i:02d}-{p.name}.onnx" for i, p in enumerate(report.passes, 1)]
    for dump in dumps:
        assert run(onnx.load(tmp_path / dump), samples(1)[0])[0].shape == (1, 5)


def test_progress_is_reported() -> None:
    calls: list[tuple[int, int | None]] = []
    compile_model(net(), samples(10), progress=lambda done, total: calls.append((done, total)), compare=False)
    assert max(calls)[0] == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "ort-cpi"}, "no target is called 'ort-cpi'; did you mean 'ort-cpu'? (--target)"),
        ({"collector": "minmox"}, "no collector is called 'minmox'; did you mean 'minmax'? (--collector)"),
        ({"emit": "int4"}, "no form is called 'int4'; choose qdq, integer, kernels (--emit)"),
        ({"passes": "clenup"}, "no pass is called 'clenup'; did you mean 'cleanup'? (--passes)"),
        ({"level": 4}, "there is no level 4; choose 0, 1, 2, 3 (-O)"),
        ({"level": 1, "passes": "O2"}, "a level is a pipeline: give one of the two (-O and --passes)"),
        ({"load": ["/nonexistent.py"]}, "no such file (--load /nonexistent.py)"),
        ({"calib": None}, "calibration data is missing; give some samples of what the model is fed (--calib)"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        compile_model(net(), **{"calib": samples(2), **options})
    assert str(caught.value) == message


def already_compiled() -> onnx.ModelProto:
    return compile_model(net(), samples(), emit="integer", optimize="size", compare=False).model


def test_a_float_model_with_dequantized_weights_is_welcome() -> None:
    text = "g (float[1,4] x) => (float[1,4] y) { d = DequantizeLinear(w, s) y = MatMul(x, d) }"
    arrays = {"w": np.arange(-8, 8, dtype=np.int8).reshape(4, 4), "s": np.float32(0.125)}
    model = model_from_text(text, arrays)
    report = compile_model(
        model, [{"x": np.random.default_rng(i).standard_normal((1, 4), np.float32)} for i in range(4)]
    ).report
    assert [(la.op, la.quantized) for la in report.layers] == [("MatMul", True)]


def test_sequences_may_occur_inside() -> None:
    """They have no shape, not even when the shapes of dynamic axes are measured."""
    text = "g (float[N,4,8,8] x) => (float[N,4,6,6] y) { q = SequenceConstruct(x) t = SequenceAt(q, i) y = Conv(t, w) }"
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 4, 3, 3)).astype(np.float32)
    model = model_from_text(text, {"i": np.array(0), "w": weight})
    result = compile_model(model, [rng.standard_normal((1, 4, 8, 8)).astype(np.float32) for _ in range(2)])
    assert "QLinearConv" in ops_of(result.model)
    assert result.report.outputs[0].sqnr is not None
    assert result.report.outputs[0].sqnr > 20


@pytest.mark.parametrize(
    ("body", "shape", "message"),
    [
        ("c = Conv(x, w) y = Gather<axis = 1>(c, i)", (4, 4, 1, 1), "indices element out of data bounds"),
        ("y = Conv<kernel_shape = [1, 1]>(x, w)", (4,), "X num_dims does not match W num_dims"),
        ("y = Conv<kernel_shape = [1, 1]>(x, w)", (4, 9, 1, 1), "Input channels C is not equal to kernel channels"),
    ],
)
@pytest.mark.parametrize("batch", ["1", "N"])
def test_a_model_that_does_not_run_is_not_the_fault_of_a_pass(
    tmp_path: Path, batch: str, body: str, shape: tuple[int, ...], message: str
) -> None:
    text = f"g (float[{batch},4,8,8] x) => (float[N,4,8,8] z) {{ {body} z = Relu(y) }}"
    model = model_from_text(text, {"i": np.array([7]), "w": np.ones(shape, np.float32)})
    with pytest.raises(UserError, match=message) as caught:
        compile_model(model, [np.ones((1, 4, 8, 8), np.float32)], reproduce=tmp_path / "repro")
    assert caught.value.where == "calibration sample 0"
    assert not list(tmp_path.iterdir())


def test_types_that_numpy_lacks_may_occur_inside() -> None:
    body = "b = Cast<to=16>(x) r = Reshape(b, s) f = Cast<to=1>(r) y = MatMul(f, w)"
    text = f"g (float[2,2] x) => (float[1,3] y) <int64[2] s = {{1,4}}> {{ {body} }}"
    model = model_from_text(text, {"w": np.eye(4, 3, dtype=np.float32)})
    report = compile_model(model, [{"x": np.full((2, 2), i, np.float32)} for i in (3, 0, 2, 1)]).report
    assert [la.op for la in report.layers if la.quantized] == ["MatMul"]


def test_masks_may_be_infinite() -> None:
    text = (
        "g (float[N,6,8] x, float[6,6] mask) => (float[N,6,6] y) "
        "{ s = MatMul(x, w) m = Add(s, mask) y = Softmax<axis=-1>(m) }"
    )
    rng = np.random.default_rng(0)
    model = model_from_text(text, {"w": rng.standard_normal((8, 6)).astype(np.float32)})
    mask = np.where(np.tri(6, dtype=bool), 0, -np.inf).astype(np.float32)
    data = [{"x": rng.standard_normal((1, 6, 8)).astype(np.float32), "mask": mask} for _ in range(8)]
    report = compile_model(model, data).report
    assert [layer.op for layer in report.layers if layer.quantized] == ["MatMul"]
    assert report.outputs[0].sqnr is not None
    assert report.outputs[0].sqnr > 25
    data[3]["x"][0, 0, 0] = np.inf
    with pytest.raises(UserError, match=r"'x' .*: the array holds NaN or infinity"):
        compile_model(model, data)


def test_strings_may_be_fed() -> None:
    text = "g (float[1,4,8,8] x, string[2] s) => (float[1,4,8,8] y, string[2] t) { y = Conv(x, w) t = Gather(s, i) }"
    rng = np.random.default_rng(0)
    model = model_from_text(text, {"w": rng.standard_normal((4, 4, 1, 1)).astype(np.float32), "i": np.array([1, 0])})
    data = [{"x": rng.standard_normal((1, 4, 8, 8)).astype(np.float32), "s": np.array(["Ab", "ç"])} for _ in range(4)]
    result = compile_model(model, data)
    assert "QLinearConv" in ops_of(result.model)
    assert result.report.outputs[1].equal == 1.0
    with pytest.raises(UserError, match="other objects than strings"):
        compile_model(model, [{**data[0], "s": np.array([1, None], object)}])


def test_inputs_that_are_no_tensors_matter_only_to_data() -> None:
    text = (
        "g (seq(float[4,4]) q) => (float[4,4] y) { z = Constant<value_int=0>() x = SequenceAt(q, z) y = MatMul(x, w) }"
    )
    model = model_from_text(text, {"w": np.eye(4, dtype=np.float32)})
    compiled = compile_model(model, mode="weight-only").model
    feeds = {"q": [np.arange(16, dtype=np.float32).reshape(4, 4)]}
    np.testing.assert_allclose(run(compiled, feeds)[0], feeds["q"][0], atol=1e-6)
    with pytest.raises(UserError, match="the input is not a tensor"):
        compile_model(model, [feeds])


CLASSES = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]>
    g (float[1,4,8,8] x) => (float z) {
        c = Conv(x, w) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p) s = Softmax(f)
        z = ai.onnx.ml.ZipMap<classlabels_strings = ["a", "b", "c", "d"]>(s)
    }""")


@pytest.mark.parametrize("emit", ["kernels", "integer", "qdq"])
def test_outputs_may_be_maps(emit: str) -> None:
    """As scikit-learn's classifiers have them: a sequence of maps from classes to probabilities."""
    model, rng = onnx.ModelProto.FromString(CLASSES.SerializeToString()), np.random.default_rng(0)
    number = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [])
    named = onnx.helper.make_map_type_proto(onnx.TensorProto.STRING, number)
    model.graph.output[0].type.CopyFrom(onnx.helper.make_sequence_type_proto(named))
    weight = rng.standard_normal((4, 4, 3, 3)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    data = [rng.standard_normal((1, 4, 8, 8)).astype(np.float32) for _ in range(4)]
    result = compile_model(model, data, emit=emit)
    assert result.model.graph.output[0].type == model.graph.output[0].type
    assert list(run(result.model, {"x": data[0]})[0][0]) == ["a", "b", "c", "d"]
    sqnr = result.report.outputs[0].sqnr
    assert sqnr is not None
    assert 25 < sqnr < 120


def opset(version: int) -> onnx.ModelProto:
    model = net()
    model.opset_import[0].version = version
    return model


def too_large() -> onnx.ModelProto:
    text = "g (float[1] x) => (float[1] y) { s = Constant<value = int64[2] {100000, 100000}>() e = Expand(x, s) y = Abs(e) }"
    return model_from_text(text.replace("float[1] y", "float[P,Q] y"))


def recursive() -> onnx.ModelProto:
    text = """<ir_version: 8, opset_import: ["" : 17, "loc" : 1]>
    g (float[1] x) => (float[1] y) { y = loc.f(x) }
    <domain: "loc", opset_import: ["" : 17, "loc" : 1]> f (a) => (b) { b = loc.f(a) }"""
    return onnx.parser.parse_model(text)


def newer_ir() -> onnx.ModelProto:
    model = net()
    model.ir_version = 99
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            already_compiled,
            "the model is compiled already, to integers without scales; give the float model",
        ),
        (lambda: opset(0), "there is no opset 0: export with opset 7 or newer"),
        (lambda: opset(99), "opset 99 is newer than the newest known"),
        (newer_ir, "IR version 99 is newer than the newest known"),
        (
            lambda: model_from_text("g (float[1] x) => (bfloat16[1] y) { y = Cast<to=16>(x) }"),
            "the output is of type bfloat16, which NumPy lacks (output 'y')",
        ),
        (too_large, "tensor 'e' would hold 1.0e+10 elements"),
        (recursive, "function 'f' calls itself, or calls nest too deeply"),
        (lambda: model_from_text("g (float[1] x) => (float[1] y) { z = Abs(x) }"), "not a valid model"),
        (lambda: model_from_text("g (float[1] x) => (float[1] y) { y = Frobnicate(x) }"), "not a valid model"),
        (
            lambda: model_from_text("g (float[1] x) => (float[1] y) { y = com.microsoft.Foo(x) }"),
            "ONNX Runtime does not load",
        ),
    ],
)
def test_models_that_are_refused(make: Callable[[], onnx.ModelProto], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_model(make())
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"plain text" * 20, "not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not an ONNX model: the file is a git-lfs pointer"),
        (b"\x1f\x8b" + b"\0" * 99, "not an ONNX model: the file is gzip-compressed"),
        (b"<!DOCTYPE html>", "not an ONNX model: the file is a web page"),
        (net().SerializeToString()[:200], "not an ONNX model, or cut short"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert caught.value.what.startswith(message)
    assert caught.value.where == str(path)


def test_paths_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model file"):
        load_model(tmp_path / "none.onnx")
    with pytest.raises(UserError, match="the model is a folder"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="not a regular file"):
        load_model("/dev/null")


def external(folder: Path, **info: object) -> Path:
    """A model whose weight is in w.bin, with the given fields in place of the right ones."""
    model = net()
    weight = model.graph.initializer[0]
    (folder / "w.bin").write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "w.bin"} | info).items():
        weight.external_data.add(key=key, value=str(value))
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_is_read_from_beside_the_model(tmp_path: Path) -> None:
    assert_same_function(net(), load_model(external(tmp_path)))


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"location": "../secret"}, "is not a file in the model's folder"),
        ({"location": "/etc/passwd"}, "is not a file in the model's folder"),
        ({"location": ""}, "is not a file in the model's folder"),
        ({"location": "link"}, "is not a file in the model's folder"),
        ({"location": "hard"}, "is not a regular file of its own"),
        ({"location": "gone"}, "cannot be read"),
        ({"location": "loop"}, "cannot be read"),
        ({"offset": 10**9}, "lies outside the 1728 bytes of w.bin"),
        ({"length": 1 << 60}, "lies outside the 1728 bytes of w.bin"),
        ({"length": -1}, "lies outside the 1728 bytes of w.bin"),
        ({"length": "abc"}, "is not a number"),
    ],
)
def test_external_data_that_is_refused(tmp_path: Path, info: Mapping[str, object], message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 4000)
    (folder / "link").symlink_to(secret)
    (folder / "loop").symlink_to("loop")
    (folder / "hard").hardlink_to(secret)
    with pytest.raises(UserError, match="external data") as caught:
        load_model(external(folder, **info))
    assert message in str(caught.value)


def test_a_model_in_memory_must_hold_its_data(tmp_path: Path) -> None:
    model = onnx.load(external(tmp_path), load_external_data=False)
    with pytest.raises(UserError, match=r"its data is in another file.*\(tensor 'w'\)"):
        load_model(model)


def test_functions_are_inlined() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "loc" : 1]>
    g (float[2] x) => (float[2] y) { y = loc.f(x) }
    <domain: "loc", opset_import: ["" : 17]> f (a) => (b) { t = Neg(a) b = Relu(t) }"""
    assert ops_of(load_model(onnx.parser.parse_model(text))) == ["Neg", "Relu"]


@pytest.mark.parametrize("indices", [[1, 5], [[0, 1], [1, 2]]])
def test_sparse_initializers_become_dense(indices: list[object]) -> None:
    model = model_from_text("g (float[2,3] x) => (float[2,3] y) { y = Add(x, k) }")
    values = numpy_helper.from_array(np.float32([7, 8]), "k")
    positions = numpy_helper.from_array(np.array(indices, np.int64), "at")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, positions, [2, 3]))
    [y] = run(load_model(model), {"x": np.zeros((2, 3), np.float32)})
    assert y.tolist() == [[0, 7, 0], [0, 0, 8]]


def test_loading_does_not_change_the_callers_model() -> None:
    model = net()
    before = model.SerializeToString(deterministic=True)
    compile_model(model, samples(2), compare=False)
    assert model.SerializeToString(deterministic=True) == before


def test_input_specs() -> None:
    model = net()
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [16, 3, 3, 3]))
    model.graph.input.append(helper.make_tensor_value_info("n", TensorProto.INT64, [None, -1]))
    model.graph.input.append(helper.make_tensor_value_info("any", TensorProto.BOOL, None))
    assert [(s.name, s.dtype, s.shape) for s in input_specs(model)] == [
        ("x", np.float32, ("N", 3, 8, 8)),
        ("n", np.int64, (None, None)),
        ("any", np.bool_, None),
    ]


def test_the_summary_groups_reasons() -> None:
    layers = [Layer(f"s{i}", "Softmax", False, "it is slow") for i in range(12)]
    layers += [Layer(f"r{i}", "Relu", False, f"its input 't{i}' is a float tensor") for i in range(3)]
    layers += [Layer("c", "Conv", True), Layer("d", "Conv", False, "the weight is not a constant")]
    report = Report("m.onnx", "q.onnx", "ort-cpu", "kernels", "cleanup", layers, (2_000_000, 500_000))
    rows = list(report.rows())
    assert ("quantized", "Conv 1/2") in rows
    assert [value for key, value in rows if key == "in float"] == [
        "1 x Conv: the weight is not a constant",
        "12 x Softmax: it is slow",
        "3 x Relu: its input is a float tensor",
    ]
    assert ("size", "2.00 MB -> 0.50 MB (4.00x smaller)") in rows
    assert len([1 for key, _ in report.rows(verbose=True) if key == "in float"]) == 16
    assert json.loads(json.dumps(report.to_dict()))["quantized"] == 1


def test_a_full_temporary_folder_only_costs_the_kernel_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: onnx.ModelProto) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(runtime, "session_and_graph", full)
    report = compile_model(net(), samples(4)).report
    assert report.kernels == {}
    assert report.speed is not None
    assert any("kernels are not counted" in note for note in report.notes)


def difference_of_like_tensors(rest: str) -> onnx.ModelProto:
    """What 8 bits leave of the difference `d` is noise; `v` is a weight for other layers."""
    w = np.random.default_rng(0).standard_normal((8, 8, 3, 3)).astype(np.float32)
    other = w + 0.003 * np.random.default_rng(1).standard_normal(w.shape).astype(np.float32)
    text = f"a = Conv(x, w) b = Conv(x, other) d = Sub(a, b) {rest}"
    weights = {"w": w, "other": other, "v": w[:, :, :1, :1].copy()}
    return model_from_text(f"g (float[1,8,16,16] x) => (float[] y) {{ {text} }}", weights)


@pytest.mark.parametrize("layers", [1, 9])
def test_layers_stay_float_where_outputs_would_be_far_off(layers: int) -> None:
    data = [np.random.default_rng(i).standard_normal((1, 8, 16, 16)).astype(np.float32) for i in range(8)]
    chain = " ".join(f"d{i + 1} = Conv(d{i}, v)" for i in range(layers))
    report = compile_model(difference_of_like_tensors(f"d0 = Conv(d, v) {chain} y = Relu(d{layers})"), data).report
    assert report.warnings == []
    assert report.reached is not None
    assert {"Conv_a", "Conv_b"} <= set(report.reached.kept)
    assert any(layer.quantized for layer in report.layers)


def test_all_stays_float_with_a_warning_where_no_choice_of_layers_would_do() -> None:
    data = [np.random.default_rng(i).standard_normal((1, 8, 16, 16)).astype(np.float32) for i in range(8)]
    result = compile_model(difference_of_like_tensors("y = Relu(d)"), data, timed=False)
    report = result.report
    assert report.reached is None
    assert [w.partition(" dB")[0].rpartition(": ")[0] for w in report.warnings] == [
        "nothing is quantized, because in int8 output 'y' is far from the float model's"
    ]
    assert not any(layer.quantized for layer in report.layers)
    assert report.outputs[0].sqnr is None or report.outputs[0].sqnr > 80
    forced = compile_model(difference_of_like_tensors("y = Relu(d)"), data, timed=False, min_sqnr=-99).report
    assert any(layer.quantized for layer in forced.layers)
    assert "is far from the float model's" in forced.warnings[0]


def test_layers_stay_float_that_held_back_samples_show() -> None:
    """Means of samples that calibrate are near 0, that of the one held back is not: its mean is clipped."""
    model = model_from_text(
        "g (float[1,8,16,16] x) => (float[] y, float[] z) "
        "{ c = Conv(x, v) z = Relu(c) m = GlobalAveragePool(c) f = Flatten(m) y = MatMul(f, w) }",
        {"v": np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1), "w": np.eye(8, dtype=np.float32)},
    )
    data = [np.random.default_rng(i).standard_normal((1, 8, 16, 16)).astype(np.float32) for i in range(8)]
    report = compile_model(model, [*data[:7], np.ones_like(data[7])], timed=False).report
    assert report.warnings == []
    assert report.reached is not None
    assert {layer.name for layer in report.layers if layer.quantized} == {"Conv_c"}
