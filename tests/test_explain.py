"""explain: the story of a layer, how layers are found, and what the command prints."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from qcompiler.errors import UserError
from qcompiler.explain import Story, explain
from qcompiler.plan import CompileOptions
from tests.support import model_from_text
from tests.test_cli import Run, folder, qcompile  # noqa: F401  (fixtures)

NET = """
net (float[1,4,8,8] x) => (float[1,5] y, float[1,8,4,4] z) {
    c = Conv<pads = [1, 1, 1, 1]>(x, w)
    n = BatchNormalization(c, scale, shift, mean, var)
    r = Clip(n, zero, six)
    d = Conv<strides = [2, 2]>(r, v)
    i = Identity(d)
    s = Softmax(i)
    z = Mul(s, i)
    p = GlobalAveragePool(d)
    f = Flatten(p)
    y = Gemm(f, u)
}"""


def net() -> onnx.ModelProto:
    """A net with a BatchNormalization to fold, a Clip to absorb, a Softmax that stays float, and nodes without names."""
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 4, 3, 3), "v": (8, 8, 2, 2), "u": (8, 5), "scale": 8, "shift": 8, "mean": 8}
    constants = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    constants |= {"var": np.ones(8, np.float32), "zero": np.float32(0), "six": np.float32(6)}
    model = model_from_text(NET, constants)
    for node in model.graph.node:
        node.name = "" if node.op_type == "Gemm" else f"/{node.op_type.lower()}_{node.output[0]}"
    return model


def stories(pattern: str, **options: object) -> list[Story]:
    samples = np.random.default_rng(1).standard_normal((6, 4, 8, 8)).astype(np.float32)
    return explain(net(), pattern, samples, CompileOptions(**options))  # type: ignore[arg-type]


def test_the_story_of_a_convolution() -> None:
    [story] = stories("/conv_c")
    assert (story.layer, story.op, story.outputs) == ("/conv_c", "Conv", ("c",))
    steps = {step.stage: step for step in story.steps}
    assert list(steps)[-4:] == ["insert-qdq", "lower-integer", "fold-scales", "select-kernels"]
    assert steps["fold-batchnorm"].joined == ("/batchnormalization_n",)
    assert [view.op for view in steps["lower-integer"].added] == ["ConvInteger", "Add", "DequantizeLinear"]
    [block] = story.blocks
    assert (block.quantized, block.bounds, len(block.nodes)) == (True, (0.0, 6.0), 2)
    assert [(t.role, t.name, t.dtype, t.channels) for t in block.tensors] == [
        ("activation", "x", "uint8", 1),
        ("weight", block.tensors[1].name, "int8", 8),
        ("result", "r", "uint8", 1),
    ]
    quantize, node = story.nodes
    assert (quantize.op, node.op) == ("QuantizeLinear", "QLinearConv")
    assert set(node.layers) == {"/conv_c", "/batchnormalization_n", "/clip_r"}


def test_multipliers_are_those_of_the_scales() -> None:
    [story] = stories("/conv_d")
    [x, weight, y] = story.blocks[0].tensors
    assert x.scale and weight.scale and y.scale
    [m] = story.multipliers
    wanted = [x.scale[0] * w / y.scale[0] * 2.0**16 for w in weight.scale]
    assert (m.op, m.shift, m.low, m.high) == ("Requantize", 16, *map(round, wanted))


def test_what_stays_float_says_why() -> None:
    [story] = stories("/softmax_s")
    [block] = story.blocks
    assert (block.quantized, block.reason) == (False, "its uint8 kernel is slower than float, or there is none")
    assert [node.op for node in story.nodes] == ["Softmax"]
    assert f"float: {block.reason}" in "\n".join(story.lines())
    assert story.multipliers == ()


def test_what_goes_away_becomes_nothing() -> None:
    [story] = stories("/identity_i")
    assert story.nodes == ()
    assert [(step.stage, len(step.removed), step.added) for step in story.steps] == [("normalize", 1, ())]
    assert list(story.lines())[-1].endswith("nothing: no node has to do its work")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("/conv_c", ["/conv_c"]),
        ("/conv_*", ["/conv_c", "/conv_d"]),
        ("n", ["/batchnormalization_n"]),
        ("y", ["Gemm_9"]),
    ],
)
def test_layers_are_found_by_name_pattern_and_tensor(pattern: str, found: list[str]) -> None:
    assert [story.layer for story in stories(pattern, until="annotate")] == found


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("softmax", "did you mean '/softmax_s'?"),
        ("/cnov_c", "did you mean '/conv_c'"),
        ("§", "the first of 10 is '/conv_c'"),
    ],
)
def test_unknown_layers_give_suggestions_before_calibration(pattern: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        stories(pattern)
    assert f"no node or tensor is called {pattern!r}; {hint}" in str(caught.value)


def test_refusals_are_part_of_the_story() -> None:
    [story] = stories("Gemm_9")
    refused = [(step.stage, line) for step in story.steps for line in step.refused]
    assert ("fold-scales", "Gemm_9_acc_dequantize DequantizeLinear: its result is used as a float tensor") in refused
    assert f"    left {refused[0][1]}" in story.lines()


def test_the_command(qcompile: Run) -> None:  # noqa: F811
    code, out, err = qcompile("explain", "net.onnx", "/conv", "--calib", "calib")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "/conv  Conv -> c"
    assert ["becomes", "QLinearConv"] in [line.split()[:2] for line in lines]
    assert "    + " not in out
    assert "    + " in qcompile("explain", "net.onnx", "/conv", "--calib", "calib", "-v")[1]


def test_the_command_without_data_ends_at_the_choice(qcompile: Run) -> None:  # noqa: F811
    code, out, _ = qcompile("explain", "net.onnx", "/*", "--json")
    told = json.loads(out)
    assert code == 0
    assert [story["op"] for story in told] == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    block = next(block for block in told[0]["blocks"] if block["nodes"][0] == "/conv")
    assert (block["quantized"], block["bounds"]) == (True, [0.0, None])
    assert block["tensors"][0]["scale"] is None
    assert qcompile("explain", "net.onnx", "/cov")[0] == 2
