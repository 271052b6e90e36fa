from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from qcompiler_passes.normalize_pooling import NormalizePooling, average_pool, spatial_mean

from qcompiler.rewrite import Refusal, Rewriter
from tests.support import TEST_TARGET, assert_same_function, model_from_text, ops_of, run_passes, state_of

AS_CONV = replace(TEST_TARGET, rewrites=frozenset({"average-pool-as-conv"}))


def _model(body: str, shape: str = "2,3,8,9", opset: int = 17, **arrays: np.ndarray) -> onnx.ModelProto:
    text = f"g (float[{shape}] x) => (float y) {{ y = {body} }}"
    model = model_from_text(text, arrays, opset)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def _check(model: onnx.ModelProto, ops: list[str], dynamic: bool = False) -> onnx.ModelProto:
    after, state = run_passes(model, NormalizePooling(), target=AS_CONV)
    assert ops_of(after) == ops
    assert_same_function(model, after)
    assert NormalizePooling().run(state) == 0
    return after


def _refusal(model: onnx.ModelProto, target=AS_CONV) -> Refusal:
    state = state_of(model, target)
    node = state.graph.nodes[-1]
    refusal = {"ReduceMean": spatial_mean, "AveragePool": average_pool}[node.op](Rewriter(state), node)
    assert refusal is not None
    assert refusal.culprit
    after, state = run_passes(model, NormalizePooling(), target=target)
    assert ops_of(after) == ops_of(model)
    return refusal


@pytest.mark.parametrize("axes", ["2, 3", "-1, -2", "3, 2", "-2, 3"])
@pytest.mark.parametrize("shape", ["2,3,8,9", "N,3,H,W"])
def test_spatial_mean_becomes_global_average(axes: str, shape: str) -> None:
    _check(_model(f"ReduceMean<axes = [{axes}]>(x)", shape), ["GlobalAveragePool"])


@pytest.mark.parametrize("opset", [12, 17])
def test_dropped_axes_become_squeeze(opset: int) -> None:
    after = _check(
        _model("ReduceMean<axes = [2, 3], keepdims = 0>(x)", "N,3,8,8", opset), ["GlobalAveragePool", "Squeeze"]
    )
    assert [d.dim_value for d in after.graph.output[0].type.tensor_type.shape.dim] == [0, 3]


@pytest.mark.parametrize("keepdims", [0, 1])
def test_axes_as_input(keepdims: int) -> None:
    model = _model(f"ReduceMean<keepdims = {keepdims}>(x, axes)", "2,3,8,9", 18, axes=np.array([-1, 2]))
    _check(model, ["GlobalAveragePool"] + ["Squeeze"] * (1 - keepdims))


@pytest.mark.parametrize(("shape", "axes"), [("2,3,8", "2"), ("2,3,4,5,6", "2, 3, 4")])
def test_one_and_three_spatial_axes(shape: str, axes: str) -> None:
    _check(_model(f"ReduceMean<axes = [{axes}]>(x)", shape), ["GlobalAveragePool"])


@pytest.mark.parametrize("attrs", ["<axes = [1, 2]>", "<axes = [1]>", "<axes = [2]>", "<axes = [1, 2, 3]>", ""])
def test_other_means_stay(attrs: str) -> None:
    assert "not just all of space" in _refusal(_model(f"ReduceMean{attrs}(x)")).reason


def test_mean_of_squares_stays() -> None:
    model = model_from_text("g (float[2,3,8] x) => (float[2,3,1] y) { p = Mul(x, x) y = ReduceMean<axes = [2]>(p) }")
    assert "mean of squares" in _refusal(onnx.shape_inference.infer_shapes(model)).reason


def test_mean_of_unknown_axes_stays() -> None:
    model = model_from_text(
        "g (float[2,3,4,4] x, int64[2] axes) => (float[N,C,H,W] y) { y = ReduceMean(x, axes) }", opset=18
    )
    assert "not known" in _refusal(model).reason


def test_mean_of_doubles_stays() -> None:
    model = model_from_text("g (double[2,3,4,4] x) => (double[2,3,1,1] y) { y = ReduceMean<axes = [2, 3]>(x) }")
    assert "float32" in _refusal(model).reason


