"""Transformers on the integer target: integers from the first Q to the last DQ, in one arithmetic in all three forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import inliner
from onnx.reference import ReferenceEvaluator
from qcompiler_passes import LEVELS
from qcompiler_passes.insert_qdq import InsertQdq

from qcompiler import compile_model, ir, runtime
from qcompiler.compare import compare
from qcompiler.compile import CompileResult
from qcompiler.errors import UserError
from qcompiler.job import prepare
from qcompiler.plan import CompileOptions
from tests.support import model_from_text

WIDTH, TOKENS, HEADS = 16, 9, 2

TEXT = """
g (float[N,3,6,6] image) => (float[N,5] y) {
    patches = Conv<kernel_shape=[2,2], strides=[2,2]>(image, w_patch, b_patch)
    flat = Reshape(patches, s_flat)
    tokens = Transpose<perm=[0,2,1]>(flat)
    shape = Shape<start=0, end=1>(image)
    class_shape = Concat<axis=0>(shape, s_class)
    class_tokens = Expand(class_token, class_shape)
    all_tokens = Concat<axis=1>(class_tokens, tokens)
    x = Add(all_tokens, position)
    n1 = LayerNormalization<axis=-1>(x, g1, b1)
    q_ = MatMul(n1, w_q)
    qb = Add(q_, b_q)
    qr = Reshape(qb, s_heads)
    q = Transpose<perm=[0,2,1,3]>(qr)
    k_ = MatMul(n1, w_k)
    kr = Reshape(k_, s_heads)
    k = Transpose<perm=[0,2,3,1]>(kr)
    v_ = MatMul(n1, w_v)
    vr = Reshape(v_, s_heads)
    v = Transpose<perm=[0,2,1,3]>(vr)
    scores = MatMul(q, k)
    scaled = Mul(scores, half)
    attention = Softmax<axis=-1>(scaled)
    read = MatMul(attention, v)
    rt = Transpose<perm=[0,2,1,3]>(read)
    rr = Reshape(rt, s_join)
    o = MatMul(rr, w_o)
    x1 = Add(x, o)
    n2 = LayerNormalization<axis=-1>(x1, g2, b2)
    h = MatMul(n2, w_h)
    hb = Add(h, b_h)
    a = Gelu(hb)
    m = MatMul(a, w_m)
    x2 = Add(m, x1)
    n3 = LayerNormalization<axis=-1>(x2, g3, b3)
    c = Gather<axis=1>(n3, first)
    y = Gemm(c, w_y, b_y)
}
"""


def transformer(text: str = TEXT) -> onnx.ModelProto:
    """One block with class token, and channels of the residual stream that differ by a factor of 30."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * scale / np.sqrt(shape[0] if len(shape) > 1 else 1)).astype(np.float32)

    spread = np.geomspace(0.1, 3, WIDTH).astype(np.float32)
    arrays: dict[str, Any] = {
        "w_patch": rng.standard_normal((WIDTH, 3, 2, 2)).astype(np.float32) * spread.reshape(-1, 1, 1, 1) / 3,
        "b_patch": normal(WIDTH),
        "class_token": normal(1, 1, WIDTH),
        "position": normal(1, TOKENS + 1, WIDTH) * spread,
        "half": np.float32(0.5),
        "first": np.int64(0),
        "tokens_axis": np.int64([1]),
        "last_axis": np.int64([-1]),
        "eps": np.float32(1e-5),
        "lowest": np.float32(-np.inf),
        "s_flat": [0, WIDTH, TOKENS],
        "s_class": [1, WIDTH],
        "s_heads": [0, TOKENS + 1, HEADS, WIDTH // HEADS],
        "s_join": [0, TOKENS + 1, WIDTH],
    }
    arrays |= {name: normal(WIDTH, WIDTH, scale=1.5) for name in ("w_q", "w_k", "w_v")}
    arrays |= {"b_q": normal(WIDTH), "w_o": normal(WIDTH, WIDTH) * spread, "b_h": normal(2 * WIDTH)}
    arrays |= {"w_h": normal(WIDTH, 2 * WIDTH), "w_m": normal(2 * WIDTH, WIDTH) * spread, "w_y": normal(WIDTH, 5)}
    arrays |= {f"g{i}": 1 / spread for i in (1, 2, 3)} | {"b_y": normal(5)}
    arrays |= {f"b{i}": normal(WIDTH, scale=0.3) for i in (1, 2, 3)}
    return model_from_text(text, {k: np.asarray(v) for k, v in arrays.items()}, opset=21)


def samples(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"image": rng.standard_normal((1, 3, 6, 6)).astype(np.float32)} for _ in range(count)]


