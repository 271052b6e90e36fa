from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from qcompiler_passes.form_blocks import FormBlocks

from qcompiler import fit_cost
from qcompiler.concrete_shapes import concrete_shapes
from qcompiler.cost import NEAR, CostTable, Work, far, read_table, shipped_table
from qcompiler.errors import UserError
from qcompiler.microbench import Net
from qcompiler.networks import networks
from qcompiler.work import Accountant
from tests.support import model_from_text, state_of


def test_a_time_is_the_sum_over_units() -> None:
    table = CostTable({"float.conv": {"nodes": 100, "macs": 0.5}, "float.other": {"reads": 2}})
    assert table.seconds(Work("float.conv", macs=10, reads=7)) == pytest.approx(105e-9)
    assert table.seconds(Work("float.unheard", reads=3)) == pytest.approx(6e-9)
    assert table.total([Work("float.conv"), Work("int8.unheard", reads=1)]) == pytest.approx(100e-9)


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table = CostTable({"run": {"nodes": 12.5}, "int8.Add": {"reads": 0.25, "writes": 1e-4}}, {"cpu": "a"})
    path = tmp_path / "cpu.json"
    for written in (table, CostTable(table.kinds, table.machine, CostTable({"run": {"nodes": 20.0}}))):
        path.write_text(written.to_json())
        assert read_table(path) == written


