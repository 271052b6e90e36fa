"""Convolutions of few channels read several columns as one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from qcompiler_passes.fold_width import FoldWidth

from qcompiler.target import Alignment
from tests.support import TEST_TARGET, assert_same_function, model_from_text, ops_of, run_passes

RNG = np.random.default_rng(3)
WIDE = replace(TEST_TARGET, alignment=Alignment(inputs=4, outputs=4, least=16, depthwise=16))
FOLD = ["Reshape", "Transpose", "Reshape", "Transpose"]
UNFOLD = ["Transpose", "Reshape", "Transpose"]


def net(size: tuple[int, int], weight: tuple[int, ...], attributes: str, behind: str = "") -> onnx.ModelProto:
    """A Conv with a bias on an image, and what is behind it; `c` is its result, `y` the last one."""
    text = f"g (float[1,{weight[1]},{size[0]},{size[1]}] x) => (float[1,?,?,?] y) {{ "
    text += f"{'c' if behind else 'y'} = Conv<{attributes}>(x, w, b) {behind} }}"
    arrays = {
        "w": RNG.standard_normal(weight).astype(np.float32),
        "b": RNG.standard_normal(weight[0]).astype(np.float32),
    }
    return onnx.shape_inference.infer_shapes(model_from_text(text, arrays))


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model after the pass, which keeps the function and has nothing left to do."""
    after, state = run_passes(model, FoldWidth(), target=WIDE)
    assert_same_function(model, after)
    assert FoldWidth().run(state) == 0
    return after


def conv(model: onnx.ModelProto) -> tuple[tuple[int, ...], dict[str, list[int]]]:
    """The shape of the filters and the attributes of the one Conv."""
    [node] = [n for n in model.graph.node if n.op_type == "Conv"]
    [weight] = [i for i in model.graph.initializer if i.name == node.input[1]]
    return tuple(weight.dims), {a.name: list(a.ints) for a in node.attribute}


@pytest.mark.parametrize("width", [8, 9, 10, 11])
@pytest.mark.parametrize("pads", ["0,0,0,0", "1,1,1,1", "0,0,1,1", "2,3,0,4"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_keeps_the_function(width: int, pads: str, stride: int, channels: int) -> None:
    if stride == 3:
        width += 4
    model = net((7, width), (16, channels, 3, 3), f"pads=[{pads}], strides=[2,{stride}]")
    assert "Reshape" in ops_of(rewritten(model))


def test_four_columns_of_an_rgb_image_are_twelve_channels() -> None:
    after = rewritten(net((16, 16), (8, 3, 3, 3), "pads=[1,1,1,1], strides=[2,2]"))
    assert ops_of(after) == [*FOLD, "Conv", *UNFOLD]
    weight, attributes = conv(after)
    assert weight == (16, 12, 3, 2)
    assert attributes["strides"] == [2, 1]
    assert attributes["pads"] == [1, 1, 1, 0]
    assert attributes["kernel_shape"] == [3, 2]


def test_patches_need_no_second_copy_of_the_filters() -> None:
    after = rewritten(net((8, 8), (16, 3, 4, 4), "strides=[4,4]"))
    assert ops_of(after) == [*FOLD, "Conv"]
    assert conv(after)[0] == (16, 12, 4, 1)


def test_an_activation_stays_next_to_its_conv() -> None:
    after = rewritten(net((8, 8), (16, 3, 3, 3), "pads=[1,1,1,1]", "y = Relu(c)"))
    assert ops_of(after) == [*FOLD, "Conv", "Relu", *UNFOLD]


def test_other_readers_see_the_same_result() -> None:
    after = rewritten(net((8, 8), (16, 3, 3, 3), "pads=[1,1,1,1]", "r = Relu(c) y = Add(c, r)"))
    assert ops_of(after) == [*FOLD, "Conv", *UNFOLD, "Relu", "Add"]


def test_a_width_that_does_not_divide_is_padded_and_cut() -> None:
    after = rewritten(net((7, 7), (16, 3, 3, 3), "pads=[1,1,1,1]"))
    assert ops_of(after) == ["Pad", *FOLD, "Conv", "Transpose", "Reshape", "Slice", "Transpose"]


def test_many_outputs_get_a_fourth_channel_of_zeros() -> None:
    after = rewritten(net((8, 8), (64, 3, 3, 3), "pads=[1,1,1,1]"))
    assert ops_of(after) == ["Pad", "Conv"]
    assert conv(after)[0] == (64, 4, 3, 3)


def test_unknown_sizes_get_a_fourth_channel_of_zeros() -> None:
    text = "g (float[1,3,h,w] x) => (float[1,16,?,?] y) { y = Conv<pads=[1,1,1,1]>(x, w0) }"
    model = model_from_text(text, {"w0": RNG.standard_normal((16, 3, 3, 3)).astype(np.float32)})
    assert ops_of(rewritten(onnx.shape_inference.infer_shapes(model))) == ["Pad", "Conv"]


@pytest.mark.parametrize(
    ("size", "weight", "attributes", "reason"),
    [
        ((8, 8), (16, 4, 3, 3), "pads=[1,1,1,1]", "4 input channels are as many as the target wants"),
        ((8, 8), (16, 6, 3, 3), "pads=[1,1,1,1]", "6 input channels are as many as the target wants"),
        ((8, 8), (16, 3, 3, 3), "dilations=[2,2]", "dilations"),
        ((8, 8), (16, 3, 8, 8), "strides=[1,1]", "single pixel"),
        ((28, 28), (384, 3, 14, 14), "strides=[14,14]", "neither wider columns nor more channels"),
        ((8, 8), (3, 3, 3, 3), "pads=[1,1,1,1]", "3 output channels have no fast kernel"),
        ((3, 3), (3, 3, 1, 1), "strides=[1,1]", "3 output channels have no fast kernel"),
    ],
)
def test_refusals(size: tuple[int, int], weight: tuple[int, ...], attributes: str, reason: str) -> None:
    model = net(size, weight, attributes)
    after, state = run_passes(model, FoldWidth(), target=WIDE)
    assert ops_of(after) == ["Conv"]
    [refusal] = state.refusals.values()
    assert reason in refusal.reason


def test_targets_without_alignment_keep_their_convs() -> None:
    model = net((8, 8), (16, 3, 3, 3), "pads=[1,1,1,1]")
    assert ops_of(run_passes(model, FoldWidth())[0]) == ["Conv"]
