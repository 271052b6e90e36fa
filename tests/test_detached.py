"""Models too large for a proto, on small ones: the limits are lowered."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from qcompiler import compile_model, detached, emit, ir, load, runtime
from qcompiler.errors import UserError
from tests.support import assert_same_function, model_from_text

TEXT = "g (float[n,64] x) => (float[n,64] y) { a = MatMul(x, w0) b = Relu(a) c = MatMul(b, w1) d = Relu(c) y = MatMul(d, w2) }"
RNG = np.random.default_rng(0)
WEIGHTS = {f"w{i}": RNG.standard_normal((64, 64)).astype(np.float32) / 8 for i in range(3)}
SAMPLES = [RNG.standard_normal((1, 64)).astype(np.float32) for _ in range(8)]


@pytest.fixture(autouse=True)
def low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat a model of 10 kB as one of 2 GB."""
    monkeypatch.setattr(detached, "MODEL_LIMIT", 10_000)
    monkeypatch.setattr(detached, "LARGE", 1_000)


def whole() -> onnx.ModelProto:
    return model_from_text(TEXT, WEIGHTS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The model with its weights in one file."""
    onnx.save(whole(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    return tmp_path / "m.onnx"


def test_weights_stay_in_their_file(path: Path) -> None:
    model = load.load_model(path)
    assert [t.name for t in detached.of(model)] == ["w0", "w1", "w2"]
    assert model.ByteSize() < 5_000
    assert detached.total_bytes(model) == model.ByteSize() + 3 * 64 * 64 * 4
    graph = ir.from_proto(model)
    arrays = {t.name: ir.array(t) for t in ir.tensors(graph) if ir.is_constant(t)}
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, WEIGHTS[name])
        assert isinstance(array.base, np.memmap) and not array.flags.writeable
    again = ir.from_proto(ir.to_proto(graph))
    assert all(isinstance(ir.array(t).base, np.memmap) for t in ir.tensors(again) if ir.is_constant(t))


def test_arrays_in_memory_are_not_copied(path: Path) -> None:
    graph = ir.from_proto(load.load_model(path))
    [weight] = [t for t in ir.tensors(graph) if t.name == "w1"]
    weight.values = changed = np.asfortranarray(WEIGHTS["w1"] * 2)
    model = ir.to_proto(graph)
    assert [str(t.external_data[0].value)[0] for t in detached.of(model)] == ["/", "#", "/"]
    np.testing.assert_array_equal(detached.array_of(detached.of(model)[1]), changed)
    assert detached.array_of(detached.of(model)[1]).base is weight.values
    expected = model_from_text(TEXT, {**WEIGHTS, "w1": changed})
    [wanted] = runtime.run(runtime.session(expected), {"x": SAMPLES[0]})
    runner = runtime.session(model, consume=True)
    del graph, weight, changed
    gc.collect()
    np.testing.assert_allclose(runtime.run(runner, {"x": SAMPLES[0]})[0], wanted, rtol=1e-5, atol=1e-6)


def test_a_reference_to_an_array_that_is_gone(path: Path) -> None:
    array = np.ones((64, 64), np.float32)
    tensor = detached.refer("w", array)
    assert detached.array_of(tensor).sum() == 64 * 64
    del array
    with pytest.raises(UserError, match=r"its weights are gone.*\(tensor 'w'\)"):
        detached.array_of(tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.dims.append(2), "Node|shape|dims|large|mismatch|incompatible|not a valid model|size"),
        (lambda t: setattr(t, "data_type", TensorProto.DOUBLE), "."),
    ],
)
def test_sizes_that_differ_from_the_file(path: Path, change: object, message: str) -> None:
    model = onnx.load(path, load_external_data=False)
    change(model.graph.initializer[1])  # type: ignore[operator]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=message):
        load.load_model(path)


@pytest.mark.parametrize("options", [{}, {"mode": "weight-only"}, {"optimize": "size", "emit": "qdq"}, {"level": 3}])
def test_compiling_gives_the_same_as_for_a_small_model(
    path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    calib = None if "mode" in options else SAMPLES
    large = compile_model(path, calib, output=path.with_name("large.onnx"), **options)
    monkeypatch.undo()
    compile_model(whole(), calib, output=path.with_name("small.onnx"), **options)
    assert large.report.bytes[0] > 3 * 64 * 64 * 4
    written = onnx.load(path.with_name("large.onnx"))
    theirs = onnx.load(path.with_name("small.onnx"))
    del written.metadata_props[:], theirs.metadata_props[:]
    assert [n.op_type for n in written.graph.node] == [n.op_type for n in theirs.graph.node]
    assert_same_function(theirs, written)


def test_a_large_result_is_the_same_every_time(path: Path) -> None:
    for name in ("a", "b"):
        folder = path.parent / name
        folder.mkdir()
        result = compile_model(path, output=folder / "out.onnx", passes="normalize,cleanup")
        assert sorted(p.name for p in folder.iterdir()) == ["out.onnx", "out.onnx.data"]
        assert_same_function(whole(), onnx.load(folder / "out.onnx"))
        for tensor in detached.of(result.model):
            np.testing.assert_array_equal(detached.array_of(tensor), WEIGHTS[tensor.name])
    for kind in ("out.onnx", "out.onnx.data"):
        assert (path.parent / "a" / kind).read_bytes() == (path.parent / "b" / kind).read_bytes()


def test_the_old_data_survives_a_failure(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load.load_model(path)
    out, data = path.with_name("out.onnx"), path.with_name("out.onnx.data")
    out.write_bytes(b"OLD")
    data.write_bytes(b"OLD DATA")
    real = Path.replace

    def full(self: Path, target: Path) -> Path:
        if Path(target).name == "out.onnx":
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        emit.write(model, out)
    assert (out.read_bytes(), data.read_bytes()) == (b"OLD", b"OLD DATA")
    assert sorted(p.name for p in path.parent.iterdir()) == ["m.data", "m.onnx", "out.onnx", "out.onnx.data"]


def test_the_output_does_not_overwrite_the_weights_of_the_input(path: Path) -> None:

    path.with_name("m.data").rename(path.with_name("o.onnx.data"))
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = "o.onnx.data"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"the output would overwrite the data of the input model \(.*o.onnx.data\)"):
        compile_model(path, output=path.with_name("o.onnx"), passes="normalize")
    emit.check_path(path.with_name("p.onnx"), path)


def test_strings_and_small_tensors_are_brought_in(path: Path) -> None:
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1), "s"))
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    assert "s" not in [t.name for t in detached.of(load.read_model(path))]


def test_mapped_weights_are_read_again_after_they_were_given_back(path: Path) -> None:
    model = load.load_model(path)
    graph = ir.from_proto(model)
    runner = runtime.session(model)
    detached.let_go()
    for tensor in (t for t in ir.tensors(graph) if ir.is_constant(t)):
        np.testing.assert_array_equal(ir.array(tensor), WEIGHTS[tensor.name])
    [wanted] = runtime.run(runtime.session(whole()), {"x": SAMPLES[0]})
    np.testing.assert_allclose(runtime.run(runner, {"x": SAMPLES[0]})[0], wanted, rtol=1e-5, atol=1e-6)


def test_a_session_leaves_the_paths_of_its_model_as_they_are(path: Path) -> None:
    model = load.load_model(path)
    before = model.SerializeToString(deterministic=True)
    runtime.session(model)
    assert model.SerializeToString(deterministic=True) == before
