"""align-scales: scales move a little, and then every factor between activations is a dyadic number."""

from __future__ import annotations

import numpy as np
import pytest
from qcompiler_passes.align_scales import AlignScales
from qcompiler_passes.annotate import Annotate
from qcompiler_passes.calibrate import Calibrate
from qcompiler_passes.form_blocks import FormBlocks
from qcompiler_passes.scale_solver import LARGEST_FACTOR, mean_factor

from qcompiler import quant
from qcompiler.quant import QuantSpec, params_from_range
from qcompiler.state import CompileState
from tests.forms import advance, all_forms, assert_bit_identical, compiled, graph_text, weights

UINT8 = QuantSpec("uint8", 0, 255)


def calibrated(body: str, **ranges: tuple[float, float]) -> CompileState:
    """A state whose tensors have the given ranges; x and others keep what was measured."""
    words = body.replace("(", " ").replace(",", " ").replace(")", " ").split()
    constants = {f"w{i}": weights(4, 4, 1, 1, seed=i) for i in range(5)} | {"zero": 0.0, "one": 1.0, "half": 0.5}
    model = graph_text(
        f"g (float[1,4,5,3] x) => (float[] y) {{ {body} }}", **{k: v for k, v in constants.items() if k in words}
    )
    state = compiled(model, FormBlocks(), Annotate(), Calibrate(collector="minmax"))
    for name, (low, high) in ranges.items():
        for member in state.params:
            if state.leader(member) == state.leader(name):
                state.params[member] = params_from_range(low, high, UINT8)
    return state


def aligned(body: str, **ranges: tuple[float, float]) -> CompileState:
    return advance(calibrated(body, **ranges), AlignScales())


def scale(state: CompileState, name: str) -> np.float32:
    return np.float32(state.params[name].scale)


def floats(state: CompileState) -> dict[str, str]:
    return {root: block.reason for root, block in state.blocks.items() if not block.quantized}


@pytest.mark.parametrize("addend", [(0, 1), (0, 1e-3), (-30, 7.7), (0, 900)])
def test_addends_take_dyadic_ratios_to_the_sum(addend: tuple[float, float]) -> None:
    body = "a = Conv(x, w0) b = Conv(x, w1) s = Add(a, b) y = Conv(s, w2)"
    before, state = calibrated(body, a=(-3, 5), b=addend), aligned(body, a=(-3, 5), b=addend)
    assert scale(state, "s") == scale(before, "s")
    for name in "ab":
        ratio = scale(state, name) / scale(state, "s")
        assert quant.is_dyadic(ratio, quant.RATIO_SHIFT)
        wanted = scale(before, name) / scale(before, "s")
        assert ratio == pytest.approx(wanted, abs=2.0**-11)
    assert floats(state) == {}


def test_a_residual_chain_is_solved_from_its_end() -> None:
    body = """a = Conv(x, w0) b = Conv(a, w1) s = Add(a, b) r = Relu(s) c = Conv(r, w2) t = Add(c, r) d = Conv(t, w3)
              u = Add(t, d) y = Conv(u, w4)"""
    state = aligned(body)
    for left, right, out in (("a", "b", "r"), ("c", "r", "t"), ("t", "d", "u")):
        for name in (left, right):
            assert quant.is_dyadic(scale(state, name) / scale(state, out), quant.RATIO_SHIFT)
    assert floats(state) == {}
    assert AlignScales().run(state) == 0


def test_products_and_means_have_dyadic_factors() -> None:
    state = aligned("a = Conv(x, w0) g = GlobalAveragePool(a) b = Conv(g, w1) m = Mul(a, b) y = Conv(m, w2)")
    assert quant.is_dyadic(quant.rescale(scale(state, "a"), scale(state, "b"), scale(state, "m")))
    assert quant.is_dyadic(mean_factor(scale(state, "a"), scale(state, "g"), 15))
    assert floats(state) == {}
    assert AlignScales().run(state) == 0


@pytest.mark.parametrize("operator", ["Add(a, a)", "Mul(a, a)", "Add(a, half)", "Mul(half, a)"])
def test_one_tensor_twice_and_constants(operator: str) -> None:
    state = aligned(f"a = Conv(x, w0) s = {operator} y = Conv(s, w1)")
    assert floats(state) == {}
    assert AlignScales().run(state) == 0


def test_a_bound_of_a_clip_is_a_limit_for_its_scale() -> None:
    """The scale of Clip(0, 1) may shrink, not grow: else saturation would no longer clip."""
    body = "a = Conv(x, w0) k = Clip(a, zero, one) b = Conv(x, w1) s = Add(b, k) y = Conv(s, w2)"
    for width in (1.37, 3.1, 40.0):
        state = aligned(body, k=(0, 1), s=(-1, width))
        assert scale(state, "k") <= 1 / 255 * (1 + 1e-6)
        assert floats(state) == {}


def test_a_limit_below_every_ratio_is_given_up() -> None:
    body = "a = Conv(x, w0) k = Clip(a, zero, one) b = Conv(x, w1) s = Add(b, k) y = Conv(s, w2)"
    state = aligned(body, k=(0, 1), s=(-1, 1e5))
    assert scale(state, "k") / scale(state, "s") == 2.0**-quant.RATIO_SHIFT
    assert floats(state) == {}


