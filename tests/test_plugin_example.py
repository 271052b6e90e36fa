"""A plug-in package that is really installed: each thing that it brings is used; what breaks is named; where none load from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qcompiler import compile_model
from tests.sandbox import Sandbox
from tests.support import model_from_text, ops_of

EXAMPLE = Path(__file__).parent / "plugin_example"
PACKAGE = "qcompiler-example 1.2.3"

NET = """
net (float[1,3,8,8] x) => (float[1,5] y) {
    a = Conv(x, w)
    b = Asinh(a)
    c = Conv(b, v)
    p = GlobalAveragePool(c)
    f = Flatten(p)
    y = MatMul(f, u)
}"""


def net() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 3, 3, 3), "v": (8, 8, 1, 1), "u": (8, 5)}
    model = model_from_text(NET, {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()})
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[:4, 0] = 1e-3
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    return model


def samples() -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 3, (8, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """An environment with the example, the way a user installs it, and a model to compile."""
    folder = tmp_path_factory.mktemp("example")
    box = Sandbox.make(folder / "env")
    box.output(f"pip install '{EXAMPLE}'", folder)
    (folder / "net.onnx").write_bytes(net().SerializeToString())
    np.save(folder / "x.npy", samples())
    return box


@pytest.fixture(scope="module")
def folder(box: Sandbox) -> Path:
    return box.root.parent


@pytest.fixture(scope="module")
def compiled(box: Sandbox, folder: Path) -> dict[str, Any]:
    options = "--target example-npu --collector power-of-two --passes pruned --why prune-weights"
    return json.loads(box.output(f"qcompile net.onnx --calib x.npy {options} --json", folder))


def test_lists_name_the_package(box: Sandbox, folder: Path) -> None:
    listed = json.loads(box.output("qcompile passes --json", folder))
    packages = {p["name"]: p["package"] for p in listed["passes"]}
    assert packages["prune-weights"] == PACKAGE
    assert packages["cleanup"].startswith("qcompiler ")
    assert "prune-weights,form-blocks" in listed["pipelines"]["pruned"]
    rows = json.loads(box.output("qcompile ops --target example-npu --json", folder))
    fates = {row["op"]: (row["package"].split()[0], row["fate"]) for row in rows}
    assert fates["Asinh"] == ("qcompiler-example", "integer between integer neighbours")
    assert fates["GlobalAveragePool"] == ("qcompiler", "float: the NPU has no unit for averages")


def test_the_pass_runs_and_tells_what_it_left(compiled: dict[str, Any]) -> None:
    assert next(p for p in compiled["passes"] if p["name"] == "prune-weights")["rewrites"] == 2
    [why] = compiled["why"]
    assert [(r["op"], r["reason"]) for r in why["refused"]] == [("Conv", "no weight is small")] * 2


def test_the_target_and_the_row_decide(compiled: dict[str, Any]) -> None:
    assert compiled["target"] == "example-npu"
    layers = {layer["op"]: (layer["quantized"], layer["reason"]) for layer in compiled["layers"]}
    assert layers["Asinh"] == (True, "")
    assert layers["GlobalAveragePool"] == (False, "the NPU has no unit for averages")
    [alone] = [layer for layer in compile_model(net(), samples()).report.layers if layer.op == "Asinh"]
    assert (alone.quantized, alone.reason) == (False, "Asinh has no row in the operator table")


def test_the_collector_measures(compiled: dict[str, Any], folder: Path) -> None:
    assert "calibrate{collector=power-of-two}" in compiled["pipeline"]
    model = onnx.load(folder / "net.int8.onnx")
    quantize = next(node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "x")
    scale = next(onnx.numpy_helper.to_array(i) for i in model.graph.initializer if i.name == quantize.input[1])
    assert float(scale) == pytest.approx(8 / 255, rel=0.02)  # -4 .. 4 covers -1 .. 3
    assert "QLinearConv" in ops_of(model)


def test_wrong_options_are_the_users_error(box: Sandbox, folder: Path) -> None:
    done = box.run("qcompile net.onnx --passes 'normalize,prune-weights{share=2}' -o out.onnx", folder)
    message = "error: share must be at least 0 and less than 1, not 2 (prune-weights)\n"
    assert (done.returncode, done.stderr) == (2, message)


BREAKS = """
from dataclasses import dataclass
from typing import ClassVar
from qcompiler.plugin import Plugin
from qcompiler.state import Phase

@dataclass(frozen=True)
class Break:
    name: ClassVar[str] = "break"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state):
        return {}["gone"]

PLUGIN = Plugin("breaking", passes=(Break,))
"""


def installed(folder: Path, text: str) -> str:
    """A folder on the path with the package `acme-breaks 0.1`, whose module holds the text."""
    (folder / "acme_breaks").mkdir()
    (folder / "acme_breaks" / "__init__.py").write_text(text)
    facts = folder / "acme_breaks-0.1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-breaks\nVersion: 0.1\n")
    (facts / "entry_points.txt").write_text("[qcompiler.plugins]\nacme = acme_breaks:PLUGIN\n")
    return str(folder)


def test_a_pass_that_raises_is_named_with_its_package(box: Sandbox, folder: Path, tmp_path: Path) -> None:
    path = installed(tmp_path, BREAKS)
    done = box.run("qcompile net.onnx --passes normalize,break -o out.onnx", folder, PYTHONPATH=path)
    assert done.returncode == 70
    assert done.stderr.startswith("internal error: pass break of acme_breaks: KeyError: 'gone'")


def test_a_plug_in_that_does_not_load_is_named_with_its_package(box: Sandbox, folder: Path, tmp_path: Path) -> None:
    done = box.run("qcompile passes", folder, PYTHONPATH=installed(tmp_path, "import nothing_of_that_name"))
    assert (done.returncode, done.stderr) == (
        2,
        "error: plug-in 'acme' of acme-breaks 0.1 does not load: ModuleNotFoundError: "
        "No module named 'nothing_of_that_name' (acme_breaks:PLUGIN)\n",
    )


@pytest.mark.parametrize("start", ["command", "module"])
def test_nothing_loads_from_the_current_folder_or_the_models(tmp_path: Path, start: str) -> None:
    """Neither a module with the name of a plug-in, nor what looks like an installed package."""
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')\nfrom qcompiler.plugin import Plugin\nPLUGIN = Plugin('trap')\n"
    installed(tmp_path, trap)
    (tmp_path / "passes").mkdir()
    for name in ("qcompiler_passes.py", "passes/__init__.py", "qcompiler_example.py", "numpy.py"):
        (tmp_path / name).write_text(trap)
    (tmp_path / "net.onnx").write_bytes(net().SerializeToString())
    command = [str(Path(sys.executable).with_name("qcompile"))]
    arguments = ["net.onnx", "--passes", "normalize,cleanup", "-q"]
    argv = [*(command if start == "command" else [sys.executable, "-m", "qcompiler"]), *arguments]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "net.int8.onnx").exists()
    assert not (tmp_path / "sprung").exists()
