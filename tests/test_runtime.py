from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest

from qcompiler import runtime, threads
from qcompiler.errors import UserError
from tests.support import model_from_text

CONV = """g (float[1,8,8,8] x) => (float[1,8,8,8] y) {
    c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w)
    y = Relu (c)
}"""
WEIGHT = np.random.default_rng(0).standard_normal((8, 8, 3, 3)).astype(np.float32)
FEEDS = {"x": np.random.default_rng(1).standard_normal((1, 8, 8, 8)).astype(np.float32)}


@pytest.fixture
def model() -> onnx.ModelProto:
    return model_from_text(CONV, {"w": WEIGHT})


def test_model_bytes_and_path_give_the_same_session(model, tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    [wanted] = runtime.run(runtime.session(model), FEEDS)
    for form in (model.SerializeToString(), path):
        [got] = runtime.run(runtime.session(form), FEEDS)
        np.testing.assert_array_equal(got, wanted)
    assert wanted.min() == 0 < wanted.max()


def test_only_the_cpu_provider_is_used(model):
    assert runtime.session(model).get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize(
    "feeds",
    [
        {},
        {"z": FEEDS["x"]},
        {"x": FEEDS["x"].astype(np.float64)},
        {"x": FEEDS["x"][0]},
        {"x": FEEDS["x"][:, :4]},
    ],
    ids=["none", "name", "dtype", "rank", "shape"],
)
def test_wrong_feeds_are_the_users_error(model, feeds, capfd):
    with pytest.raises(UserError, match=r"does not take these inputs: .*x"):
        runtime.run(runtime.session(model), feeds)
    assert capfd.readouterr() == ("", "")


def test_a_failing_operator_is_a_runtime_error_and_silent(capfd):
    model = model_from_text("g (float[N] x, int64[K] s) => (float[M,L] y) { y = Reshape (x, s) }")
    session = runtime.session(model)
    with pytest.raises(RuntimeError, match=r"does not run the model: .*Reshape"):
        runtime.run(session, {"x": np.zeros(6, np.float32), "s": np.array([4, 2])})
    assert capfd.readouterr() == ("", "")


def test_a_model_that_does_not_load_is_a_runtime_error(capfd):
    with pytest.raises(RuntimeError, match=r"does not load the model: .*protobuf"):
        runtime.session(b"not a model")
    with pytest.raises(RuntimeError, match=r"does not load the model: .*NoSuchOp"):
        runtime.session(model_from_text("g (float[N] x) => (float[N] y) { y = NoSuchOp (x) }"))
    assert capfd.readouterr() == ("", "")


def test_optimized_ops_counts_the_kernels_that_run(model):
    kernels = runtime.optimized_ops(model)
    assert "Relu" not in kernels, "fused into Conv"
    assert sum(count for op, count in kernels.items() if op.endswith("Conv")) == 1
    assert kernels == runtime.optimized_ops(model.SerializeToString())


def test_optimized_ops_sees_subgraphs():
    model = model_from_text("""g (bool c, float[4] x) => (float[4] y) {
        y = If (c) <then_branch = t () => (float[4] a) { a = Sin (x) }, else_branch = e () => (float[4] b) { b = Cos (x) }>
    }""")
    assert runtime.optimized_ops(model) == {"If": 1, "Sin": 1, "Cos": 1}


def test_unoptimized_sessions_keep_all_nodes(model, tmp_path):
    path = tmp_path / "o.onnx"
    runtime.session(model, optimize=False, optimized=path)
    assert [n.op_type for n in onnx.load(path, load_external_data=False).graph.node] == ["Conv", "Relu"]


def test_low_memory_order_changes_no_result(model):
    [a] = runtime.run(runtime.session(model), FEEDS)
    [b] = runtime.run(runtime.session(model, low_memory=True), FEEDS)
    np.testing.assert_array_equal(a, b)


def test_consume_leaves_the_model_empty(model):
    [wanted] = runtime.run(runtime.session(model), FEEDS)
    [got] = runtime.run(runtime.session(model, consume=True), FEEDS)
    np.testing.assert_array_equal(got, wanted)
    assert model.ByteSize() == 0


def test_a_session_does_not_keep_the_bytes_of_its_model(model):
    data = model.SerializeToString()
    count = sys.getrefcount(data)
    session = runtime.session(data)
    assert sys.getrefcount(data) == count
    runtime.run(session, FEEDS)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_run_all_returns_the_rows_in_order(model, workers, monkeypatch):
    monkeypatch.setattr(threads, "WORKERS", workers)
    session = runtime.session(model)
    samples = [{"x": FEEDS["x"] * scale} for scale in (1, 2, 3, 4, 5, 6, 7)]
    for [got], feeds in zip(runtime.run_all(session, samples), samples, strict=True):
        np.testing.assert_array_equal(got, runtime.run(session, feeds)[0])
    assert runtime.run_all(session, []) == []


def test_profile_writes_a_trace(model, tmp_path):
    session = runtime.session(model, profile=tmp_path / "trace")
    runtime.run(session, FEEDS)
    session.end_profiling()
    assert [p.suffix for p in tmp_path.glob("trace*")] == [".json"]


def test_race_tells_the_slower_of_two():
    light = model_from_text("g (float[N] x) => (float[N] y) { y = Neg (x) }")
    heavy = model_from_text(
        "g (float[N] x) => (float[N] y) { "
        + "".join(f"{'y' if i == 19 else f't{i}'} = Sin ({'x' if i == 0 else f't{i - 1}'}) " for i in range(20))
        + "}"
    )
    feeds = {"x": np.ones(50_000, np.float32)}
    a, b = runtime.race(runtime.session(light), runtime.session(heavy), feeds, seconds=0.1)
    assert 0 < 3 * a < b


def test_what_only_the_compiler_runs_has_no_paddings_joined_into_pools_that_refuse_them() -> None:
    text = "g (float[1,1,8,8] x) => (float[] y) { a = Pad(x, p) b = Pad(a, p) y = MaxPool<kernel_shape=[2,2]>(b) }"
    model = model_from_text(text, {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1])})
    [result] = runtime.run(runtime.session(model, low_memory=True), {"x": FEEDS["x"][:, :1]})
    assert result.shape == (1, 1, 11, 11)
