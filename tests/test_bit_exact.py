"""The promise of the project: qdq, integer and kernels compute the same bits, and they are those of integer arithmetic."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from qcompiler_passes.correct_bias import CorrectBias
from qcompiler_passes.fold_scales import FoldScales
from qcompiler_passes.insert_qdq import InsertQdq
from qcompiler_passes.lower_integer import LowerInteger
from qcompiler_passes.scale_weights import ScaleWeights
from qcompiler_passes.select_kernels import SelectKernels
from qcompiler_passes.targets import INTEGER, ORT_CPU, ORT_CPU_AVX2

from qcompiler import ir, quant
from qcompiler.runtime import run, session
from qcompiler.target import Target
from tests.forms import (
    TO_QDQ,
    Forms,
    advance,
    all_forms,
    assert_bit_identical,
    compiled,
    graph_text,
    ops_between,
    weights,
)
from tests.nets import PARTS, Net, Part, affine, classify, plain, random_net, relu, residual, table, twins
from tests.nets import Map as FeatureMap
from tests.support import random_feeds


def net_of(part: Part, seed: int) -> onnx.ModelProto:
    """A stem, one part, a head."""
    net = Net(np.random.default_rng(seed))
    x = relu(net, net.conv(FeatureMap("x", 3, 12), 8, 3))
    return net.model(12, classify(net, part(net, x)))


@pytest.mark.parametrize("part", PARTS, ids=lambda p: p.__name__)
@pytest.mark.parametrize("target", [ORT_CPU, INTEGER], ids=lambda t: t.name)
def test_parts_of_nets(part: Part, target: Target) -> None:
    for seed in range(2):
        forms = all_forms(net_of(part, seed), target)
        assert not ops_between(forms.integer)
        assert_bit_identical(forms)


@pytest.mark.parametrize("seed", range(24))
def test_random_nets(seed: int) -> None:
    target = (ORT_CPU, INTEGER, ORT_CPU_AVX2)[seed % 3]
    forms = all_forms(random_net(seed, parts=5), target)
    assert not ops_between(forms.integer)
    assert_bit_identical(forms)


@pytest.mark.parametrize("seed", [100, 101, 102])
def test_nets_with_searched_weight_scales_and_corrected_biases(seed: int) -> None:
    state = compiled(random_net(seed, parts=3), *TO_QDQ[:-2], ScaleWeights(), CorrectBias(), InsertQdq())
    qdq = ir.to_proto(state.graph)
    integer = ir.to_proto(advance(state, LowerInteger(), FoldScales()).graph)
    assert_bit_identical(Forms(qdq, integer, ir.to_proto(advance(state, SelectKernels()).graph), state))


class GatherElements(OpRun):
    """The evaluator's own takes 64 entries at most; a Table has 256."""

    def _run(self, data: np.ndarray, indices: np.ndarray, axis: int | None = None) -> tuple[np.ndarray]:
        return (np.take_along_axis(data, indices, axis or 0),)


@pytest.mark.parametrize("part", [plain, residual, affine, twins], ids=lambda p: p.__name__)
def test_the_reference_evaluator_agrees(part: Part) -> None:
    """The integer form needs no ONNX Runtime: the NumPy evaluator of the onnx package gives the same bits."""
    net = Net(np.random.default_rng(3))
    x = part(net, table(net, net.conv(FeatureMap("x", 3, 6), 8)))
    model = net.model(6, [net.conv(x, 4).name])
    model.opset_import[0].version = 19  # the first whose DequantizeLinear the evaluator knows
    integer = all_forms(model, INTEGER).integer
    feeds = random_feeds(integer)
    evaluator = ReferenceEvaluator(inline_local_functions(integer), new_ops=[GatherElements])
    for got, wanted in zip(evaluator.run(None, feeds), run(session(integer), feeds), strict=True):
        np.testing.assert_array_equal(got, wanted)


def conv_by_hand(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """A 3x3 convolution of zero-padded int64 [1, C, H, W] with [O, C, 3, 3]."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, w)


def test_numpy_integers_give_the_same_bits() -> None:
    """Conv, Relu, Add, Flatten and Gemm once more, from the params table and integers alone."""
    model = graph_text(
        """g (float[1,3,6,6] x) => (float[1,5] y) {
            c = Conv<pads=[1,1,1,1]>(x, w1, b1)
            r = Relu(c)
            d = Conv<pads=[1,1,1,1]>(r, w2, b2)
            s = Add(d, r)
            f = Flatten(s)
            y = Gemm(f, w3, b3)
        }""",
        w1=weights(8, 3, 3, 3),
        b1=weights(8),
        w2=weights(8, 8, 3, 3),
        b2=weights(8),
        w3=weights(288, 5) / 17,
        b3=weights(5),
    )
    forms = all_forms(model, INTEGER)
    known = {t.name: onnx.numpy_helper.to_array(t).astype(np.int64) for t in forms.qdq.graph.initializer}
    params = forms.state.params
    p = {k: params[k] for k in ("x", "r", "d", "s", "y")}

    def requantized(acc: np.ndarray, s_in: str, weight: str, out: str) -> np.ndarray:
        m = quant.multiplier(quant.rescale(p[s_in].scale, params[weight].scale, p[out].scale))
        m = m.reshape(-1, 1, 1) if acc.ndim == 4 else m
        return quant.requantize(acc, m, p[out].zero_point, p[out].spec).astype(np.int64)

    feeds = random_feeds(model)
    x = quant.quantize(feeds["x"], p["x"]).astype(np.int64) - p["x"].zero_point
    r = requantized(conv_by_hand(x, known["w1_q"]) + known["b1_q"].reshape(-1, 1, 1), "x", "w1", "r")
    d = conv_by_hand(r - p["r"].zero_point, known["w2_q"]) + known["b2_q"].reshape(-1, 1, 1)
    s = quant.add(requantized(d, "r", "w2", "d"), r, p["d"], p["r"], p["s"])
    f = s.reshape(1, -1).astype(np.int64) - p["s"].zero_point
    y = requantized(f @ known["w3_q"] + known["b3_q"], "s", "w3", "y")
    expected = quant.dequantize(y.astype(np.uint8), p["y"])
    for form in (forms.qdq, forms.integer, forms.kernels):
        np.testing.assert_array_equal(run(session(form), feeds)[0], expected)