@pytest.mark.parametrize(
    "text", ["", "{}", '{"format": 9}', '{"format": 1, "machine": {}, "nanoseconds": {"run": {"nodes": -1}}}']
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(text)
    with pytest.raises(UserError, match="no profile"):
        read_table(path)
    with pytest.raises(UserError, match="cannot read"):
        read_table(tmp_path / "none.json")


def test_the_shipped_table_knows_all_the_work_of_the_networks() -> None:
    table = shipped_table("ort-cpu")
    assert table is not None
    for kind in (
        "run",
        "float.pointwise",
        "float.depthwise",
        "int8.spatial",
        "int8.gemm",
        "quantize.map",
        "dequantize.map",
    ):
        assert table.seconds(Work(kind, 1, 1e6, 1e5, 1e5, 1e5, 1e5, 1e4)) > 0


def test_least_squares_without_negative_rates() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.random((20, 4))
    x = np.array([0.5, 0.0, 2.0, 0.0])
    assert np.allclose(fit_cost.nonnegative_least_squares(matrix, matrix @ x), x, atol=1e-6)
    pulled = fit_cost.nonnegative_least_squares(matrix, matrix @ np.array([1.0, -0.5, 1.0, 0.0]))
    assert (pulled >= 0).all()
    assert pulled[1] == 0


def test_a_fit_finds_the_rates_that_made_the_times() -> None:
    rng = np.random.default_rng(1)
    works = [[Work("run"), Work("float.gemm", macs=float(rng.integers(1, 10**6)))] for _ in range(30)]
    table = CostTable({"run": {"nodes": 4000.0}, "float.gemm": {"nodes": 300.0, "macs": 0.01}})
    times = np.array([table.total(work) for work in works])
    times[3] *= 10  # someone else used the machine
    fitted = CostTable(fit_cost.fit(works, times))
    for i, work in enumerate(works):
        assert i == 3 or fitted.total(work) == pytest.approx(times[i], rel=0.02)


def test_networks_are_timed_in_float_and_in_int8() -> None:
    net = Net(1, 16, 8, 8).conv().conv()
    in_float, in_int8 = fit_cost.compiled(net)
    assert [w.kind for w in in_float.work] == ["run", "float.pointwise", "float.pointwise"]
    assert [w.kind for w in in_int8.work] == [
        "run",
        "int8.pointwise",
        "int8.pointwise",
        "quantize.map",
        "dequantize.map",
    ]
    table, error = fit_cost.measure_table([net], seconds=0.02)
    assert error < 1
    assert table.two is not None
    assert table.kinds["int8.pointwise"].keys() == table.two.kinds["int8.pointwise"].keys()
    assert len(list(networks())) > 200


def test_products_of_vectors_are_accounted_for() -> None:
    """The result of a matrix and a vector has no axis of columns, that of two vectors no axis at all."""
    text = "g (float[6,4] x, float[4] v) => (float[6] y, float s) { y = MatMul(x, v) s = MatMul(v, v) }"
    model = onnx.shape_inference.infer_shapes(model_from_text(text))
    state = state_of(model)
    FormBlocks().run(state)
    shapes = concrete_shapes(state)
    assert shapes is not None
    works = Accountant(state, shapes).total(())
    assert [(w.macs, w.writes) for w in works if w.kind == "float.MatMul.activations"] == [(24, 6), (4, 1)]


def spread(rates: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{kind} {unit}": rate for kind, entry in rates.items() for unit, rate in entry.items()}


def test_nothing_is_free_that_the_times_do_not_tell_apart() -> None:
    works = [[Work("run"), Work("float.Tanh", reads=n, writes=n)] for n in (1e4, 1e5, 1e6)]
    rates = fit_cost.fit(works, np.array([4e-6 + 1e-10 * work[1].reads for work in works]))
    assert all(rate > 0 for rate in spread(rates).values())
    assert sum(rates["float.Tanh"][unit] for unit in ("reads", "writes")) == pytest.approx(0.1, rel=0.05)
    assert rates["float.other"] == {unit: rates["float.Tanh"][unit] for unit in ("nodes", "reads", "writes")}


def test_only_what_exceeds_a_near_cache_is_far() -> None:
    assert far("float.Add", NEAR / 4, NEAR / 4 + 10, 5) == 10
    assert far("int8.Add", NEAR - 1, NEAR + 3) == 3


def test_blocked_floats_are_reordered_on_the_way_to_integers_and_back() -> None:
    net = Net(1, 32, 8, 8).conv().conv().conv()
    net.keep = ("node_t2",)
    work = fit_cost.compiled(net)[1].work
    assert [w.kind for w in work].count("float.reorder") == 2
    assert [w.kind for w in fit_cost.compiled(Net(1, 32, 8, 8).conv())[1].work].count("float.reorder") == 0


def test_a_function_is_fused_only_with_a_float_convolution() -> None:
    net = Net(1, 32, 8, 8).conv(relu=False).op("HardSwish").conv()
    kinds = [w.kind for w in fit_cost.compiled(net)[0].work]
    assert "float.HardSwish.fused" in kinds
    assert "float.reorder" not in kinds  # what the convolution makes stays in its layout
    state = state_of(onnx.shape_inference.infer_shapes(net.model()))
    FormBlocks().run(state)
    shapes = concrete_shapes(state)
    assert shapes is not None
    works = Accountant(state, shapes).total({"node_t0"})
    assert [w.kind for w in works if "HardSwish" in w.kind] == ["float.HardSwish.fused", "float.HardSwish.alone"]


def test_conversions_take_as_long_on_two_threads_as_on_one() -> None:
    works = [[Work("run"), Work("quantize.map", reads=n)] for n in (1e4, 1e5, 1e6)]
    one = np.array([4e-6 + 1e-10 * work[1].reads for work in works])
    table = fit_cost.fit_table(works, np.stack([one, one / 2], axis=1), {})
    assert table.two is not None
    assert table.two.seconds(works[1][1]) >= table.seconds(works[1][1])


def test_a_function_that_is_written_out_costs_its_operators() -> None:
    three, six = np.float32(3), np.float32(6)
    net = Net(1, 16, 8, 8).conv(relu=False)
    source = net.last
    net.op("Add", source, three).op("Clip", net.last, np.float32(0), six).op("Mul", net.last, source).op(
        "Div", net.last, six
    )
    given, _ = fit_cost.compiled(net.conv())
    assert [w.kind for w in given.work].count("float.other") == 3
    whole, _ = fit_cost.compiled(Net(1, 16, 8, 8).conv(relu=False).op("HardSwish").conv())
    assert [w.kind for w in whole.work].count("float.other") == 0


def test_softmax_over_other_axes_is_another_kind() -> None:
    for axis, kind in ((1, "float.Softmax.strided"), (-1, "float.Softmax"), (3, "float.Softmax")):
        given, _ = fit_cost.compiled(Net(1, 16, 8, 8).conv().op("Softmax", axis=axis))
        assert kind in [w.kind for w in given.work]


def test_mixed_networks_keep_the_same_layers_float_each_time() -> None:
    net = Net(1, 16, 8, 8).conv().conv(kernel=3).conv().conv()
    assert net.mixed(1).keep == net.mixed(1).keep
    assert len({net.mixed(seed).keep for seed in range(8)}) > 2
    assert net.keep == ()
