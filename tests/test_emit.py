"""Emission: metadata, validity, and writes that leave all or nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompiler import __version__, emit
from qcompiler.errors import UserError
from qcompiler.state import CompileState, Counterpart, Phase
from tests.support import model_from_text, run, state_of

TEXT = "g (float[2,3] x) => (float[2,3] y) { t = Add(x, w) y = Relu(t) }"
WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3) - 2


def model() -> onnx.ModelProto:
    return model_from_text(TEXT, {"w": WEIGHT})


def state() -> CompileState:
    state = state_of(model(), phase=Phase.QDQ)
    for i, node in enumerate(state.graph.nodes):
        node.name = f"n{i}"
    return state


def test_the_model_says_what_made_it() -> None:
    made = state()
    made.metadata = {"character": "abc", "qcompiler.version": "stale"}
    made.origin = {"n1": ("conv", "bn"), "n0": ("n0",), "gone": ("x",)}
    made.counterparts = {name: Counterpart("a", np.array(2.0), np.array([0, 1.5])) for name in ("x", "gone")}
    props = {p.key: p.value for p in emit.to_model(made, {"pipeline": "cleanup", "calibration": "f00"}).metadata_props}
    assert props == {
        "character": "abc",
        "qcompiler.version": __version__,
        "qcompiler.target": "test",
        "qcompiler.emit": "qdq",
        "qcompiler.pipeline": "cleanup",
        "qcompiler.calibration": "f00",
        "qcompiler.provenance": '{"n1":["conv","bn"]}',
        "qcompiler.tensors": "{}",
        "qcompiler.counterparts": '{"x":["a",2.0,[0.0,1.5],false]}',
    }
    assert json.loads(props["qcompiler.provenance"]) == {"n1": ["conv", "bn"]}


def test_the_file_runs_and_is_the_same_every_time(tmp_path: Path) -> None:
    first, second = tmp_path / "deep" / "er" / "a.onnx", tmp_path / "b.onnx"
    for path in (first, second):
        emit.write(emit.to_model(state(), {}), path)
    assert first.read_bytes() == second.read_bytes()
    assert [p.name for p in first.parent.iterdir()] == ["a.onnx"]
    onnx.checker.check_model(first)
    x = np.zeros((2, 3), np.float32)
    np.testing.assert_array_equal(run(onnx.load(first), {"x": x})[0], np.maximum(WEIGHT, 0))


def test_large_data_goes_beside_the_model(tmp_path: Path) -> None:
    heavy = model_from_text(TEXT.replace("[2,3]", "[64,64]"), {"w": np.ones((64, 64), np.float32)})
    emit.write(heavy, tmp_path / "m.onnx", limit=10_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert (tmp_path / "m.onnx").stat().st_size < 1_000
    assert (tmp_path / "m.onnx.data").stat().st_size >= 64 * 64 * 4
    feeds = {"x": np.ones((64, 64), np.float32)}
    np.testing.assert_array_equal(run(onnx.load(tmp_path / "m.onnx"), feeds)[0], np.full((64, 64), 2))
    assert not heavy.graph.initializer[0].external_data, "the model in memory keeps its data"


def test_a_failed_write_leaves_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "old.onnx"
    path.write_bytes(b"OLD")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"^cannot write the model: No space left on device \(.*old.onnx\)$"):
        emit.write(model(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["old.onnx"]
    assert path.read_bytes() == b"OLD"


def test_paths_that_cannot_be_written_are_refused_early(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    source.write_bytes(b"model")
    link = tmp_path / "link.onnx"
    link.symlink_to(source)
    (tmp_path / "folder").mkdir()
    for path, message in (
        (source, "the output would overwrite the input model"),
        (link, "the output would overwrite the input model"),
        (tmp_path / "folder", "the output is a folder"),
        (source / "out.onnx", "is not a folder"),
        (tmp_path / ("q" * 300), "File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            emit.check_path(path, source)
    with pytest.raises(UserError, match="is a device or a pipe"):
        emit.check_path(Path(os.devnull), source)
    emit.check_path(tmp_path / "new" / "out.onnx", source)
    assert not (tmp_path / "new").exists()


def test_data_of_the_input_is_not_overwritten(tmp_path: Path) -> None:
    source, data = tmp_path / "in.onnx", tmp_path / "in.data"
    onnx.save_model(model(), source, save_as_external_data=True, location=data.name, size_threshold=0)
    (tmp_path / "calib").mkdir()
    sample, other = tmp_path / "calib" / "0.npy", tmp_path / "calib" / "out.onnx"
    for path in (sample, other):
        path.write_bytes(b"old")
    link = tmp_path / "link.onnx"
    link.symlink_to(data)
    for path in (data, link, tmp_path / "in"):
        with pytest.raises(UserError, match="the output would overwrite the data of the input model"):
            emit.check_path(path, source)
    for samples in (sample, sample.parent):
        with pytest.raises(UserError, match="the output would overwrite calibration data"):
            emit.check_path(sample, source, samples)
    emit.check_path(other, source, sample.parent)


def test_a_wrong_result_is_caught() -> None:
    good = emit.to_model(state(), {})
    emit.check(good, model())
    for text, message in (
        (TEXT.replace("x)", "z)").replace("Add(x", "Add(z"), "inputs"),
        (TEXT.replace("float[2,3] y)", "float[2,3] t)"), "outputs"),
        (TEXT.replace("Relu", "Frobnicate"), "not valid"),
        (TEXT.replace("Relu", "com.microsoft.Frobnicate"), "ONNX Runtime does not load"),
    ):
        with pytest.raises(emit.EmitError, match=message):
            emit.check(model_from_text(text, {"w": WEIGHT}), model())
