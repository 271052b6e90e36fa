"""Reduce: what is left is small, still fails in the same way, and can be compiled with the samples beside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent

import numpy as np
import onnx
import pytest

from qcompiler import UserError, compile_model
from qcompiler.plan import CompileOptions
from qcompiler.predicate import Expression
from qcompiler.reduce import CommandExits, Crashes, Failure, IsInaccurate, reduce, write_samples
from qcompiler.state import Feeds
from tests.support import model_from_text, ops_of, run
from tests.test_bisect import broken
from tests.test_cli import Run, folder, qcompile  # noqa: F401  (fixtures)
from tests.test_compile import samples

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from qcompiler.plugin import Plugin
from qcompiler.state import Phase

@dataclass(frozen=True)
class Fragile:
    name: ClassVar[str] = "fragile"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state):
        for node in state.graph.nodes:
            if node.op == "Add" and {t.inputs[0].op for t in node.inputs if t.inputs} == {"Relu", "Sigmoid"}:
                raise KeyError(node.name)
            if node.op == "Exp":
                raise OSError("another crash")
        return 0

PLUGIN = Plugin("fragile", passes=(Fragile,))
"""

NET = """g (float[N,3,8,8] x) => (float[N,4,8,8] y, float[N,4,8,8] e) {
    c = Conv<pads = [1, 1, 1, 1]>(x, w)
    n = Neg(c)
    r = Relu(n)
    s = Sigmoid(c)
    one = Constant<value = float {1.0}>()
    a = Add(r, s)
    m = Mul(a, one)
    t = Tanh(m)
    y = Mul(t, one)
    u = Mul(t, t)
    e = Exp(u)
}"""


def net() -> onnx.ModelProto:
    weights = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    return model_from_text(NET, {"w": weights})


@pytest.fixture
def fragile(tmp_path: Path) -> CompileOptions:
    (tmp_path / "fragile.py").write_text(PLUGIN)
    return CompileOptions(passes="normalize,fragile", load=[tmp_path / "fragile.py"])


def has(*ops: str) -> Failure:
    def fails(model: onnx.ModelProto, fed: Sequence[Feeds]) -> str | None:
        onnx.checker.check_model(model)
        for sample in fed:
            run(model, sample)
        return "it has them" if set(ops) <= set(ops_of(model)) else None

    return fails


def test_a_crash_of_a_pass(fragile: CompileOptions) -> None:
    found = reduce(net(), samples(6), Crashes(fragile), fragile)
    assert found.failure == "pass fragile: KeyError"
    assert sorted(ops_of(found.model)) == ["Add", "Relu", "Sigmoid"]
    assert len(found.samples) == 1
    assert found.steps[0] == "keep 1 of 6 samples"
    assert found.steps[-1].endswith(": 3 nodes are left")
    assert Crashes(fragile)(found.model, found.samples) == found.failure


def test_the_same_arguments_give_the_same_result(fragile: CompileOptions) -> None:
    a, b = (reduce(net(), samples(6), Crashes(fragile), fragile) for _ in range(2))
    assert (a.model, a.steps) == (b.model, b.steps)


@pytest.mark.parametrize("op", ["Conv", "Neg", "Tanh", "Exp"])
def test_one_node_is_fed_what_the_whole_model_computes(op: str) -> None:
    found = reduce(net(), samples(3), has(op), CompileOptions())
    (node,) = (n for n in net().graph.node if n.op_type == op)
    assert ops_of(found.model) == [op]
    whole = net()
    whole.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    expected = run(whole, samples(3)[0])[-1]
    np.testing.assert_allclose(run(found.model, found.samples[0])[0], expected, rtol=1e-5, atol=1e-6)


def test_nodes_that_are_far_apart_become_two_parts() -> None:
    found = reduce(net(), samples(3), has("Conv", "Exp"), CompileOptions())
    assert sorted(ops_of(found.model)) == ["Conv", "Exp"]
    assert [v.name for v in found.model.graph.input] == ["x", "u"]
    assert [v.name for v in found.model.graph.output] == ["c", "e"]
    assert [d.dim_value for d in found.model.graph.input[1].type.tensor_type.shape.dim] == [1, 4, 8, 8]


def test_constants_stay_with_their_readers() -> None:
    found = reduce(net(), samples(3), has("Mul"), CompileOptions())
    assert sorted(ops_of(found.model)) in (["Constant", "Mul"], ["Mul"])
    assert "one" not in [v.name for v in found.model.graph.input]