@pytest.mark.parametrize(
    "attrs",
    [
        "",
        ", strides = [8, 9]",
        ", ceil_mode = 1",
        ', auto_pad = "VALID"',
        ", pads = [0, 0, 0, 0], count_include_pad = 1",
    ],
)
def test_window_over_all_of_space(attrs: str) -> None:
    _check(_model(f"AveragePool<kernel_shape = [8, 9]{attrs}>(x)"), ["GlobalAveragePool"])


@pytest.mark.parametrize(
    "attrs",
    [
        "",
        ", strides = [2, 3]",
        ", pads = [1, 0, 0, 1], count_include_pad = 1",
        ", pads = [1, 1, 1, 1], count_include_pad = 1, strides = [2, 1]",
        ", strides = [1, 2], ceil_mode = 1",
        ', auto_pad = "VALID", strides = [2, 2]',
        ', auto_pad = "SAME_UPPER", count_include_pad = 1, strides = [2, 2]',
        ', auto_pad = "SAME_LOWER", count_include_pad = 1',
        ', auto_pad = "SAME_UPPER", strides = [2, 3]',
    ],
)
def test_equal_windows_become_conv(attrs: str) -> None:
    _check(_model(f"AveragePool<kernel_shape = [2, 3]{attrs}>(x)"), ["Conv"])


def test_dilated_windows_become_conv() -> None:
    _check(_model("AveragePool<kernel_shape = [2, 3], dilations = [2, 3]>(x)", opset=19), ["Conv"])


@pytest.mark.parametrize(("shape", "kernel"), [("2,3,8", "2"), ("2,3,4,5,6", "2, 2, 3"), ("N,3,H,W", "2, 2")])
def test_conv_of_any_rank_and_dynamic_size(shape: str, kernel: str) -> None:
    _check(_model(f"AveragePool<kernel_shape = [{kernel}]>(x)", shape), ["Conv"])


@pytest.mark.parametrize(
    ("attrs", "shape", "reason"),
    [
        (", pads = [1, 1, 1, 1]", "2,3,8,9", "count_include_pad=0"),
        (', auto_pad = "SAME_UPPER"', "2,3,8,9", "count_include_pad=0"),
        (', auto_pad = "SAME_LOWER", count_include_pad = 1', "2,3,H,9", "auto_pad=SAME_LOWER"),
        (", strides = [2, 2], ceil_mode = 1", "2,3,9,9", "ceil_mode=1"),
        (", ceil_mode = 1", "2,3,H,9", "ceil_mode=1"),
        ("", "2,C,8,9", "number of channels"),
    ],
)
def test_refusals(attrs: str, shape: str, reason: str) -> None:
    assert reason in _refusal(_model(f"AveragePool<kernel_shape = [2, 2]{attrs}>(x)", shape)).reason


def test_target_must_ask_for_conv() -> None:
    assert "does not ask" in _refusal(_model("AveragePool<kernel_shape = [2, 2]>(x)"), TEST_TARGET).reason


def test_origin_is_the_pool() -> None:
    model = _model("AveragePool<kernel_shape = [2, 2]>(x)")
    model.graph.node[0].name = "pool"
    _, state = run_passes(model, NormalizePooling(), target=AS_CONV)
    assert list(state.origin.values()) == [("pool",)]


@pytest.mark.parametrize("activation", ["Relu(p)", "Clip(p, low, high)"])
def test_activation_moves_before_max_pool(activation: str) -> None:
    text = f"""g (float[1,2,8,8] x) => (float[1,3,h,w] y) {{
        c = Conv(x, k)
        p = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(c)
        y = {activation}
    }}"""
    constants = {"k": np.random.default_rng(0).standard_normal((3, 2, 3, 3)).astype(np.float32)}
    bounds = {"low": np.float32(-0.5), "high": np.float32(1)}
    after = _check(model_from_text(text, constants | bounds), ["Conv", activation.partition("(")[0], "MaxPool"])
    assert [o.name for o in after.graph.output] == ["y"]


def test_activation_stays_behind_max_pool_of_a_tensor_read_elsewhere() -> None:
    text = """g (float[1,2,8,8] x) => (float[1,2,8,8] c, float[1,2,7,7] y) {
        c = Tanh(x)
        p = MaxPool<kernel_shape=[2,2]>(c)
        y = Relu(p)
    }"""
    _check(model_from_text(text), ["Tanh", "MaxPool", "Relu"])
