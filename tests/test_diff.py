"""Diff: what differs between two models, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qcompiler import compile_model
from qcompiler.diff import ConstantChange, Values, diff
from tests.support import model_from_text
from tests.test_cli import Run, folder, qcompile  # noqa: F401  (fixtures)
from tests.test_compile import net, samples

TEXT = """g (float[1,2,4,4] x) => (float[1,2,4,4] y) {
    [conv] c = Conv<pads = [0, 0, 0, 0]>(x, w, b)
    [relu] r = Relu(c)
    [add] y = Add(r, k)
}"""
WEIGHTS = {
    "w": np.float32([[[[1]], [[2]]], [[[3]], [[4]]]]),
    "b": np.float32([1, np.nan]),
    "k": np.float32(5),
}


def model() -> onnx.ModelProto:
    return model_from_text(TEXT, WEIGHTS)


def lines(change: Callable[[onnx.GraphProto], object]) -> list[str]:
    changed = model()
    change(changed.graph)
    return list(diff(model(), changed).lines())


def set_values(graph: onnx.GraphProto, name: str, values: np.ndarray) -> None:
    (tensor,) = (t for t in graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(values), name))


def test_equal_models_do_not_differ() -> None:
    found = diff(model(), model())
    assert not found
    assert list(found.lines()) == []
    assert found.to_dict() == {"same": True, "interface": (), "nodes": (), "constants": (), "same_nodes": 3}


def test_the_order_of_nodes_and_own_metadata_do_not_count() -> None:
    changed = model()
    nodes = list(changed.graph.node)
    del changed.graph.node[:]
    changed.graph.node.extend([nodes[1], nodes[0], nodes[2]])
    changed.metadata_props.add(key="qcompiler.version", value="7")
    changed.graph.value_info.append(helper.make_tensor_value_info("r", 1, [1, 2, 4, 4]))
    assert not diff(model(), changed)


def test_nodes_removed_added_and_changed() -> None:
    def change(graph: onnx.GraphProto) -> None:
        graph.node[0].attribute[0].ints[0] = 1
        graph.node[0].attribute.append(helper.make_attribute("group", 1))
        del graph.node[0].input[2]
        graph.node[1].op_type = "LeakyRelu"
        graph.node[2].input[0] = "n"
        graph.node.append(helper.make_node("Neg", ["r"], ["n"], "neg"))
        del graph.node[3].attribute[:]

    assert (
        lines(change)
        == dedent("""\
        nodes: 0 removed, 1 added, 3 changed, 0 the same
          ~ conv
              group: none -> 1
              pads: [0, 0, 0, 0] -> [1, 0, 0, 0]
              input 2: b -> none
          ~ relu
              operator: Relu -> LeakyRelu
          ~ add
              input 0: r -> n
          + neg: n = Neg(r)
        constants: 1 removed, 0 added, 0 changed
          - b  float32[2]  1 .. 1  mean 1
        """).splitlines()
    )


def test_a_node_with_another_name_is_known_by_what_it_writes() -> None:
    def rename(graph: onnx.GraphProto) -> None:
        graph.node[1].name = "activation"

    expected = ["nodes: 0 removed, 0 added, 1 changed, 2 the same", "  ~ activation", "      name: relu -> activation"]
    assert lines(rename) == expected

    def replace(graph: onnx.GraphProto) -> None:
        graph.node[1].CopyFrom(helper.make_node("Abs", ["c"], ["r"], "abs"))

    assert lines(replace)[1:] == ["  - relu: r = Relu(c)", "  + abs: r = Abs(c)"]


def test_nodes_without_names_are_matched() -> None:
    unnamed = model()
    for node in unnamed.graph.node:
        node.name = ""
    changed = onnx.ModelProto()
    changed.CopyFrom(unnamed)
    assert not diff(unnamed, changed)
    changed.graph.node[0].attribute[0].ints[0] = 2
    assert len(diff(unnamed, changed).nodes) == 1


def test_constants_have_statistics() -> None:
    def change(graph: onnx.GraphProto) -> None:
        set_values(graph, "w", np.float32([[[[1]], [[2.5]]], [[[3]], [[0]]]]))
        set_values(graph, "k", np.float32([5, 6]).reshape(1, 2, 1, 1))

    assert (
        lines(change)
        == dedent("""\
        constants: 0 removed, 0 added, 2 changed
          ~ w  2 of 4 elements, by up to 4
              - float32[2,2,1,1]  1 .. 4  mean 2.5
              + float32[2,2,1,1]  0 .. 3  mean 1.625
          ~ k
              - float32[]  5 .. 5  mean 5
              + float32[1,2,1,1]  5 .. 6  mean 5.5
        """).splitlines()
    )


def test_a_constant_with_another_name_is_known_by_its_reader() -> None:
    def rename(graph: onnx.GraphProto, values: np.ndarray) -> None:
        graph.node[0].input[2] = "bias"
        set_values(graph, "b", values)
        graph.initializer[1].name = "bias"

    assert lines(lambda graph: rename(graph, WEIGHTS["b"])) == []
    found = lines(lambda graph: rename(graph, np.float32([3, np.nan])))
    assert found[1] == "  ~ b -> bias  1 of 2 elements, by up to 2"


def test_integers_are_compared_exactly() -> None:
    big = 2**53
    a, b = (
        model_from_text("g (int64[1] x) => (int64[1] y) { y = Add(x, k) }", {"k": np.int64([v])})
        for v in (big, big + 1)
    )
    (change,) = diff(a, b).constants
    assert (change.changed, change.elements) == (1, 1)


def test_what_is_outside_the_nodes() -> None:
    changed = model()
    changed.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    changed.opset_import[0].version = 18
    changed.metadata_props.add(key="author", value="me")
    assert list(diff(model(), changed).lines()) == [
        "input - x: float32[1,2,4,4]",
        "input + x: float32[n,2,4,4]",
        "opset ai.onnx: 17 -> 18",
        "metadata author: none -> me",
    ]


def test_subgraphs_are_looked_into() -> None:
    def branches(op: str) -> onnx.ModelProto:
        return model_from_text(f"""g (bool c, float[2] x) => (float[2] y) {{
            y = If (c) <then_branch = t () => (float[2] a) {{ a = {op}(x) }}, else_branch = e () => (float[2] b) {{ b = Neg(x) }}>
        }}""")

    assert not diff(branches("Relu"), branches("Relu"))
    found = diff(branches("Relu"), branches("Abs"))
    assert [(n.before, n.after) for n in found.nodes] == [("a = Relu(x)", None), (None, "a = Abs(x)")]


def test_what_a_pass_did(tmp_path: Path) -> None:
    compile_model(net(), samples(3), dump=tmp_path, compare=False)
    before, after = (onnx.load(next(tmp_path.glob(f"*-{name}.onnx"))) for name in ("scale-weights", "correct-bias"))
    found = diff(before, after)
    assert [node.changes for node in found.nodes] == [("input 2: none -> /gemm_corrected_bias",)]
    bias, new = found.constants
    assert (bias.renamed, bias.elements) == ("/conv_corrected_bias", 64)  # 16 channels of 4 columns
    assert 0 < (bias.max_abs_difference or 0) < 0.1
    assert (new.before, new.name) == (None, "/gemm_corrected_bias")


def test_the_command(qcompile: Run, folder: Path) -> None:  # noqa: F811
    changed = net()
    changed.graph.node[1].op_type = "Abs"
    (folder / "b.onnx").write_bytes(changed.SerializeToString())
    assert qcompile("diff", "net.onnx", "net.onnx") == (0, "", "")
    code, out, err = qcompile("diff", "net.onnx", "b.onnx")
    assert (code, err) == (1, "")
    assert out.splitlines()[1:] == ["  ~ /relu", "      operator: Relu -> Abs"]
    code, out, _ = qcompile("diff", "net.onnx", "b.onnx", "--json")
    data = json.loads(out)
    assert (code, data["same"], data["nodes"][0]["changes"]) == (1, False, ["operator: Relu -> Abs"])
    code, out, err = qcompile("diff", "net.onnx", "missing.onnx")
    assert (code, out) == (2, "")
    assert "missing.onnx" in err


@pytest.mark.parametrize("values", [np.array(["a", "b"]), np.zeros((0, 2), np.float32), np.float32([np.nan])])
def test_constants_without_statistics(values: np.ndarray) -> None:
    text = "g (float[1] x) => (float[1] y) { y = Identity(x) z = Identity(k) }"
    a = model_from_text(text)
    a.graph.node[1].input[0] = "x"
    b = model_from_text(text)
    b.graph.initializer.append(
        numpy_helper.from_array(values.astype(object) if values.dtype.kind == "U" else values, "k")
    )
    (change,) = diff(a, b).constants
    assert isinstance(change, ConstantChange)
    assert isinstance(change.after, Values) and change.after.min is None
