"""Replay gives the values that one run of the whole graph gives, and sees changes made before a stop."""

from __future__ import annotations

import numpy as np
import onnx

from qcompiler import ir
from qcompiler.replay import Replay
from tests.support import model_from_text, run

TEXT = """g (float[1,4] x) => (float[1,4] y) {
    a = Add(x, one)
    b = Mul(a, two)
    c = Add(b, a)
    y = Sub(c, x)
}"""
CONSTANTS = {"one": np.float32(1), "two": np.float32(2)}
SAMPLES = [{"x": np.arange(4, dtype=np.float32)[None] + i} for i in range(3)]


def _graph() -> tuple[ir.Graph, dict[str, ir.Tensor]]:
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(model_from_text(TEXT, CONSTANTS)))
    return graph, {t.name: t for t in ir.tensors(graph)}


def test_stops_have_the_values_of_a_whole_run() -> None:
    graph, tensors = _graph()
    replay = Replay(graph, SAMPLES, [tensors[name] for name in ("a", "c", "y")])
    model = model_from_text(TEXT, CONSTANTS)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in ("a", "c"))
    whole = [dict(zip(("y", "a", "c"), run(model, sample), strict=True)) for sample in SAMPLES]
    for name in ("a", "c", "y"):
        for [value], expected in zip(replay.advance(), whole, strict=True):
            np.testing.assert_array_equal(value, expected[name])


def test_a_change_before_the_next_stop_takes_effect_there_and_not_before() -> None:
    graph, tensors = _graph()
    replay = Replay(graph, SAMPLES, [tensors["a"], tensors["b"]])
    replay.advance()
    for node in graph.nodes:
        for i, tensor in enumerate(node.inputs):
            if ir.is_constant(tensor):
                ir.set_input(
                    node, i, ir.Constant(f"{tensor.name}_{node.name}", np.float32(10) * np.ones(1, np.float32))
                )
    for [value], sample in zip(replay.advance(), SAMPLES, strict=True):
        np.testing.assert_array_equal(value, (sample["x"] + 1) * 10)


def test_values_that_nothing_later_reads_are_let_go() -> None:
    graph, tensors = _graph()
    replay = Replay(graph, SAMPLES, [tensors[name] for name in ("a", "b", "c", "y")])
    held = []
    for _ in range(4):
        replay.advance()
        held.append(sorted(replay._front[0]))
    assert held == [["a", "x"], ["a", "b", "x"], ["c", "x"], []]


def test_one_tensor_may_be_two_stops() -> None:
    graph, tensors = _graph()
    replay = Replay(graph, SAMPLES, [tensors["a"], tensors["a"], tensors["y"]])
    first, second = replay.advance(), replay.advance()
    np.testing.assert_array_equal(first, second)


def test_taps_are_computed_from_the_stop() -> None:
    graph, tensors = _graph()
    replay = Replay(graph, SAMPLES, [tensors["x"], tensors["a"]])
    for [x, a], sample in zip(replay.advance([tensors["a"]]), SAMPLES, strict=True):
        np.testing.assert_array_equal(x, sample["x"])
        np.testing.assert_array_equal(a, sample["x"] + 1)
    for [a, b, c], sample in zip(replay.advance([tensors["b"], tensors["c"]]), SAMPLES, strict=True):
        np.testing.assert_array_equal(a, sample["x"] + 1)
        np.testing.assert_array_equal(b, (sample["x"] + 1) * 2)
        np.testing.assert_array_equal(c, (sample["x"] + 1) * 3)


def test_integers_are_held_in_place_of_what_they_dequantize_to() -> None:
    model = model_from_text(
        """g (float[1,4] x) => (float[1,4] y) {
            q = QuantizeLinear(x, scale, zero)
            d = DequantizeLinear(q, scale, zero)
            a = Sigmoid(d)
            y = Add(a, d)
        }""",
        {"scale": np.float32(0.5), "zero": np.uint8(0)},
    )
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    tensors = {t.name: t for t in ir.tensors(graph)}
    replay = Replay(graph, SAMPLES, [tensors["a"], tensors["y"]])
    replay.advance()
    assert {name: value.dtype for name, value in replay._front[0].items()} == {"q": np.uint8, "a": np.float32}
    for [y], sample in zip(replay.advance(), SAMPLES, strict=True):
        np.testing.assert_array_equal(y, run(model, sample)[0])


def test_the_last_samples_are_let_go_where_all_are_too_large() -> None:
    graph, tensors = _graph()
    samples = [{"x": np.full((1, 4), i, np.float32)} for i in range(9)]
    replay = Replay(graph, samples, [tensors["a"], tensors["c"], tensors["y"]], limit=6 * 2 * 16)
    assert len(replay.advance()) == 9  # then x and a are held, 16 bytes each
    assert [value[0, 0] for [value] in replay.advance()] == [3 * (i + 1) for i in range(6)]
    few = Replay(graph, samples, [tensors["a"], tensors["y"]], limit=1)
    few.advance()
    assert len(few.advance()) == 4
