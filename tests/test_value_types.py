"""Types that are no tensor's survive a round trip through the graph, in bodies too."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qcompiler import ir, runtime
from qcompiler.shapes import infer_shapes
from tests.support import model_from_text

FLOATS = onnx.helper.make_sequence_type_proto(onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [2]))
MAYBE = onnx.helper.make_optional_type_proto(FLOATS)


def choice() -> onnx.ModelProto:
    """A sequence, or nothing: the Optional of nothing has its type as an attribute."""
    model = model_from_text("""g (bool c, float[2] x) => (float o) {
        o = If (c) <
            then_branch = some () => (float p) { s = SequenceConstruct (x, x) p = Optional (s) },
            else_branch = none () => (float q) { q = Optional () }
        >
    }""")
    model.graph.output[0].type.CopyFrom(MAYBE)
    branches = {a.name: a.g for a in model.graph.node[0].attribute}
    for branch in branches.values():
        branch.output[0].type.CopyFrom(MAYBE)
    branches["else_branch"].node[0].attribute.append(onnx.helper.make_attribute("type", FLOATS))
    return model


@pytest.mark.parametrize("condition", [True, False])
def test_round_trip_runs_the_same(condition: bool) -> None:
    model, x = choice(), np.array([1, 2], np.float32)
    copy = ir.to_proto(ir.from_proto(model))
    onnx.checker.check_model(copy)
    assert copy.graph.output[0].type == MAYBE
    found = runtime.run(runtime.session(copy), {"c": np.array(condition), "x": x})[0]
    if condition:
        np.testing.assert_array_equal(found, [x, x])
    else:
        assert found is None


def test_inferred_types_are_kept() -> None:
    graph = ir.from_proto(
        model_from_text("g (float[2] x) => (int64 n) { s = SequenceConstruct (x) n = SequenceLength (s) }")
    )
    infer_shapes(graph)
    sequence = graph.nodes[0].outputs[0]
    assert sequence.type == FLOATS
    assert (sequence.dtype, sequence.shape, ir.type_name(sequence)) == (None, None, "?")
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
