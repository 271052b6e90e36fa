"""Resume: a dump compiles on to the bytes of a straight run."""

from __future__ import annotations

import shutil
from pathlib import Path
from textwrap import dedent

import numpy as np
import onnx
import pytest

from qcompiler import compile_model
from qcompiler.errors import UserError
from qcompiler.resume import resume
from tests.test_bisect import broken
from tests.test_cli import Run, folder, qcompile  # noqa: F401  (fixtures)
from tests.test_compile import metadata, net, samples

MODELS = Path(__file__).parent.parent / "models"


def test_every_dump_of_a_trained_model_gives_the_same_bytes(tmp_path: Path) -> None:
    straight = tmp_path / "straight.onnx"
    model, data = MODELS / "digits_resnet.onnx", MODELS / "mnist_calib"
    result = compile_model(model, data, output=straight, dump=tmp_path / "d", samples=8, compare=False)
    dumps = sorted((tmp_path / "d").glob("*.onnx"))
    assert len(dumps) == len(result.report.passes)
    for dump in dumps:
        resume(dump, output=tmp_path / "resumed.onnx")
        assert (tmp_path / "resumed.onnx").read_bytes() == straight.read_bytes(), dump.name


@pytest.mark.parametrize(
    "options",
    [{"emit": "qdq"}, {"emit": "integer"}, {"per_tensor": True, "keep_float": ["/gemm"]}, {"target": "integer"}],
    ids=["qdq", "integer", "per-tensor", "target"],
)
def test_options_live_on_in_the_dump(tmp_path: Path, options: dict[str, object]) -> None:
    np.savez(tmp_path / "x.npz", x=np.concatenate([s["x"] for s in samples(12)]))
    straight = compile_model(net(), tmp_path / "x.npz", dump=tmp_path / "d", compare=False, **options).model
    for dump in sorted((tmp_path / "d").glob("*.onnx")):
        assert resume(dump).model == straight, dump.name


def test_a_compilation_that_stopped_goes_on(tmp_path: Path) -> None:
    straight = compile_model(net(), samples(), compare=False).model
    compile_model(net(), samples(), until="annotated", dump=tmp_path, compare=False)
    last = max(tmp_path.glob("*.onnx"))
    assert last.stem.endswith("-annotate")
    assert resume(last, samples()).model == straight
    stopped = compile_model(net(), samples(), until="insert-qdq", compare=False).model
    assert resume(last, samples(), until="insert-qdq").model == stopped
    with pytest.raises(UserError, match="no pass or phase 'annotate' in the pipeline"):
        resume(last, samples(), until="annotate")


def test_the_dumps_of_a_resumed_run_are_those_of_a_straight_run(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.concatenate([s["x"] for s in samples(12)]))
    compile_model(net(), tmp_path / "x.npy", dump=tmp_path / "a", compare=False)
    middle = next((tmp_path / "a").glob("*-annotate.onnx"))
    resume(middle, dump=tmp_path / "b")
    later = sorted(p.name for p in (tmp_path / "a").iterdir() if p.name[:2] > middle.name[:2])
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == later
    for name in later:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_data_is_asked_for_only_by_passes_that_read_it(tmp_path: Path) -> None:
    data = tmp_path / "x.npy"
    np.save(data, np.concatenate([s["x"] for s in samples(12)]))
    straight = compile_model(net(), data, dump=tmp_path / "d", compare=False).model
    moved = data.rename(tmp_path / "y.npy")
    by_pass = {p.stem.partition("-")[2]: p for p in sorted((tmp_path / "d").glob("*.onnx"))}
    for name in ("annotate", "calibrate", "scale-weights"):
        with pytest.raises(UserError, match=r"no longer there; give it with --calib \(.*x\.npy\)"):
            resume(by_pass[name])
        assert resume(by_pass[name], moved).model == straight
    for name in ("correct-bias", "insert-qdq", "cleanup"):
        assert resume(by_pass[name]).model == straight


def test_data_that_was_in_memory_must_be_given_again(tmp_path: Path) -> None:
    compile_model(net(), samples(), dump=tmp_path, compare=False)
    with pytest.raises(UserError, match="does not say where its calibration data is"):
        resume(next(tmp_path.glob("*-calibrate.onnx")))


def test_other_data_is_recorded_as_such_before_calibration(tmp_path: Path) -> None:
    straight = compile_model(net(), samples(12), dump=tmp_path, compare=False).model
    first = resume(tmp_path / "01-normalize.onnx", samples(6)).model
    assert metadata(first)["qcompiler.calibration"] != metadata(straight)["qcompiler.calibration"]
    assert first == compile_model(net(), samples(6), compare=False).model


def test_no_plugin_is_loaded_because_a_dump_says_so(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        dedent("""
        from pathlib import Path
        from qcompiler.plugin import Plugin
        from qcompiler_passes.cleanup import Cleanup

        class Mine(Cleanup):
            name = "mine"

        Path(__file__).with_name("loaded").touch()
        PLUGIN = Plugin("mine", passes=(Mine,))
        """)
    )
    straight = compile_model(net(), passes="normalize,mine", load=[plugin], dump=tmp_path / "d").model
    (tmp_path / "loaded").unlink()
    with pytest.raises(UserError, match=r"no pass is called 'mine'.*made with --load .*mine\.py: give it again"):
        resume(tmp_path / "d" / "01-normalize.onnx")
    assert not (tmp_path / "loaded").exists()
    assert resume(tmp_path / "d" / "01-normalize.onnx", load=[plugin]).model == straight


def test_the_command(qcompile: Run, folder: Path) -> None:  # noqa: F811
    assert qcompile("net.onnx", "--calib", "calib", "--dump", "d", "-q")[0] == 0
    dump = next((folder / "d").glob("*-annotate.onnx"))
    code, out, err = qcompile("resume", dump)
    written = dump.with_name(f"{dump.stem}.int8.onnx")
    assert (code, err) == (0, "")
    assert out.startswith(f"{written}  kernels for ort-cpu, ")
    assert written.read_bytes() == (folder / "net.int8.onnx").read_bytes()
    shutil.rmtree(folder / "calib")
    code, out, err = qcompile("resume", dump, "-o", "x.onnx")
    assert (code, out) == (2, "")
    assert err == f"error: the calibration data is no longer there; give it with --calib ({folder / 'calib'})\n"
    assert not (folder / "x.onnx").exists()
    code, _, err = qcompile("resume", "net.onnx")
    assert code == 2 and "there is no such file" in err


def test_a_dump_can_be_compared_and_loads(tmp_path: Path) -> None:
    compile_model(net(), samples(), dump=tmp_path, compare=False)
    model = onnx.load(next(tmp_path.glob("*-insert-qdq.onnx")))
    assert metadata(model)["character"] == "abc"
    assert "qcompiler.tensors" in metadata(model)


def test_a_model_that_does_not_run_is_not_the_fault_of_a_pass(tmp_path: Path) -> None:
    data = tmp_path / "x.npy"
    np.save(data, np.ones((1, 4, 8, 8), np.float32))
    compile_model(broken(), data, until="normalize", dump=tmp_path / "d", compare=False)
    with pytest.raises(UserError, match="X num_dims does not match W num_dims"):
        resume(tmp_path / "d" / "01-normalize.onnx")