def test_more_samples_are_kept_if_they_are_needed() -> None:
    found = reduce(net(), samples(8), lambda _, fed: "too many" if len(fed) >= 3 else None, CompileOptions())
    assert len(found.samples) == 4
    assert len(ops_of(found.model)) == 1
    found = reduce(net(), samples(3), lambda _, fed: "too many" if len(fed) >= 3 else None, CompileOptions())
    assert len(found.samples) == 3


def test_subgraphs() -> None:
    model = model_from_text("""g (float[2] x, bool p) => (float[2] y) {
        a = Neg(x)
        b = Abs(a)
        c = If (p) <then_branch = t () => (float[2] d) { d = Add(a, b) }, else_branch = e () => (float[2] f) { f = Sub(a, b) }>
        y = Relu(c)
    }""")
    feeds = {"x": np.float32([1, -2]), "p": np.array(True)}
    found = reduce(model, [feeds], has("If"), CompileOptions())
    assert ops_of(found.model) == ["If"]
    assert sorted(found.samples[0]) == ["a", "b", "p"]


def test_a_poor_accuracy() -> None:
    options = CompileOptions()
    text = """g (float[1,3,8,8] x) => (float[1,4,8,8] y) {
        c = Conv<pads = [1, 1, 1, 1]>(x, w) r = Relu(c) h = HardSigmoid(r) y = Mul(h, k)
    }"""
    model = model_from_text(text, {"w": np.float32(np.arange(108)).reshape(4, 3, 3, 3), "k": np.float32(3)})
    fails = IsInaccurate(options, Expression("sqnr < 200"))
    found = reduce(model, samples(4), fails, options)
    assert found.failure == "sqnr < 200"
    assert len(ops_of(found.model)) == 1


def test_a_command(tmp_path: Path) -> None:
    (tmp_path / "check.py").write_text(
        dedent("""
        import sys
        from pathlib import Path
        import numpy as np, onnx
        model = onnx.load(sys.argv[1])
        feeds = np.load(sorted(Path(sys.argv[2]).glob("*.npz"))[0])
        assert sorted(feeds) == sorted(v.name for v in model.graph.input)
        sys.exit(3 if "Tanh" in [n.op_type for n in model.graph.node] else 0)
        """)
    )
    command = f"{sys.executable} {tmp_path / 'check.py'} {{model}} {{calib}}"
    found = reduce(net(), samples(2), CommandExits(command), CompileOptions())
    assert (ops_of(found.model), found.failure) == (["Tanh"], "the command exits with 3")


def test_a_model_that_does_not_fail_is_the_users_error() -> None:
    with pytest.raises(UserError, match="compiling the model does not fail"):
        reduce(net(), samples(2), Crashes(CompileOptions()), CompileOptions())


def test_samples_are_read_again(tmp_path: Path, fragile: CompileOptions) -> None:
    found = reduce(net(), samples(6), Crashes(fragile), fragile)
    write_samples([*found.samples, *found.samples], tmp_path / "calib")
    write_samples(found.samples, tmp_path / "calib")
    assert [p.name for p in (tmp_path / "calib").iterdir()] == ["000.npz"]
    result = compile_model(found.model, tmp_path / "calib", compare=False)
    assert result.report.samples == 1


def test_the_command_writes_all_that_is_needed(qcompile: Run, folder: Path) -> None:  # noqa: F811
    (folder / "fragile.py").write_text(PLUGIN)
    (folder / "net.onnx").write_bytes(net().SerializeToString())
    options = ("--load", "fragile.py", "--passes", "normalize,fragile")
    code, out, err = qcompile("reduce", "net.onnx", "--calib", "calib", *options)
    assert (code, err) == (0, "")
    assert "net.reduced.onnx  3 nodes, 1 samples in net.reduced.calib\nfails     pass fragile: KeyError\n" in out
    assert (folder / "net.reduced.txt").read_text().startswith("pass fragile: KeyError\nkeep 1 of 10 samples\ncut ")
    code, _, err = qcompile("net.reduced.onnx", "--calib", "net.reduced.calib", *options)
    assert (code, "KeyError" in err) == (70, True)
    assert qcompile("reduce", "net.onnx", "--calib", "calib")[1:] == (
        "",
        "error: compiling the model does not fail (model)\n",
    )
    assert qcompile("reduce", "net.onnx")[0] == 2
    assert qcompile("reduce", "net.onnx", "--calib", "calib", "--fails", "sqnr < 1", "--fails-cmd", "x {model}")[0] == 2


def test_a_model_that_does_not_run_is_not_the_fault_of_a_pass() -> None:
    assert Crashes(CompileOptions())(broken(), [{"x": np.ones((1, 4, 8, 8), np.float32)}]) is None