CONCAT = """a = Conv(x, w0) b = Conv(x, w1) c = Conv(x, w2) d = Conv(x, w0) s = Concat<axis=2>(a, b, c, d)
            e = Conv(b, w1) t = Concat<axis=2>(s, e) y = Conv(t, w3)"""
RANGES = {"s": (0.0, 10.0), "a": (0.0, 9.0), "b": (0.0, 5.0), "c": (-9.0, 10.0), "d": (0.0, 1.0)}


def test_what_only_a_concat_reads_takes_its_scale() -> None:
    state = aligned(CONCAT, **RANGES)
    joined = {name: state.params[name].same_as(state.params["s"]) for name in "abcd"}
    assert joined == {"a": True, "b": False, "c": False, "d": True}
    assert AlignScales().run(state) == 0


def test_concat_inputs_of_nearly_the_same_range_join() -> None:
    loose = advance(calibrated(CONCAT, **RANGES), AlignScales(concat_tie=0.4))
    assert loose.leader("b") == loose.leader("s")
    assert loose.params["b"].same_as(loose.params["s"])


def test_an_operator_whose_scales_are_all_taken_goes_back_to_float() -> None:
    """The last Add fixes t and a (hence its transpose), the Mul then s: nothing is left to make s = b + a dyadic."""
    body = """a = Conv(x, w0) p = Transpose<perm=[0,1,2,3]>(a) b = Conv(x, w1) s = Add(b, p) d = Conv(x, w2) t = Mul(s, d)
              u = Add(t, a) y = Conv(u, w3)"""
    state = aligned(body)
    assert floats(state) == {"Add_s": "its scales cannot all be dyadic"}
    assert AlignScales().run(state) == 0


def test_an_output_range_of_next_to_nothing_is_widened() -> None:
    """Its multipliers would not fit into int32 otherwise."""
    state = aligned("a = Conv(x, w0) r = Relu(a) y = Conv(r, w1)", r=(0, 1e-12))
    assert floats(state) == {}
    finest = scale(state, "x") * np.abs(weights(4, 4, 1, 1, seed=0)).max() / 127
    assert finest / scale(state, "r") == pytest.approx(LARGEST_FACTOR, rel=1e-5)


def test_a_layer_behind_an_addend_that_had_to_grow_stays_float() -> None:
    body = """a = Conv(x, w0) c = Conv(a, w1) b = Conv(x, w2) s = Add(a, b) d = Conv(s, w3)
              y = Concat<axis=1>(c, d)"""
    state = aligned(body, a=(0, 1e-9), c=(0, 1e-12), s=(0, 3e4))
    assert floats(state)["Conv_c"] == "its output range is next to nothing"


def test_dead_tensors_compile() -> None:
    model = graph_text(
        """g (float[1,3,6,6] x) => (float[] y) {
            a = Conv(x, w, low) dead = Relu(a) b = Conv(x, w) s = Add(b, dead) d = Conv(dead, w2) t = Mul(s, d)
            c = Conv(x, w, low) k = Clip(c, zero, six) u = Add(t, k) y = Conv(u, w2)
        }""",
        w=weights(4, 3, 1, 1),
        w2=weights(4, 4, 1, 1),
        low=np.full(4, -100, np.float32),
        zero=0.0,
        six=6.0,
    )
    forms = all_forms(model)
    assert floats(forms.state) == {}
    assert_bit_identical(forms)


def test_a_gate_shares_the_integers_of_its_operand() -> None:
    """As in x * Clip(x + c, 0, 1): the sum moves the zero point by an even number, and is clipped as integers."""
    state = aligned("a = Conv(x, w0) h = Add(a, half) c = Clip(h, zero, one) g = Mul(a, c) y = Conv(g, w2)",
                    a=(-1.3, 2.9), c=(0, 1), g=(-0.2, 2.9))  # fmt: skip
    assert floats(state) == {}
    assert scale(state, "a") == scale(state, "c") == np.float32(0.5 / 30)
    assert state.params["a"].zero_point - state.params["c"].zero_point == 30
    assert quant.is_dyadic(quant.rescale(scale(state, "a"), scale(state, "c"), scale(state, "g")))


@pytest.mark.parametrize(
    ("low", "reader"), [(-0.3, "y = Conv(g, w2)"), (-1.3, "b = Conv(x, w1) s = Add(g, b) y = Conv(s, w2)")]
)
def test_a_product_with_a_sum_of_its_operand_is_exact(low: float, reader: str) -> None:
    """As in x * Clip(x + c, 0, 1), where x is nowhere -c, or the second reader fixes the scale of the product."""
    body = f"a = Conv(x, w0) h = Add(a, half) c = Clip(h, zero, one) g = Mul(a, c) {reader}"
    state = aligned(body, a=(low, low + 4.2), c=(0, 1), g=(-0.2, 2.9))
    assert floats(state) == {}
    assert quant.is_dyadic(scale(state, "a") / scale(state, "c"), quant.RATIO_SHIFT)
    assert quant.is_dyadic(quant.rescale(scale(state, "a"), scale(state, "c"), scale(state, "g")))
    assert scale(state, "c") == pytest.approx(1 / 255, rel=5e-3)
    assert scale(state, "a") == pytest.approx(4.2 / 255, rel=5e-2)