def quantized(text: str = LEVELS["O1"], **options: Any) -> CompileResult:
    return compile_model(transformer(), samples(16), target="integer", passes=text, compare=False, **options)


def outputs(model: onnx.ModelProto) -> np.ndarray:
    runner = runtime.session(model)
    return np.concatenate([runtime.run(runner, feeds)[0] for feeds in samples(40, seed=1)])


def sqnr(model: onnx.ModelProto) -> float:
    wanted = outputs(transformer())
    return float(10 * np.log10(np.square(wanted).sum() / np.square(outputs(model) - wanted).sum()))


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def float_nodes(model: onnx.ModelProto) -> set[str]:
    """The operators that read or write floats, function bodies included."""
    inlined = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(model), strict_mode=True)
    graph = inlined.graph
    floating = {v.name for v in (*graph.input, *graph.output, *graph.value_info) if v.type.tensor_type.elem_type == 1}
    floating |= {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    known = {v.name for v in (*graph.input, *graph.output, *graph.value_info)} | {t.name for t in graph.initializer}
    assert {name for n in graph.node for name in (*n.input, *n.output) if name} <= known
    return {n.op_type for n in graph.node if floating & {*n.input, *n.output}} - {"Shape"}


@pytest.mark.parametrize(
    "options", ["", "{attention=linear}", "{attention_bits=4}", "{attention=linear,attention_bits=4}"]
)
def test_all_between_q_and_dq_is_integer(options: str) -> None:
    result = quantized(LEVELS["O1"].replace(",annotate,", f",annotate{options},"))
    assert all(layer.quantized for layer in result.report.layers)
    assert float_nodes(result.model) == {"QuantizeLinear", "DequantizeLinear"}
    assert [op for op in ops(result.model) if op.endswith("Linear")] == ["QuantizeLinear", "DequantizeLinear"]
    assert ops(result.model).count("IntLayerNorm") == 3
    wanted = ("IntSoftmax", "MatMulInteger") if "linear" in options else ("LogIntSoftmax", "ShiftMatMul")
    assert set(wanted) <= set(ops(result.model))
    assert {"LogIntSoftmax", "IntSoftmax"} - set(wanted) & set(ops(result.model)) != {*wanted}


@pytest.mark.parametrize("attention", ["log2", "linear"])
def test_all_forms_give_the_same_bits(attention: str) -> None:
    model, data = transformer(), samples(16)
    text = LEVELS["O1"].replace(",annotate,", f",annotate{{attention={attention}}},").split(",lower-integer")[0]
    qdq = quantized(text).model
    integer = compile_model(
        model, data, target="integer", passes=f"{text},lower-integer,fold-scales,cleanup", compare=False
    ).model
    kernels = quantized(LEVELS["O1"].replace(",annotate,", f",annotate{{attention={attention}}},")).model
    assert {"IntLayerNorm", "QuantizeLinear", "MatMul"} <= set(ops(qdq))
    np.testing.assert_array_equal(outputs(qdq), outputs(integer))
    np.testing.assert_array_equal(outputs(kernels), outputs(integer))
    feeds = samples(1, seed=1)[0]
    with_reference = ReferenceEvaluator(integer).run(None, feeds)[0]
    np.testing.assert_array_equal(with_reference, runtime.run(runtime.session(integer), feeds)[0])


def test_the_head_may_read_the_mean_of_the_tokens() -> None:
    model = transformer(TEXT.replace("Gather<axis=1>(n3, first)", "ReduceMean<keepdims=0>(n3, tokens_axis)"))
    result = compile_model(model, samples(16), target="integer", passes=LEVELS["O1"], compare=False)
    assert float_nodes(result.model) == {"QuantizeLinear", "DequantizeLinear"}


def test_factors_and_bits_pay() -> None:
    text = LEVELS["O1"]
    best = sqnr(quantized(text).model)
    assert best > 25
    assert best > sqnr(quantized(text.replace(",power-of-two-factors", "")).model) + 2
    assert sqnr(quantized(text.replace(",annotate,", ",annotate{attention_bits=4},")).model) > best - 3


def test_no_factors() -> None:
    off = quantized(LEVELS["O1"].replace("power-of-two-factors", "power-of-two-factors{largest=0}")).model
    without = quantized(LEVELS["O1"].replace(",power-of-two-factors", "")).model
    assert [n.SerializeToString() for n in off.graph.node] == [n.SerializeToString() for n in without.graph.node]


def test_the_default_level_corrects_biases_behind_integer_layers() -> None:
    result = compile_model(transformer(), samples(24), target="integer", emit="integer")
    assert float_nodes(result.model) == {"QuantizeLinear", "DequantizeLinear"}
    assert sqnr(result.model) > 25


def test_any_number_of_quantized_tensors_makes_a_model() -> None:
    options = CompileOptions(target="integer", until="scale-weights", level=1)
    job = prepare(transformer(), samples(16), options)
    job.pipeline.run(job.state)
    for limit in range(0, 40, 3):
        state = job.state.clone()
        state.rewrite_limit = limit
        InsertQdq().run(state)
        assert sqnr(ir.to_proto(state.graph)) > 25, limit


def test_attention_that_others_read_is_linear() -> None:
    model = transformer()
    model.graph.output.append(onnx.helper.make_tensor_value_info("attention", onnx.TensorProto.FLOAT, None))
    result = compile_model(model, samples(8), target="integer", passes=LEVELS["O1"], compare=False)
    assert "IntSoftmax" in ops(result.model)
    assert "LogIntSoftmax" not in ops(result.model)
    probabilities = runtime.run(runtime.session(result.model), samples(1)[0])[1]
    assert np.abs(probabilities.sum(axis=-1) - 1).max() < 0.05


def test_layers_compare_with_the_float_model() -> None:
    result = quantized()
    found = compare(transformer(), result.model, samples(4, seed=2))
    rows = {layer.op: layer for layer in found.layers}
    assert {"LayerNormalization", "Softmax", "MatMul"} <= set(rows)


def test_layers_that_stay_float() -> None:
    result = quantized(keep_float=["attention", "n2"])
    reasons = {layer.op: layer.reason for layer in result.report.layers if "kept" in layer.reason}
    assert reasons == {
        op: f"kept in float as '{name}' asks" for op, name in (("Softmax", "attention"), ("LayerNormalization", "n2"))
    }
    assert {"Softmax", "LayerNormalization", "IntLayerNorm"} <= set(ops(result.model))
    assert sqnr(result.model) > 25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("attention=log3", "attention is log2 or linear, not 'log3'"),
        ("attention_bits=9", "attention_bits is 2 to 8, not 9"),
    ],
)
def test_options(options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        quantized(LEVELS["O1"].replace(",annotate,", f",annotate{{{options}}},"))


def test_other_targets_keep_these_layers_in_float() -> None:
    result = compile_model(transformer(), samples(8), compare=False)
    assert {"Softmax", "LayerNormalization"} <= set(ops(result.model))
    assert not result.model.functions


def test_rms_norms_that_the_opset_lacks_are_integer() -> None:
    written = (
        "sq = Mul(x1, x1) ms = ReduceMean<keepdims=1>(sq, last_axis) me = Add(ms, eps) dv = Sqrt(me) iv = Reciprocal(dv) "
        "nn = Mul(x1, iv) n2 = Mul(nn, g2)"
    )
    model = transformer(TEXT.replace("n2 = LayerNormalization<axis=-1>(x1, g2, b2)", written))
    result = compile_model(model, samples(16), target="integer", emit="integer", passes=LEVELS["O1"], compare=False)
    assert float_nodes(result.model) == {"QuantizeLinear", "DequantizeLinear"}
    assert ops(result.model).count("IntRMSNorm") == 1
    wanted = np.concatenate([runtime.run(runtime.session(model), feeds)[0] for feeds in samples(40, seed=1)])
    assert 10 * np.log10(np.square(wanted).sum() / np.square(outputs(result.model) - wanted).sum()) > 22


def test_masks_from_inputs_give_the_same_bits_in_all_forms() -> None:
    scored = "scaled0 = Mul(scores, half) seen = Cast<to=9>(kept) scaled = Where(seen, scaled0, lowest)"
    text = TEXT.replace("scaled = Mul(scores, half)", scored).replace("image) =>", "image, int64[1,1,1,10] kept) =>")
    model = transformer(text)
    rng = np.random.default_rng(3)
    kept = [(rng.random((1, 1, 1, TOKENS + 1)) < 0.7).astype(np.int64) for _ in range(16)]
    feeds = [s | {"kept": k} for s, k in zip(samples(16), kept, strict=True)]
    text = LEVELS["O1"].split(",lower-integer")[0]
    qdq, integer = (
        compile_model(model, feeds, target="integer", passes=passes, compare=False).model
        for passes in (text, f"{text},lower-integer,fold-scales,cleanup")
    )
    assert {"MaskedLogIntSoftmax", "QuantizeMask"} <= set(ops(integer))
    for given in feeds[:2]:
        first, second, wanted = (runtime.run(runtime.session(m), given)[0] for m in (qdq, integer, model))
        np.testing.assert_array_equal(first, second)
        with np.errstate(over="ignore"):  # -inf times a number is asked for
            np.testing.assert_array_equal(ReferenceEvaluator(integer).run(None, given)[0], second)
        assert 10 * np.log10(np.square(wanted).sum() / np.square(second - wanted).sum()) > 15
