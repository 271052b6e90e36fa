"""Every invariant fires on a state that breaks it, and only there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from qcompiler_passes.align_scales import AlignScales
from qcompiler_passes.annotate import Annotate
from qcompiler_passes.calibrate import Calibrate
from qcompiler_passes.fold_scales import FoldScales
from qcompiler_passes.form_blocks import FormBlocks
from qcompiler_passes.lower_integer import LowerInteger

from qcompiler import ir
from qcompiler.pipeline import Pass
from qcompiler.quant import QuantSpec
from qcompiler.rewrite import Rewriter
from qcompiler.state import CompileState, Phase
from qcompiler.verify import VerifyError, verify
from tests.forms import TO_INTEGER, TO_KERNELS, TO_QDQ, compiled, graph_text, weights

TO_ANNOTATED: tuple[Pass, ...] = (FormBlocks(), Annotate())
TO_CALIBRATED: tuple[Pass, ...] = (*TO_ANNOTATED, Calibrate(collector="minmax"), AlignScales())


def small(*passes: Pass) -> CompileState:
    model = graph_text(
        """g (float[1,4,6,6] x) => (float[] y) {
            a = Conv(x, w1, b)
            r = Relu(a)
            p = MaxPool<kernel_shape=[2,2]>(r)
            y = Conv(p, w2)
        }""",
        w1=weights(8, 4, 1, 1),
        b=weights(8),
        w2=weights(4, 8, 1, 1),
    )
    return compiled(model, *passes)


def node_of(state: CompileState, op: str) -> ir.Node:
    return next(n for n in state.graph.nodes if n.op == op)


def constant(name: str, values: object, dtype: object = None) -> ir.Constant:
    return ir.Constant(name, np.asarray(values, dtype))


def broken(state: CompileState, damage: Callable[[CompileState], object], message: str) -> None:
    verify(state)
    damage(state)
    with pytest.raises(VerifyError, match=message):
        verify(state)


def two_tensors_of_one_name(state: CompileState) -> None:
    state.graph.nodes[0].outputs[0].name = state.graph.inputs[0].name


def reversed_order(state: CompileState) -> None:
    state.graph.nodes[:] = state.graph.nodes[::-1]


def twice_the_name(state: CompileState) -> None:
    state.graph.nodes[1].name = state.graph.nodes[0].name


def one_way_link(state: CompileState) -> None:
    list.clear(state.graph.inputs[0].outputs)


def lost_output(state: CompileState) -> None:
    ir.detach(state.graph.nodes.pop())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (two_tensors_of_one_name, "two tensors are called 'x'"),
        (reversed_order, "not defined before it is read"),
        (twice_the_name, "is empty or taken"),
        (one_way_link, "does not know this reader"),
        (lost_output, "graph output 'y' has no producer"),
    ],
)
def test_structure(damage: Callable[[CompileState], None], message: str) -> None:
    broken(small(), damage, message)


def test_fused_blocks_name_nodes() -> None:
    broken(
        small(FormBlocks()), lambda s: setattr(s.graph.nodes[1], "name", "other"), "names a node 'Relu_r' that is gone"
    )


def test_annotated_inputs_have_specs() -> None:
    broken(small(*TO_ANNOTATED), lambda s: s.specs.pop("r"), "its input 'r' has no spec")


def test_annotated_tables_name_tensors() -> None:
    broken(small(*TO_ANNOTATED), lambda s: s.specs.update(ghost=QuantSpec("uint8", 0, 255)), "'ghost' that is gone")
    broken(small(*TO_ANNOTATED), lambda s: s.ties.update(r="ghost"), "'ghost' that is gone")


def with_params(name: str, **changes: object) -> Callable[[CompileState], None]:
    def damage(state: CompileState) -> None:
        state.params[name] = replace(state.params[name], **changes)  # type: ignore[arg-type]

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.params.pop("x"), "'x' has a spec but no params"),
        (with_params("x", zero_point=127), "'x' has the zero point 127"),
        (with_params("x", zero_point=256), "'x' has the zero point 256"),
        (with_params("x", scale=np.float32(np.inf)), "'x' has a scale that is not positive and finite"),
        (with_params("x", scale=np.float32(0)), "'x' has a scale that is not positive and finite"),
        (with_params("p", scale=np.float32(1)), "'p' is tied to 'r', but has other params"),
        (with_params("p", zero_point=2), "'p' is tied to 'r', but has other params"),
    ],
)
def test_calibrated(damage: Callable[[CompileState], object], message: str) -> None:
    broken(small(*TO_CALIBRATED), damage, message)


def replace_input(op: str, index: int, tensor: ir.Tensor) -> Callable[[CompileState], None]:
    return lambda state: ir.set_input(node_of(state, op), index, tensor)


def wide_weight(state: CompileState) -> None:
    state.params["w1_q"] = replace(state.params["w1_q"], spec=replace(state.params["w1_q"].spec, qmin=-8, qmax=7))


def forgotten_params(state: CompileState) -> None:
    del state.params[node_of(state, "QuantizeLinear").outputs[0].name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replace_input("QuantizeLinear", 1, constant("s", 0.5, np.float32)), "its scale is not that of"),
        (replace_input("DequantizeLinear", 1, constant("s", 0.5, np.float32)), "its scale is not that of"),
        (replace_input("QuantizeLinear", 1, ir.Variable("x")), "its scale is not that of|two tensors"),
        (replace_input("QuantizeLinear", 2, constant("z", 2, np.uint8)), "its zero point is not that of"),
        (wide_weight, "constant 'w1_q' leaves the range -8..7"),
        (forgotten_params, "has no params"),
    ],
)
def test_qdq(damage: Callable[[CompileState], object], message: str) -> None:
    broken(small(*TO_QDQ), damage, message)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replace_input("Requantize", 1, constant("m", [0], np.int32)), "its multiplier 0 is below 1"),
        (lambda s: ir.set_input(n := node_of(s, "Requantize"), 1, n.inputs[0]), "is not a constant"),
        (lambda s: ir.set_input(n := node_of(s, "Requantize"), 2, n.inputs[0]), "is not a constant"),
    ],
)
def test_integer(damage: Callable[[CompileState], object], message: str) -> None:
    broken(small(*TO_INTEGER), damage, message)


def test_integer_leaves_no_accumulator_between_scales() -> None:
    state = small(*TO_QDQ, LowerInteger())
    verify(state)
    state.phase = Phase.INTEGER
    with pytest.raises(VerifyError, match="the accumulator goes through float"):
        verify(state)
    state.rewrite_limit = 0  # a bisection stops in the middle on purpose
    verify(state)
    state.rewrite_limit = None
    FoldScales().run(state)
    verify(state)


@pytest.mark.parametrize("index", [1, 4, 6])
def test_kernels_rescale_by_dyadic_factors(index: int) -> None:
    def damage(state: CompileState) -> None:
        node = node_of(state, "QLinearConv")
        scale = ir.array(node.inputs[index]) * np.float32(1.01)
        ir.set_input(node, index, constant("moved", scale))

    broken(small(*TO_KERNELS), damage, "its rescale factor is not a multiple of 2\\*\\*-16")


def test_checks_stay_on_in_later_phases() -> None:
    broken(small(*TO_KERNELS), with_params("x", zero_point=256), "'x' has the zero point 256")


def test_only_the_first_problems_are_told() -> None:
    state = small(*TO_ANNOTATED)
    state.specs.update({f"ghost{i}": QuantSpec("uint8", 0, 255) for i in range(9)})
    with pytest.raises(VerifyError, match=r"'ghost0'.*'ghost2'.*\(and 6 more\)"):
        verify(state)


def test_a_net_of_many_nodes_takes_milliseconds() -> None:
    layers = " ".join(f"t{i} = Conv(t{i - 1}, w)" for i in range(1, 120))
    model = graph_text(f"g (float[1,4,2,2] t0) => (float[] y) {{ {layers} y = Relu(t119) }}", w=weights(4, 4, 1, 1))
    for passes in (TO_QDQ, TO_KERNELS):
        state = compiled(model, *passes)
        best = np.inf
        for _ in range(5):
            start = time.process_time()
            verify(state)
            best = min(best, time.process_time() - start)
        assert best < 0.1


def test_rewriter_edits_pass_the_check() -> None:
    state = small()
    rewriter = Rewriter(state)
    relu = node_of(state, "Relu")
    made = rewriter.node("Abs", [relu.inputs[0]], origin=relu)
    rewriter.take_output(made, relu.outputs[0])
    rewriter.finish()
    verify(state)
