from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from qcompiler_passes.place import Place

from qcompiler import runtime
from qcompiler.compile import compile_model
from qcompiler.concrete_shapes import concrete_shapes
from qcompiler.cost import CostTable, read_table
from qcompiler.errors import UserError
from qcompiler.job import prepare
from qcompiler.microbench import Net
from qcompiler.plan import CompileOptions
from qcompiler.state import CompileState
from qcompiler.traps import find_traps
from qcompiler.work import Accountant

CHEAP = {"run": {"nodes": 1e5}, "quantize.map": {"reads": 1.0}, "dequantize.map": {"reads": 1.0}}


def annotated(net: Net) -> CompileState:
    job = prepare(net.model(), [{"x": net.sample()}], CompileOptions(until="annotate"))
    job.pipeline.run(job.state)
    return job.state


def write(path: Path, kinds: dict[str, dict[str, float]]) -> str:
    path.write_text(CostTable({**CHEAP, **kinds}).to_json())
    return str(path)


def quantized(state: CompileState) -> list[str]:
    return [root for root, block in state.blocks.items() if block.quantized]


def test_what_is_slower_in_int8_stays_float(tmp_path: Path) -> None:
    state = annotated(Net(1, 16, 16, 16).conv().depthwise().conv())
    profile = write(tmp_path / "a.json", {
        "float.pointwise": {"nodes": 9e4}, "int8.pointwise": {"nodes": 1e4},
        "float.depthwise": {"nodes": 1e4}, "int8.depthwise": {"nodes": 9e4},
    })  # fmt: skip
    assert Place(profile=profile).run(state) == 1
    assert len(quantized(state)) == 2
    (left,) = [b for b in state.blocks.values() if not b.quantized and b.reason]
    assert left.reason == "faster in float here: 0.01 ms against 0.09 ms"
    assert state.predicted is not None
    assert state.predicted[1] < state.predicted[0]
    assert Place(profile=profile).run(state) == 0


@pytest.mark.parametrize("seed", range(6))
def test_the_cut_is_the_cheapest_of_all_placements(tmp_path: Path, seed: int) -> None:
    """Compared with trying every subset; conversions are shared by readers, and Adds follow what they read."""
    rng = np.random.default_rng(seed)
    net = Net(1, 16, 8, 8).conv().residual().conv(32, 3).depthwise()
    state = annotated(net)
    kinds = ("pointwise", "spatial", "depthwise", "Add")
    rates = {f"{p}.{kind}": {"nodes": float(rng.integers(1, 40)) * 1e3} for p in ("float", "int8") for kind in kinds}
    rates |= {f"{c}.map": {"nodes": float(rng.integers(1, 20)) * 1e3} for c in ("quantize", "dequantize")}
    shapes = concrete_shapes(state)
    assert shapes is not None
    profile = write(tmp_path / "a.json", rates)
    accountant, table = Accountant(state, shapes), read_table(Path(profile))
    able = quantized(state)
    best = min(
        table.total(accountant.total(set(subset)))
        for count in range(len(able) + 1)
        for subset in itertools.combinations(able, count)
        if valid(accountant, state, set(subset))
    )
    Place(profile=profile).run(state)
    assert state.predicted is not None
    assert best <= state.predicted[1] <= min(best + 0.02 * state.predicted[0], state.predicted[0]) + 1e-12


def valid(accountant: Accountant, state: CompileState, chosen: set[str]) -> bool:
    """Whether operators that are no anchors read only integers, and are read as such."""
    for root in chosen:
        node = accountant.nodes[root]
        if node.op == "Add":
            sources = {accountant.owner[t.inputs[0].name] for t in node.inputs}
            result = accountant.nodes[state.blocks[root].nodes[-1]].outputs[0]
            if not sources <= chosen or not any(n.name in chosen for n in result.outputs):
                return False
    return True


def test_small_models_and_the_other_objectives_quantize_all(tmp_path: Path) -> None:
    slow = {"int8.pointwise": {"nodes": 1e9}}
    for objective in ("size", "integer"):
        state = annotated(Net(1, 16, 16, 16).conv().conv())
        assert Place(objective, write(tmp_path / "a.json", slow)).run(state) == 0
        assert len(quantized(state)) == 2
    state = annotated(Net(1, 16, 16, 16).conv().conv())
    assert Place(profile=write(tmp_path / "a.json", {**slow, "run": {"nodes": 9e4}})).run(state) == 0
    assert state.notes == ["an inference takes about 0.09 ms in float: all is quantized, for the size"]
    with pytest.raises(UserError, match="latency, size, integer"):
        Place("speed").run(annotated(Net(1, 16, 16, 16).conv()))


