"""HardSigmoid and HardSwish behind convolutions become arithmetic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from qcompiler_passes.expand_activations import ExpandActivations
from qcompiler_passes.targets import ORT_CPU

from tests.forms import all_forms, assert_bit_identical, inferred
from tests.support import TEST_TARGET, assert_same_function, model_from_text, ops_of, run_passes

RNG = np.random.default_rng(6)
PRODUCTS = replace(TEST_TARGET, rewrites=frozenset({"hard-swish-as-mul"}))
CONSTANTS = {
    "w": RNG.standard_normal((8, 4, 1, 1)).astype(np.float32) * 2,
    "b": RNG.standard_normal(8).astype(np.float32),
    "m": RNG.standard_normal((4, 8)).astype(np.float32),
    "v": RNG.standard_normal((4, 8, 1, 1)).astype(np.float32),
}


def net(body: str, image: str = "float[1,4,6,6]") -> onnx.ModelProto:
    words = body.replace("(", " ").replace(",", " ").replace(")", " ").split()
    model = model_from_text(
        f"g ({image} x) => (float[?] y) {{ {body} }}", {k: v for k, v in CONSTANTS.items() if k in words}
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model)


def expanded(model: onnx.ModelProto) -> list[str]:
    """The operators after the pass, which keeps the function and has nothing left to do."""
    after, state = run_passes(model, ExpandActivations(), target=PRODUCTS)
    assert_same_function(model, after)
    assert ExpandActivations().run(state) == 0
    return ops_of(after)


@pytest.mark.parametrize("attributes", ["", "<alpha=0.1666667, beta=0.5>", "<alpha=1.5, beta=-0.2>"])
def test_hard_sigmoid_is_a_clip(attributes: str) -> None:
    assert expanded(net(f"c = Conv(x, w, b) y = HardSigmoid{attributes}(c)")) == ["Conv", "Clip"]
    assert expanded(net(f"c = Conv(x, w) y = HardSigmoid{attributes}(c)")) == ["Conv", "Clip"]
    assert expanded(net(f"c = Gemm(x, m) y = HardSigmoid{attributes}(c)", "float[3,4]")) == ["Gemm", "Clip"]


@pytest.mark.parametrize("conv", ["Conv(x, w, b)", "Conv(x, w)"])
def test_hard_swish_is_a_product(conv: str) -> None:
    assert expanded(net(f"c = {conv} y = HardSwish(c)")) == ["Conv", "Clip", "Add", "Clip", "Mul"]


def test_the_scaled_tensor_is_known_as_such() -> None:
    _, state = run_passes(net("c = Conv(x, w) y = HardSwish(c)"), ExpandActivations(), target=PRODUCTS)
    [counterpart] = [c for c in state.counterparts.values() if c.source == "c"]
    assert float(counterpart.factor) == pytest.approx(6**-0.5)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("c = Conv(x, w) h = HardSwish(c) y = Add(c, h)", "no Conv or Gemm makes its input for it alone"),
        ("c = Conv(x, w) h = HardSigmoid(c) y = Add(c, h)", "no Conv or Gemm makes its input for it alone"),
        ("y = HardSwish(x)", "no Conv makes its input"),
        ("r = Sin(x) y = HardSigmoid(r)", "no Conv or Gemm makes its input for it alone"),
    ],
)
def test_refusals(body: str, reason: str) -> None:
    model = net(body)
    after, state = run_passes(model, ExpandActivations(), target=PRODUCTS)
    assert ops_of(after) == ops_of(model)
    assert [r.reason for r in state.refusals.values()] == [reason]


def test_targets_that_do_not_ask_keep_hard_swish() -> None:
    assert ops_of(run_passes(net("c = Conv(x, w) y = HardSwish(c)"), ExpandActivations())[0]) == ["Conv", "HardSwish"]


def test_all_forms_agree_on_a_hard_swish_between_convs() -> None:
    model = net("c = Conv(x, w, b) h = HardSwish(c) y = Conv(h, v)")
    forms = all_forms(inferred(run_passes(model, ExpandActivations(), target=ORT_CPU)[0]))
    assert_bit_identical(forms)
    kernels = [op for op in ops_of(forms.kernels) if op.startswith("QLinear") or op == "Clip"]
    assert kernels == ["QLinearConv", "Clip", "QLinearMul", "QLinearConv"]  # the sum moves the zero point
