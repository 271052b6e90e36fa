"""migrate-scales moves factors from LayerNormalization into the weights that read it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from qcompiler_passes.migrate_scales import MigrateScales
from qcompiler_passes.normalize_gemm import NormalizeGemm

from qcompiler import ir
from qcompiler.state import CompileState
from qcompiler.text import format_graph
from tests.forms import TO_QDQ, advance, compiled, graph_text, weights
from tests.support import assert_same_function, random_feeds, run

SPREAD = np.float32(2.0) ** np.linspace(0, -5, 8, dtype=np.float32)

ATTENTION = """g (float[N,5,8] x) => (float[N,5,4] y, float[N,5,4] z) {
    l = LayerNormalization<axis=-1>(x, gamma, beta)
    q = MatMul(l, w)
    y = Add(q, b)
    z = MatMul(l, v)
}"""


def _model(text: str = ATTENTION) -> onnx.ModelProto:
    given = {
        "gamma": SPREAD,
        "beta": weights(8) * SPREAD,
        "w": weights(4, 8).T / SPREAD[:, None],
        "v": weights(4, 8, seed=1).T / SPREAD[:, None],
        "b": weights(4),
    }
    return graph_text(text, **{name: array for name, array in given.items() if name in text})


def _migrated(model: onnx.ModelProto, beta: float = 0.0) -> tuple[CompileState, int]:
    state = compiled(model, NormalizeGemm())
    count = MigrateScales(beta=beta).run(state)
    advance(state)
    return state, count


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_keeps_the_function_and_a_second_run_changes_nothing(beta: float) -> None:
    state, count = _migrated(_model(), beta)
    assert count == 1
    assert_same_function(_model(), ir.to_proto(state.graph))
    before = format_graph(state.graph)
    assert MigrateScales(beta=beta).run(state) == 0
    assert format_graph(state.graph) == before


def test_evens_out_what_the_normalization_gives() -> None:
    state, _ = _migrated(_model())
    node = next(n for n in state.graph.nodes if n.op == "LayerNormalization")
    gamma = np.abs(ir.array(node.inputs[1]))
    assert gamma.max() / gamma.min() < 0.5 * SPREAD.max() / SPREAD.min()


def test_quantization_loses_less() -> None:
    model = _model()
    samples = [random_feeds(model, seed) for seed in range(4)]

    def error(state: CompileState) -> float:
        quantized = ir.to_proto(advance(state, *TO_QDQ).graph)
        return sum(
            float(np.square(a - b).sum())
            for s in samples
            for a, b in zip(run(quantized, s), run(model, s), strict=True)
        )

    assert error(_migrated(model)[0]) < 0.6 * error(compiled(model, NormalizeGemm()))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            """g (float[1,5,8] x) => (float[1,5,8] y) {
                l = LayerNormalization<axis=-1>(x, gamma, beta)
                y = Softmax(l)
            }""",
            "Softmax does not pass a factor on",
        ),
        (
            """g (float[1,5,8] x) => (float[1,5,8] l) {
                l = LayerNormalization<axis=-1>(x, gamma, beta)
            }""",
            "the result is a graph output",
        ),
        (
            """g (float[1,5,8] x) => (float[1,5,4] y, float[1,5,8] z) {
                l = LayerNormalization<axis=-1>(x, gamma, beta)
                y = MatMul(l, w)
                z = Add(l, x)
            }""",
            "its channels are tied to some that must stay as they are",
        ),
    ],
)
def test_refuses_where_another_reader_needs_the_values(text: str, reason: str) -> None:
    state, count = _migrated(_model(text))
    assert count == 0
    assert state.refusals["LayerNormalization_l"].reason == reason