def test_options_reach_the_pass(tmp_path: Path) -> None:
    net = Net(1, 16, 16, 16).conv().conv()
    profile = write(tmp_path / "a.json", {"int8.pointwise": {"nodes": 1e9}, "float.pointwise": {"nodes": 1e5}})
    samples = [{"x": net.sample()}]
    report = compile_model(net.model(), samples, profile=profile, compare=False).report
    assert not any(layer.quantized for layer in report.layers)
    report = compile_model(net.model(), samples, profile=profile, optimize="integer", compare=False).report
    assert report.emit == "integer"
    assert all(layer.quantized for layer in report.layers)


@pytest.mark.parametrize("emit", ["kernels", "qdq"])
@pytest.mark.parametrize("step", ["conv", "depthwise"])
def test_onnxruntime_does_not_quantize_float_islands(emit: str, step: str) -> None:
    net = Net(1, 16, 8, 8)
    for _ in range(3):
        getattr(net, step)()
    sample = {"x": net.sample()}
    model = compile_model(net.model(), [sample], keep_float=("node_t2",), emit=emit, compare=False).model
    fast, plain = (runtime.run(runtime.session(model, optimize=o), sample)[0] for o in (True, False))
    assert (
        runtime.optimized_ops(model)["QLinearConv"] + runtime.optimized_ops(model)["com.ms.internal.nhwc.QLinearConv"]
        <= 2
    )
    if emit == "kernels":
        assert np.abs(fast - plain).max() < 1e-5
        assert find_traps(model, runtime.optimized(model)) == []


def test_integers_next_to_float_islands_stay_integers() -> None:
    """One tensor is read by a float and by an integer layer; an integer MaxPool makes it."""
    net = Net(1, 16, 8, 8).conv().op("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    source = net.last
    left = net.conv().conv().last
    net.op("Identity", source).conv()
    net.op("Add", net.last, left).conv()
    sample = {"x": net.sample()}
    results = []
    for emit in ("kernels", "integer", "qdq"):
        model = compile_model(net.model(), [sample], keep_float=("node_t3",), emit=emit, compare=False).model
        results.append(runtime.run(runtime.session(model), sample)[0])
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_traps_are_found() -> None:
    net = Net(1, 16, 8, 8).conv().conv().conv()
    text = "normalize,form-blocks,annotate,calibrate,align-scales,scale-weights,insert-qdq"
    text += ",lower-integer,fold-scales,select-kernels"
    sample = {"x": net.sample()}
    model = compile_model(net.model(), [sample], keep_float=("node_t2",), passes=text, compare=False).model
    (trap,) = find_traps(model, runtime.optimized(model))
    assert trap == "ONNX Runtime quantizes 1 float operators, of 'node_t2'"
    net = Net(1, 16, 8, 8).conv().op("MaxPool", kernel_shape=[2, 2]).conv()
    model = compile_model(net.model(), [sample], keep_float=("node_t0", "node_t2"), passes=text, compare=False).model
    assert "MaxPool" in find_traps(model, runtime.optimized(model))[0]


def test_what_pays_on_one_thread_only_stays_float(tmp_path: Path) -> None:
    """A second thread helps the float operator alone."""
    rates = {"float.depthwise": {"nodes": 9e4}, "int8.depthwise": {"nodes": 6e4}}
    one = {**CHEAP, **rates}
    two = {**CHEAP, **rates, "float.depthwise": {"nodes": 4.5e4}}
    for table, count in (
        (CostTable(one), 2),
        (CostTable(one, two=CostTable(one)), 2),
        (CostTable(one, two=CostTable(two)), 0),
    ):
        state = annotated(Net(1, 16, 4, 4).depthwise().depthwise())
        (tmp_path / "a.json").write_text(table.to_json())
        Place(profile=str(tmp_path / "a.json")).run(state)
        assert len(quantized(state)) == count
    for block in state.blocks.values():
        assert block.reason.startswith("faster in float here on two threads: 0.045 ms against 0.06")
