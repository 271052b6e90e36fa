"""select-kernels: the fused kernel in the place of the integers that it computes."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
from qcompiler_passes.select_kernels import SelectKernels
from qcompiler_passes.targets import INTEGER, ORT_CPU

from qcompiler import ir
from qcompiler.state import CompileState
from qcompiler.target import Target
from qcompiler.text import format_graph
from tests.forms import TO_INTEGER, TO_KERNELS, all_forms, assert_bit_identical, compiled, graph_text, weights

CONSTANTS = {
    "w": weights(4, 4, 1, 1),
    "w1": weights(4, 4, 1, 1, seed=1),
    "bias": weights(4),
    "wm": weights(4, 6),
    "wm2": weights(6, 3),
    "bm": weights(6),
    "half": 0.5,
    "rows": weights(1, 1, 2, 2),
    "rank3": [1, 4, 4],
}


def model_of(body: str, outputs: str = "float[] y") -> onnx.ModelProto:
    words = body.replace("(", " ").replace(",", " ").replace(")", " ").split()
    needed = {k: v for k, v in CONSTANTS.items() if k in words}
    return graph_text(f"g (float[1,4,2,2] x) => ({outputs}) {{ {body} }}", **needed)


def kernels(body: str, target: Target = ORT_CPU, outputs: str = "float[] y") -> CompileState:
    return compiled(model_of(body, outputs), *TO_KERNELS, target=target)


def ops(state: CompileState) -> list[str]:
    return [n.op for n in state.graph.nodes]


def test_a_small_net_line_by_line() -> None:
    state = kernels("a = Conv<strides=[2,2]>(x, w, bias) r = Relu(a) f = Flatten(r) y = MatMul(f, wm)")
    text = format_graph(state.graph).splitlines()
    s_x, s_r = (f"{float(state.params[n].scale):g}" for n in ("x", "r"))
    zero = state.params["x"].zero_point
    assert text[0] == "inputs: x:float32[1,4,2,2]"
    assert text[1] == f"x_q = QuantizeLinear(x, {s_x}, {zero})"
    assert text[2].startswith(f"r_raw_q = QLinearConv{{strides=[2,2]}}(x_q, {s_x}, {zero}, int8[4,4,1,1]#")
    assert f", {s_r}, 0, int32[4]#" in text[2]
    assert text[3] == "f_raw_q = Flatten(r_raw_q)"
    assert text[4].startswith("y = com.microsoft.MatMulIntegerToFloat(f_raw_q, int8[4,6]#")
    assert text[5:] == ["outputs: y:float32[1,6]"]


@pytest.mark.parametrize(
    ("body", "kernel"),
    [
        ("y = Conv(x, w)", "QLinearConv"),
        ("a = Conv(x, w) b = Conv(x, w1) s = Add(a, b) y = Conv(s, w)", "QLinearAdd"),
        ("a = Conv(x, w) s = Add(a, a) y = Conv(s, w)", "QLinearAdd"),
        ("a = Conv(x, w) s = Add(rows, a) y = Conv(s, w)", "QLinearAdd"),
        ("a = Conv(x, w) s = Mul(a, a) y = Conv(s, w)", "QLinearMul"),
        ("a = Conv(x, w) s = GlobalAveragePool(a) y = Conv(s, w)", "QLinearGlobalAveragePool"),
        ("a = Conv(x, w) s = Sigmoid(a) y = Conv(s, w)", "QLinearSigmoid"),
        ("a = Conv(x, w) s = LeakyRelu<alpha=0.2>(a) y = Conv(s, w)", "QLinearLeakyRelu"),
        ("p = GlobalAveragePool(x) f = Flatten(p) g = Gemm(f, wm, bm) y = MatMul(g, wm2)", "QGemm"),
        ("p = GlobalAveragePool(x) f = Flatten(p) g = MatMul(f, wm) y = MatMul(g, wm2)", "QLinearMatMul"),
        ("p = GlobalAveragePool(x) f = Flatten(p) y = Gemm(f, wm, bm)", "QGemm"),
        ("p = GlobalAveragePool(x) f = Flatten(p) y = MatMul(f, wm)", "MatMulIntegerToFloat"),
    ],
)
def test_every_kernel(body: str, kernel: str) -> None:
    forms = all_forms(model_of(body))
    found = [n.op_type for n in forms.kernels.graph.node]
    assert kernel in found
    assert not {"Requantize", "Rescale", "Table", "ConvInteger", "MatMulInteger"} & set(found)
    assert_bit_identical(forms)


def test_matmul_of_rank_three() -> None:
    forms = all_forms(model_of("a = Conv(x, w) t = Reshape(a, rank3) g = MatMul(t, wm) y = MatMul(g, wm2)"))
    assert [n.op_type for n in forms.kernels.graph.node][-2:] == ["QLinearMatMul", "MatMulIntegerToFloat"]
    assert_bit_identical(forms)


def test_a_gemm_with_float_and_quantized_readers() -> None:
    body = "p = GlobalAveragePool(x) f = Flatten(p) g = Gemm(f, wm, bm) z = Softmax(g) y = MatMul(g, wm2)"
    forms = all_forms(model_of(body, "float[] y, float[] z"))
    assert_bit_identical(forms)
    gemm = next(n for n in forms.kernels.graph.node if n.op_type == "QGemm")
    assert len(gemm.input) == 9, "it has a scale and a zero point for its result"


def test_concat_takes_the_rescaling_tables_into_its_kernel() -> None:
    body = "a = Conv(x, w) b = Mul(a, half) c = Conv(b, w) s = Concat<axis=2>(a, b, c) y = Conv(s, w)"
    state = kernels(body)
    assert "QLinearConcat" in ops(state)
    assert "Table" not in ops(state)
    assert_bit_identical(all_forms(model_of(body)))


def test_a_function_whose_result_concat_reads_as_it_is_is_no_gather() -> None:
    state = kernels(
        "a = Conv(x, w) t = Tanh(a) p = MaxPool<kernel_shape=[1,1]>(t) s = Concat<axis=2>(t, p) y = Conv(s, w)"
    )
    assert "Table" not in ops(state)
    assert {"Tanh", "MaxPool", "Concat"} <= set(ops(state))


def test_concat_of_one_scale_stays_a_plain_concat() -> None:
    state = kernels("a = Conv(x, w) s = Concat<axis=2>(a, a) y = Conv(s, w)")
    assert "Concat" in ops(state)


def test_functions_without_a_kernel_run_in_float_between_dq_and_q() -> None:
    state = kernels("a = Conv(x, w) t = HardSwish(a) y = Conv(t, w)")
    assert ops(state) == [
        "QuantizeLinear", "QLinearConv", "DequantizeLinear", "HardSwish", "QuantizeLinear", "QLinearConv",
        "DequantizeLinear",
    ]  # fmt: skip


def test_tensors_around_a_float_function_keep_type_and_shape() -> None:
    state = kernels("a = Conv(x, w) t = HardSwish(a) y = Conv(t, w)")
    before, after = (
        [(t.name, ir.type_name(t), ir.shape(t)) for t in ir.tensors(s.graph) if not ir.is_constant(t)]
        for s in (state, state.clone())
    )
    assert all(kind != "?" and shape for _, kind, shape in before)
    assert before == after


def test_the_integer_target_keeps_the_integer_form() -> None:
    body = "a = Conv(x, w) t = HardSwish(a) s = Add(a, t) y = Conv(s, w)"
    state = compiled(model_of(body), *TO_INTEGER, target=INTEGER)
    before = format_graph(state.graph)
    assert SelectKernels().run(state) == 0
    assert format_graph(state.graph) == before


def test_a_target_without_one_kernel_keeps_that_operator_integer() -> None:
    target = replace(ORT_CPU, kernels=ORT_CPU.kernels - {"com.microsoft.QLinearAdd"})
    body = "a = Conv(x, w) b = Conv(x, w1) s = Add(a, b) y = Conv(s, w)"
    state = kernels(body, target)
    assert ops(state).count("QLinearConv") == 3
    assert ops(state).count("Rescale") == 2
    assert ops(state).count("Requantize") == 1
    assert_bit_identical(all_forms(model_of(body), target))


def test_layers_know_where_they_came_from() -> None:
    state = kernels("a = Conv(x, w) r = Relu(a) s = Add(r, r) y = Conv(s, w)")
    origins = {n.op: state.origin[n.name] for n in state.graph.nodes if n.op.startswith("QLinear")}
    assert origins["QLinearAdd"] == ("Add_s",)
    assert ("Conv_a", "Relu_r") in [state.origin[n.name] for n in state.graph.nodes]


def test_a_second_run_returns_zero() -> None:
    state = kernels("a = Conv(x, w) t = Tanh(a) s = Add(a, t) y = Conv(s, w)")
    before = format_graph(state.graph)
    assert SelectKernels().run(state) == 0
    assert format_graph(state.graph) == before


def test_the_limit_of_bisection_selects_only_so_many() -> None:
    state = compiled(model_of("a = Conv(x, w) y = Conv(a, w1)"), *TO_INTEGER)
    state.rewrite_limit = 1
    assert SelectKernels().run(state) == 1
    assert ops(state).count("QLinearConv") == 1
    assert ops(state).count("ConvInteger") == 1


def test_bytes_do_not_depend_on_the_run() -> None:
    body = "a = Conv(x, w) t = Tanh(a) s = Add(a, t) c = Concat<axis=2>(s, a) y = Conv(c, w)"
    one, two = (all_forms(model_of(body)).kernels.SerializeToString(deterministic=True) for _ in range(2))
    assert one == two
