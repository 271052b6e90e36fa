"""Grouped convolutions become dense ones side by side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from qcompiler_passes.split_groups import SplitGroups

from qcompiler.target import Alignment
from tests.support import TEST_TARGET, assert_same_function, model_from_text, ops_of, run_passes

RNG = np.random.default_rng(4)
BLOCKS = replace(TEST_TARGET, alignment=Alignment(inputs=4, outputs=4, block=8))


def net(
    groups: int, inputs: int, outputs: int, behind: str = "", size: int = 20, attributes: str = ""
) -> onnx.ModelProto:
    """A Conv of `groups` groups with so many channels each, and what is behind it."""
    text = f"g (float[1,{groups * inputs},{size},{size}] x) => (float[1,?,?,?] y) {{ "
    text += f"{'c' if behind else 'y'} = Conv<group={groups}, pads=[1,1,1,1]{attributes}>(x, w, b) {behind} }}"
    weight = RNG.standard_normal((groups * outputs, inputs, 3, 3)).astype(np.float32)
    bias = RNG.standard_normal(groups * outputs).astype(np.float32)
    return onnx.shape_inference.infer_shapes(model_from_text(text, {"w": weight, "b": bias}))


def split(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model after the pass, which keeps the function and has nothing left to do."""
    after, state = run_passes(model, SplitGroups(), target=BLOCKS)
    assert_same_function(model, after)
    assert SplitGroups().run(state) == 0
    return after


def weights(model: onnx.ModelProto) -> list[tuple[int, ...]]:
    arrays = {i.name: tuple(i.dims) for i in model.graph.initializer}
    return [arrays[n.input[1]] for n in model.graph.node if n.op_type == "Conv"]


@pytest.mark.parametrize(
    ("groups", "inputs", "outputs", "expected"),
    [
        (4, 4, 4, [(8, 8, 3, 3)] * 2),
        (4, 2, 4, [(16, 8, 3, 3)]),
        (8, 2, 4, [(16, 8, 3, 3)] * 2),
        (3, 4, 8, [(16, 8, 3, 3), (8, 4, 3, 3)]),
        (2, 16, 8, [(8, 16, 3, 3)] * 2),
        (8, 3, 3, [(12, 12, 3, 3)] * 2),
        (5, 3, 3, [(12, 12, 3, 3), (3, 3, 3, 3)]),
    ],
)
@pytest.mark.parametrize("attributes", ["", ", strides=[2,1]", ", dilations=[2,2]"])
def test_blocks_of_groups(
    groups: int, inputs: int, outputs: int, expected: list[tuple[int, ...]], attributes: str
) -> None:
    after = split(net(groups, inputs, outputs, attributes=attributes))
    assert weights(after) == expected
    several = len(expected) > 1
    assert ops_of(after) == ["Split"] * several + ["Conv"] * len(expected) + ["Concat"] * several


def test_each_branch_has_its_activation() -> None:
    after = split(net(4, 4, 4, "r = Relu(c) y = Sigmoid(r)"))
    assert sorted(ops_of(after)) == ["Concat", "Conv", "Conv", "Relu", "Relu", "Sigmoid", "Split"]


def test_other_readers_see_the_same_result() -> None:
    assert sorted(ops_of(split(net(4, 4, 4, "r = Relu(c) y = Add(r, c)")))) == [
        "Add",
        "Concat",
        "Conv",
        "Conv",
        "Relu",
        "Split",
    ]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (net(1, 16, 16), "it is dense or depthwise"),
        (net(16, 1, 1), "it is dense or depthwise"),
        (net(4, 8, 8, size=4), "it is too small to split"),
    ],
)
def test_refusals(model: onnx.ModelProto, reason: str) -> None:
    after, state = run_passes(model, SplitGroups(), target=BLOCKS)
    assert ops_of(after) == ["Conv"]
    assert [r.reason for r in state.refusals.values()] == [reason]


def test_targets_with_kernels_for_groups_keep_them() -> None:
    assert ops_of(run_passes(net(4, 4, 4), SplitGroups())[0]) == ["Conv"]
