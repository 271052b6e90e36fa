"""Snapshots: all of a state survives the disk."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler import ir, snapshot
from qcompiler.cost import Work
from qcompiler.errors import UserError
from qcompiler.images import PRESETS
from qcompiler.job import prepare
from qcompiler.pipeline import Pipeline
from qcompiler.plan import CompileOptions
from qcompiler.plugin import load_registry
from qcompiler.quant import QuantParams, QuantSpec
from qcompiler.snapshot import Data, Recipe
from qcompiler.state import Block, CompileState, Counterpart, Phase
from tests.support import model_from_text
from tests.test_compile import net, samples

RECIPE = Recipe("net.onnx", "normalize,cleanup", ("/plug/in.py",), Data("/data", 7, PRESETS["imagenet"], lambda: "abc"))
NOT_STORED = {"graph", "target", "ops", "refusals", "calibration", "collectors", "progress", "rewrite_limit"}


def odd_state() -> CompileState:
    """A state with something unusual in every table."""
    registry = load_registry()
    model = model_from_text("g (float[2] x) => (float[2] y) { t = Neg(x) y = Relu(t) }")
    graph = ir.from_proto(model)
    graph.nodes[0].outputs[0].dtype, graph.nodes[0].outputs[0].shape = None, ["a", 3, None]
    spec = QuantSpec("int8", -64, 63, symmetric=True)
    scales = np.array([np.float32(1) / 3, np.nextafter(np.float32(1), np.float32(2)), 2.0**-120], np.float32)
    return CompileState(
        graph,
        replace(registry.targets["integer"], per_channel=False),
        registry.ops,
        Phase.CALIBRATED,
        blocks={"b": Block("b", ("b", "c"), ("y",), -math.inf, 6, True), "a": Block("a", ("a",), (), reason="why")},
        specs={"z": spec, "t": spec.per_channel(1)},
        ties={"y": "t"},
        params={
            "t": QuantParams(spec.per_channel(1), scales, 0),
            "y": QuantParams(spec, np.full((), 0.1, np.float32), 2),
            "f": QuantParams(spec, np.full((), 0.1, np.float32), 2, (0, 3, 1)),
        },
        tables={"table": bytes(range(256))},
        origin={"n": ("first", "second")},
        counterparts={"s": Counterpart("t", np.array([[1 / 3], [2]]), np.zeros(()), True)},
        integers={"w": np.array([[-128, 127, 3]], np.int8)},
        means={"y": np.array([[0.1, -3e-9]], np.float32)},
        corrected={"c", "b", "a"},
        keep_float={"*head*": "asked for"},
        float_work=(Work("conv", macs=1 / 3),),
        skip=("fold-width",),
        predicted=(0.1, 2 / 3),
        metadata={"author": "né"},
        notes=["a note"],
    )


def facts(value: Any) -> Any:
    """A table with its params as bytes, in its order."""
    if isinstance(value, dict):
        return [(key, facts(entry)) for key, entry in value.items()]
    if isinstance(value, Block):
        return repr(value)  # 6 is not 6.0
    if isinstance(value, QuantParams):
        return (
            value.spec,
            value.scale.dtype,
            value.scale.shape,
            value.scale.tobytes(),
            value.zero_point,
            value.exponents,
        )
    if isinstance(value, np.ndarray):
        return value.dtype, value.tolist()
    if isinstance(value, Counterpart):
        return value.source, value.factor.tolist(), value.offset.tolist(), value.reshaped
    return value


def test_every_table_survives(tmp_path: Path) -> None:
    state = odd_state()
    snapshot.write(state, RECIPE, 1, tmp_path / "01-normal.ize")
    found = snapshot.read(tmp_path / "01-normal.ize.onnx", load_registry())
    for field in fields(CompileState):
        if field.name not in NOT_STORED:
            assert facts(getattr(found.state, field.name)) == facts(getattr(state, field.name)), field.name
    assert found.state.target == state.target
    assert [ir.shape(t) for t in ir.tensors(found.state.graph)] == [(2,), ("a", 3, None), (2,)]
    assert ir.to_proto(found.state.graph).graph == ir.to_proto(state.graph).graph
    assert (found.done, found.digest) == (1, "abc")
    assert found.recipe.data is not None and RECIPE.data is not None
    assert replace(found.recipe.data, digest=RECIPE.data.digest) == RECIPE.data
    assert replace(found.recipe, data=RECIPE.data) == RECIPE


def test_a_second_snapshot_is_the_same(tmp_path: Path) -> None:
    snapshot.write(odd_state(), RECIPE, 1, tmp_path / "a")
    again = snapshot.read(tmp_path / "a", load_registry())
    snapshot.write(again.state, again.recipe, again.done, tmp_path / "b")
    for kind in ("onnx", "json", "txt"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_the_text_is_for_people_and_the_json_has_a_line_per_entry(tmp_path: Path) -> None:
    snapshot.write(odd_state(), RECIPE, 1, tmp_path / "a")
    assert (tmp_path / "a.txt").read_text().splitlines()[1] == "t = Neg(x)"
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert ' "remaining": "cleanup",' in lines
    assert (
        '  "y": {"spec": {"dtype": "int8", "qmin": -64, "qmax": 63, "symmetric": true, "axis": null, "log2": false},'
        in "\n".join(lines)
    )
    assert json.loads("\n".join(lines))["blocks"]["b"]["low"] is None


def test_the_digest_is_not_computed_before_the_data_is_read(tmp_path: Path) -> None:
    def digest() -> str:
        raise AssertionError("it would read the data")

    recipe = replace(RECIPE, data=Data(None, None, None, digest))
    snapshot.write(replace(odd_state(), phase=Phase.ANNOTATED), recipe, 1, tmp_path / "a")
    assert snapshot.read(tmp_path / "a", load_registry()).digest is None


def test_a_graph_is_the_same_after_a_round_trip_behind_every_pass() -> None:
    job = prepare(net(), samples(3), CompileOptions())
    for stage in job.pipeline.passes:
        Pipeline((stage,)).run(job.state)
        graph, copy = job.state.graph, job.state.clone().graph
        for a, b in zip(ir.tensors(graph), ir.tensors(copy), strict=True):
            assert (a.name, type(a), ir.type_name(a), ir.shape(a)) == (b.name, type(b), ir.type_name(b), ir.shape(b))
            assert [n.name for n in a.outputs] == [n.name for n in b.outputs], (stage.name, a.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "not a snapshot of format 1"),
        ({"target": {"name": "integr", "per_channel": True}}, "no target is called 'integr'; did you mean 'integer'"),
        ({"params": {"t": {"scale": 1}}}, "the snapshot is damaged: KeyError"),
        ({"blocks": 3}, "the snapshot is damaged"),
        ({"tables": {"t": "?"}}, "the snapshot is damaged"),
        ({"phase": "liquid"}, "the snapshot is damaged"),
    ],
)
def test_what_cannot_be_read_is_the_users_error(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    snapshot.write(odd_state(), RECIPE, 1, tmp_path / "a")
    data = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(UserError, match=message):
        snapshot.read(tmp_path / "a.onnx", load_registry())


def test_files_that_are_no_snapshot_are_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(net().SerializeToString())
    with pytest.raises(UserError, match=r"has side tables; there is no such file .*model\.json"):
        snapshot.read(tmp_path / "model.onnx", load_registry())
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(UserError, match="the snapshot is damaged"):
        snapshot.read(tmp_path / "model.onnx", load_registry())
