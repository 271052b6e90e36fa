"""Pad folds into convolutions; automatic padding becomes explicit."""

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from qcompiler_passes import fold_pad
from qcompiler_passes.fold_pad import FoldPad

from qcompiler import ir
from qcompiler.rewrite import Rewriter
from qcompiler.text import format_graph
from tests.support import assert_same_function, model_from_text, ops_of, run_passes, state_of

RNG = np.random.default_rng(5)
CONSTANTS = {
    "w": RNG.standard_normal((3, 3, 3, 3)).astype(np.float32),
    "p": np.array([0, 0, 1, 0, 0, 0, 2, 1]),
    "p2": np.array([1, 0, 2, 1]),
    "axes": np.array([2, -1]),
    "zero": np.float32(0),
    "one": np.float32(1),
    "channels": np.array([0, 1, 0, 0, 0, 0, 0, 0]),
    "crop": np.array([0, 0, -1, 0, 0, 0, 2, 1]),
}
IMAGE = "float[1,3,7,6]"


def folded(text: str, constants: Mapping[str, np.ndarray] = CONSTANTS, opset: int = 17) -> onnx.ModelProto:
    """The model after the pass, which keeps the function and has nothing left to do."""
    model = model_from_text(text, {k: v for k, v in constants.items() if k in text}, opset)
    after, state = run_passes(model, FoldPad())
    assert_same_function(model, after)
    assert FoldPad().run(state) == 0
    return after


def attributes(model: onnx.ModelProto, node: int = 0) -> dict[str, object]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in model.graph.node[node].attribute}


@pytest.mark.parametrize("pad", ["Pad(x, p)", "Pad(x, p, zero)", 'Pad<mode="constant">(x, p)'])
@pytest.mark.parametrize(
    "conv", ["Conv(a, w)", "Conv<pads=[1,0,0,3]>(a, w)", 'Conv<auto_pad="VALID", strides=[2,1]>(a, w)']
)
def test_pad_into_conv(pad: str, conv: str) -> None:
    after = folded(f"g ({IMAGE} x) => (float[1,3,h,v] y) {{\n a = {pad}\n y = {conv}\n}}")
    assert ops_of(after) == ["Conv"]
    assert attributes(after)["pads"] == ([2, 0, 2, 4] if "pads=" in conv else [1, 0, 2, 1])


def test_pad_with_axes() -> None:
    text = f"g ({IMAGE} x) => (float[1,3,h,v] y) {{\n a = Pad(x, p2, zero, axes)\n y = Conv(a, w)\n}}"
    assert ops_of(folded(text, opset=18)) == ["Conv"]


def test_pad_with_attributes() -> None:
    text = (
        f"g ({IMAGE} x) => (float[1,3,h,v] y) {{\n a = Pad<pads=[0,0,1,0,0,0,2,1], value=0.0>(x)\n y = Conv(a, w)\n}}"
    )
    assert ops_of(folded(text, opset=9)) == ["Conv"]


def test_pad_into_every_conv() -> None:
    text = f"""g ({IMAGE} x) => (float[1,3,h,v] y, float[1,3,h,v] z) {{
        a = Pad(x, p)
        y = Conv(a, w)
        z = Conv<dilations=[2,2]>(a, w)
    }}"""
    assert ops_of(folded(text)) == ["Conv", "Conv"]


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("strides", ["[1,1]", "[2,2]", "[3,1]"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 1), (5, 2)])
@pytest.mark.parametrize("size", ["7,6", "5,9"])
def test_same_padding_becomes_explicit(mode: str, strides: str, kernel: tuple[int, int], size: str) -> None:
    attrs = f'auto_pad="{mode}", strides={strides}, kernel_shape=[{kernel[0]},{kernel[1]}]'
    pools = [
        f"{op}<{attrs}>(x)" if kernel != (1, 1) else "Relu(x)" for op in ("MaxPool", "AveragePool")
    ]  # need stride <= kernel
    text = f"""g (float[1,3,{size}] x) => (float[1,3,h,v] y, float[1,3,i,u] z, float[1,3,j,t] k) {{
        y = Conv<{attrs}>(x, f)
        z = {pools[0]}
        k = {pools[1]}
    }}"""
    after = folded(text, {"f": RNG.standard_normal((3, 3, *kernel)).astype(np.float32)})
    for node in after.graph.node:
        assert node.op_type == "Relu" or {"pads", "auto_pad"} & {a.name for a in node.attribute} == {"pads"}


def test_same_padding_of_dilated_conv() -> None:
    """ONNX Runtime does not run the original."""
    text = f'g ({IMAGE} x) => (float[1,3,h,v] y) {{\n y = Conv<auto_pad="SAME_UPPER", dilations=[2,2], strides=[1,2]>(x, w)\n}}'
    after, _ = run_passes(model_from_text(text, CONSTANTS), FoldPad())
    assert attributes(after)["pads"] == [2, 1, 2, 2]


def test_stride_one_needs_no_size() -> None:
    text = 'g (float[n,3,h,v] x) => (float[n,3,h,v] y) {\n y = Conv<auto_pad="SAME_LOWER">(x, f)\n}'
    after = folded(text, {"f": RNG.standard_normal((3, 3, 2, 3)).astype(np.float32)})
    assert attributes(after)["pads"] == [1, 1, 0, 1]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = Pad(x, p, one)\n y = Conv(a, w)", "value is not zero"),
        ('a = Pad<mode="reflect">(x, p)\n y = Conv(a, w)', "mode reflect"),
        ("a = Pad(x, crop)\n y = Conv(a, w)", "crops"),
        ("a = Pad(x, channels)\n y = Relu(a)", "more than the spatial axes"),
        ("a = Pad(x, p)\n c = Conv(a, w)\n y = MaxPool<kernel_shape=[3,3]>(a)", "MaxPool reads"),
        ("y = Pad(x, p)\n z = Conv(y, w)", "graph output"),
        ('a = Pad(x, p)\n y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(a, w)', "own padding"),
        ("d = Add(p, p)\n a = Pad(x, d)\n y = Conv(a, w)", "pads are not constants"),
        ("n = Sqrt(zero)\n a = Pad(x, p, n)\n y = Conv(a, w)", "value is not zero"),
        ('r = Relu(x)\n y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(r, w)', "spatial size is not known"),
        ('y = MaxPool<auto_pad="SAME_UPPER", kernel_shape=[3,3], ceil_mode=1>(x)', "SAME_UPPER"),
    ],
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, body: str, reason: str) -> None:
    seen: list[Rewriter] = []
    apply = fold_pad.apply_rules
    monkeypatch.setattr(fold_pad, "apply_rules", lambda rw, rules: (seen.append(rw), apply(rw, rules))[1])
    state = state_of(model_from_text(f"g ({IMAGE} x) => (float[1,3,h,v] y) {{\n{body}\n}}", CONSTANTS))
    ir.drop_dead_nodes(state.graph)
    before = format_graph(state.graph)
    assert FoldPad().run(state) == 0
    assert format_graph(state.graph) == before
    found = next(r for r in seen[0].refusals.values() if reason in r.reason)
    assert found.culprit
