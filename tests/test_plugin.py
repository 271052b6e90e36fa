"""Plug-ins: registration, clashes, --load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from qcompiler_passes import PLUGIN
from qcompiler_passes.cleanup import Cleanup

from qcompiler import plugin
from qcompiler.collectors import COLLECTORS
from qcompiler.errors import UserError
from qcompiler.ops import OPS, Lowering, OpRule, Result, Role
from qcompiler.pipeline import parse_pipeline
from qcompiler.plugin import Plugin, Registry, load_registry

MY_PASS = '''
from dataclasses import dataclass
from typing import ClassVar
from qcompiler.plugin import Plugin
from qcompiler.state import CompileState, Phase

@dataclass(frozen=True)
class Shout:
    """Does nothing, loudly."""
    volume: int = 11
    name: ClassVar[str] = "{name}"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        return 0

PLUGIN = Plugin("shouting", passes=(Shout,))
'''


def my_pass(folder: Path, name: str = "shout") -> Path:
    path = folder / "my pass.py"
    path.write_text(MY_PASS.replace("{name}", name))
    return path


def test_built_ins_come_through_the_entry_point() -> None:
    registry = load_registry()
    assert set(registry.passes) == {p.name for p in PLUGIN.passes}
    assert registry.source["pass", "cleanup"] == "qcompiler-passes"
    assert set(registry.ops) >= set(OPS)
    assert set(registry.collectors) >= set(COLLECTORS)
    assert {"ort-cpu", "ort-cpu-avx2", "integer"} <= set(registry.targets)


def test_the_default_pipeline_parses() -> None:
    registry = load_registry()
    pipeline = parse_pipeline(registry.pipelines["default"], registry.passes)
    assert parse_pipeline(str(pipeline), registry.passes) == pipeline


@pytest.mark.parametrize(
    ("offer", "kind", "name"),
    [
        (Plugin("mine", passes=(Cleanup,)), "pass", "cleanup"),
        (Plugin("mine", collectors={"x": object}, targets=PLUGIN.targets[:1]), "target", PLUGIN.targets[0].name),  # type: ignore[dict-item]
        (Plugin("mine", pipelines={"default": "cleanup"}), "pipeline", "default"),
    ],
)
def test_clashes_name_both_packages(offer: Plugin, kind: str, name: str) -> None:
    registry = Registry()
    registry.add(PLUGIN)
    message = f"two plug-ins define the {kind} '{name}': qcompiler-passes and mine (plug-ins)"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        registry.add(offer)


def test_operators_clash_by_domain_and_name() -> None:
    registry = load_registry()
    relu = OpRule("Relu", (Role.ACT,), Result.OWN, Lowering.NONE, domain="acme")
    registry.add(Plugin("acme", ops=(relu,)))
    assert registry.ops["acme.Relu"] is relu
    with pytest.raises(UserError, match=r"two plug-ins define the op 'acme\.Relu': acme and emca"):
        registry.add(Plugin("emca", ops=(relu,)))


def test_load_adds_a_file(tmp_path: Path) -> None:
    registry = load_registry([my_pass(tmp_path)])
    [stage] = parse_pipeline("shout{volume=3}", registry.passes).passes
    assert stage.run(None) == 0  # type: ignore[arg-type]
    assert registry.source["pass", "shout"] == "shouting"


def test_a_loaded_file_may_clash_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the pass 'cleanup': qcompiler-passes and shouting"):
        load_registry([my_pass(tmp_path, "cleanup")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("x = 1", "the file defines no PLUGIN"),
        ("PLUGIN = 7", "expected a qcompiler.plugin.Plugin, found int"),
        ("import nonexistent_module", "does not load: ModuleNotFoundError: No module named 'nonexistent_module'"),
        ("def f(:", "does not load: SyntaxError"),
    ],
)
def test_load_errors_name_the_file(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_registry([path])
    assert caught.value.where == f"--load {path}"


def test_an_installed_plugin_that_breaks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name, value, module, dist = "bad", "bad_package:PLUGIN", "bad_package", None

        def load(self) -> object:
            raise ImportError("no numpy")

    monkeypatch.setattr(plugin, "entry_points", lambda group: [Entry()])
    with pytest.raises(
        UserError, match=r"plug-in 'bad' of bad_package does not load: ImportError: no numpy \(bad_pack"
    ):
        load_registry()
