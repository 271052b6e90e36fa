"""expand-operators: the float function stays, and what is made of it is integer arithmetic in every form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from qcompiler_passes.expand_operators import ExpandOperators
from qcompiler_passes.interleave import Axis
from qcompiler_passes.targets import INTEGER, ORT_CPU

from qcompiler import compile_model, ir
from qcompiler.runtime import run, session
from qcompiler.state import CompileState
from qcompiler.target import Target
from tests.forms import all_forms, assert_bit_identical, inferred, ops_between, weights
from tests.support import model_from_text, random_feeds, state_of

TARGET = replace(ORT_CPU, rewrites=frozenset({"conv-transpose-as-conv", "interpolation-as-product", "pool-as-reduce"}))


def expanded(
    text: str, target: Target = TARGET, opset: int = 18, **constants: Any
) -> tuple[onnx.ModelProto, CompileState]:
    """The model before, and the state behind the pass."""
    model = inferred(model_from_text(text, constants, opset))
    state = state_of(model, target)
    ExpandOperators().run(state)
    return model, state


def assert_same(text: str, shape: tuple[int, ...], opset: int = 18, /, **constants: Any) -> list[str]:
    """The pass changes the model, but not what it computes; returns the operators."""
    model, state = expanded(text, opset=opset, **constants)
    assert not state.refusals
    after = ir.to_proto(state.graph)
    feeds = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    [wanted], [got] = (run(session(m), feeds) for m in (model, after))
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, atol=2e-4)
    assert ExpandOperators().run(state) == 0
    return [n.op_type for n in after.graph.node]


def numbers(values: Any) -> str:
    return "[" + ",".join(str(int(v)) for v in values) + "]"


def conv_transposes() -> Iterator[Any]:
    rng = np.random.default_rng(5)
    for _ in range(40):
        kernel, strides, dilations = rng.integers(1, 5, 2), rng.integers(1, 4, 2), rng.integers(1, 3, 2)
        extent = (kernel - 1) * dilations + 1
        attrs = {
            "group": rng.choice([1, 2, 4]),
            "strides": numbers(strides),
            "dilations": numbers(dilations),
            "output_padding": numbers(rng.integers(0, strides)),
        }
        where = rng.choice(["pads", "SAME_UPPER", "SAME_LOWER", "VALID", "output_shape"], p=[0.6, 0.1, 0.1, 0.1, 0.1])
        if where == "pads":
            attrs["pads"] = numbers(rng.integers(0, np.tile(extent, 2)))
        elif where == "output_shape":
            attrs["output_shape"] = numbers(strides * [4, 5] + extent - rng.integers(0, extent))
        else:
            attrs["auto_pad"] = f'"{where}"'
        text = ", ".join(f"{k}={v}" for k, v in attrs.items())
        yield pytest.param(text, tuple(int(k) for k in kernel), id=text.replace('"', ""))


@pytest.mark.parametrize(("attrs", "kernel"), [*conv_transposes()])
def test_conv_transpose_of_any_geometry(attrs: str, kernel: tuple[int, int]) -> None:
    outputs = 4 // int(attrs.partition("group=")[2][0])
    text = f"g (float[2,4,5,6] x) => (float[] y) {{ c = ConvTranspose<{attrs}>(x, w, b) y = Relu(c) }}"
    ops = assert_same(text, (2, 4, 5, 6), w=weights(4, outputs, *kernel), b=weights(4))
    assert "ConvTranspose" not in ops
    assert ops[:2] == ["Conv", "Relu"]


@pytest.mark.parametrize(
    ("shape", "axes", "attrs"),
    [
        ((2, 4, 7), "N,4,L", "strides=[2], pads=[0,1]"),
        ((2, 4, 7), "N,4,7", "strides=[3], pads=[1,2], output_padding=[1]"),
        ((1, 4, 3, 5), "N,4,H,W", "strides=[2,2], pads=[1,1,1,1]"),
        ((1, 4, 3, 4, 5), "1,4,3,4,5", "strides=[2,1,3], pads=[1,0,0,0,1,0]"),
    ],
)
def test_conv_transpose_of_any_rank_and_size(shape: tuple[int, ...], axes: str, attrs: str) -> None:
    text = f"g (float[{axes}] x) => (float[] y) {{ y = ConvTranspose<{attrs}>(x, w) }}"
    assert_same(text, shape, w=weights(4, 3, *[3] * (len(shape) - 2)))


def test_whole_steps_that_pads_cut_off_are_never_made() -> None:
    assert Axis(kernel=4, stride=2, dilation=1, begin=2, end=2).crops == (0, 0)
    assert Axis(kernel=4, stride=2, dilation=1, begin=1, end=3).crops == (1, 1)
    assert Axis(kernel=2, stride=2, dilation=1, begin=0, end=2).pads == (0, 0)


INTERPOLATIONS = [
    f'mode="{mode}", coordinate_transformation_mode="{where}"{extra}'
    for mode in ("linear", "cubic")
    for where in ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")
    for extra in ("", ", antialias=1", *([", exclude_outside=1", ", cubic_coeff_a=-0.5"] if mode == "cubic" else []))
]


@pytest.mark.parametrize("attrs", INTERPOLATIONS)
def test_resize_by_scales_and_to_sizes(attrs: str) -> None:
    text = f"g (float[2,3,6,7] x) => (float[] y) {{ y = Resize<{attrs}>(x, , given) }}"
    for scales in ([2, 2], [3, 1], [0.5, 0.5], [1.5, 4]):
        assert_same(text, (2, 3, 6, 7), given=np.float32([1, 1, *scales]))
    text = f"g (float[2,3,6,7] x) => (float[] y) {{ y = Resize<{attrs}>(x, , , given) }}"
    for sizes in ([12, 14], [9, 5]):
        assert_same(text, (2, 3, 6, 7), given=np.array([2, 3, *sizes]))


def test_resize_by_whole_numbers_needs_no_size() -> None:
    text = 'g (float[N,3,H,W] x) => (float[] y) { y = Resize<mode="linear">(x, , scales) }'
    ops = assert_same(text, (1, 3, 5, 4), scales=np.float32([1, 1, 2, 2]))
    assert ops == ["Pad", "Conv", "DepthToSpace"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('y = Resize<mode="linear">(x, , odd)', "its weights depend on it"),
        (
            'y = Resize<mode="linear", coordinate_transformation_mode="align_corners">(x, , two)',
            "its weights depend on it",
        ),
        (
            'y = Resize<mode="linear", coordinate_transformation_mode="tf_crop_and_resize">(x, roi, two)',
            "not supported",
        ),
        ("y = Resize(x, , two)", "it does not interpolate"),
        ("y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(x)", "its size is not static"),
        ("y = ConvTranspose<strides=[2,3]>(x, w)", "its strides differ"),
        ("y = ConvTranspose<output_shape=[9,9]>(x, w)", "output_shape of an input"),
    ],
)
def test_refusals(text: str, reason: str) -> None:
    given = {
        "odd": np.float32([1, 1, 1.5, 1.5]),
        "two": np.float32([1, 1, 2, 2]),
        "roi": np.float32([0, 0, 0, 0, 1, 1, 1, 1]),
        "w": weights(4, 4, 3, 3),
    }
    used = {k: v for k, v in given.items() if k in text.replace(")", " ").replace(",", " ").split()}
    _, state = expanded(f"g (float[N,4,H,W] x) => (float[] y) {{ {text} }}", **used)
    [refusal] = state.refusals.values()
    assert reason in refusal.reason


def average_pools() -> Iterator[str]:
    rng = np.random.default_rng(6)
    for i in range(30):
        kernel = rng.integers(1, 5, 2)
        pads = "auto_pad=" + '"SAME_UPPER"' if i % 4 == 0 else f"pads={numbers(rng.integers(0, np.tile(kernel, 2)))}"
        dilations = ", dilations=[2,1]" if i % 5 == 0 else ""
        windows = f"kernel_shape={numbers(kernel)}, strides={numbers(rng.integers(1, 4, 2))}, {pads}{dilations}"
        yield f"{windows}, ceil_mode={i % 2}, count_include_pad={i // 2 % 2}"


@pytest.mark.parametrize("attrs", [*average_pools()])
def test_average_pool_of_any_geometry(attrs: str) -> None:
    ops = assert_same(f"g (float[2,3,8,9] x) => (float[] y) {{ y = AveragePool<{attrs}>(x) }}", (2, 3, 8, 9), 19)
    assert set(ops) <= {"Transpose", "MatMul"}


def test_pools_of_any_size_are_reductions() -> None:
    text = "g (float[N,2,H,W] x) => (float[] y) { a = GlobalAveragePool(x) m = GlobalMaxPool(x) y = Add(a, m) }"
    assert assert_same(text, (1, 2, 5, 6)) == ["ReduceMean", "ReduceMax", "Add"]
    assert assert_same(text, (1, 2, 5, 6), 17) == ["ReduceMean", "ReduceMax", "Add"]


@pytest.mark.parametrize(
    ("channels", "kernel", "attrs", "pays"),
    [(16, 2, "", False), (16, 3, "", False), (16, 4, "", True), (8, 4, "", False), (32, 4, ", group=2", False)],
)
def test_ort_cpu_takes_what_is_dense_and_overlaps_evenly(channels: int, kernel: int, attrs: str, pays: bool) -> None:
    text = f"g (float[1,{channels},5,5] x) => (float[] y) {{ y = ConvTranspose<strides=[2,2]{attrs}>(x, w) }}"
    _, state = expanded(text, ORT_CPU, w=weights(channels, 4, kernel, kernel))
    assert ("Conv" in [n.op for n in state.graph.nodes]) == pays


def test_what_the_user_keeps_in_float_stays() -> None:
    model = model_from_text(
        "g (float[1,4,5,5] x) => (float[] y) { y = ConvTranspose<strides=[2,2]>(x, w) }", {"w": weights(4, 4, 4, 4)}
    )
    state = state_of(model, INTEGER)
    state.keep_float = {"y": "kept in float"}
    assert ExpandOperators().run(state) == 0


LAYERS = {
    "ConvTranspose": "m = ConvTranspose<strides=[2,2], pads=[1,1,0,0], output_padding=[1,0]>(a, w_t, bias) y = Relu(m)",
    "ConvTranspose, groups": "m = ConvTranspose<group=2, strides=[2,1], dilations=[1,2]>(a, w_g) y = Sigmoid(m)",
    "Resize linear": 'm = Resize<mode="linear">(a, , two) y = Relu(m)',
    "Resize cubic": 'y = Resize<mode="cubic", coordinate_transformation_mode="align_corners">(a, , , sizes)',
    "AveragePool": "y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(a)",
    "AveragePool, ceil": "y = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[0,1,1,1], ceil_mode=1>(a)",
}


@pytest.mark.parametrize("layer", LAYERS)
def test_integers_in_every_form(layer: str) -> None:
    """Compiled between layers for the integer target: no float operator is left, all forms agree, and the error is rounding."""
    given = {
        "w_t": weights(8, 8, 3, 3),
        "w_g": weights(8, 4, 3, 3),
        "bias": weights(8),
        "two": np.float32([1, 1, 2, 2]),
        "sizes": np.array([1, 8, 13, 9]),
    }
    used = {k: v for k, v in given.items() if k in LAYERS[layer]}
    text = f"g (float[1,3,8,8] x) => (float[] z) {{ i = Conv(x, w_i) a = Relu(i) {LAYERS[layer]} z = Conv(y, w_o) }}"
    model, state = expanded(text, INTEGER, w_i=weights(8, 3, 1, 1), w_o=weights(4, 8, 1, 1), **used)
    forms = all_forms(inferred(ir.to_proto(state.graph)), INTEGER)
    assert not [b.reason for b in forms.state.blocks.values() if b.reason]
    assert not ops_between(forms.integer)
    assert_bit_identical(forms)
    feeds = random_feeds(model, 1000)  # one of those that calibrated it
    [wanted], [got] = (run(session(m), feeds) for m in (model, forms.integer))
    assert 10 * np.log10(np.square(wanted).sum() / np.square(wanted - got).sum()) > 25


def test_a_network_of_any_size_has_no_float_operator() -> None:
    """PRelu, squeeze and excitation, Resize, ConvTranspose through the default pipeline: all forms agree at every size."""
    model = model_from_text(
        """g (float[N,3,H,W] x) => (float[N,2,K,L] y) {
            a = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w_a)
            b = PRelu(a, slopes)
            p = GlobalAveragePool(b)
            q = Conv(p, w_q)
            s = HardSigmoid(q)
            e = Mul(b, s)
            c = Conv<strides=[2,2], pads=[1,1,1,1]>(e, w_c)
            d = Relu(c)
            u = Resize<mode="linear">(d, , two)
            v = Concat<axis=1>(u, e)
            t = ConvTranspose<strides=[2,2]>(v, w_t)
            r = Relu(t)
            y = Conv(r, w_y)
        }""",
        {
            "w_a": weights(8, 3, 3, 3),
            "slopes": np.linspace(-0.3, 0.7, 8, dtype=np.float32).reshape(8, 1, 1),
            "w_q": weights(8, 8, 1, 1),
            "w_c": weights(8, 8, 3, 3),
            "two": np.float32([1, 1, 2, 2]),
            "w_t": weights(16, 8, 2, 2),
            "w_y": weights(2, 8, 1, 1),
        },
    )
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((1, 3, 16, 8 + 4 * i)).astype(np.float32)} for i in range(4)]
    results = [compile_model(model, samples, target="integer", emit=form) for form in ("qdq", "integer", "kernels")]
    assert all(layer.quantized for layer in results[0].report.layers)
    assert not ops_between(results[1].model)
    float_session, *sessions = (session(m) for m in (model, *(r.model for r in results)))
    for feeds in samples:
        [wanted], *got = ([*run(s, feeds)] for s in (float_session, *sessions))
        assert (got[0][0] == got[1][0]).all()
        assert (got[0][0] == got[2][0]).all()
        assert 10 * np.log10(np.square(wanted).sum() / np.square(wanted - got[0][0]).sum()) > 25
