"""Plug-ins: passes, collectors, operator rows, targets and named pipelines from any installed package.

The built-in passes come through the same entry point group, `qcompiler.plugins`, with no privileged path.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from qcompiler import __version__
from qcompiler.collectors import COLLECTORS, Collector
from qcompiler.errors import UserError
from qcompiler.ops import OPS, OpRule, op_key
from qcompiler.pipeline import Pass
from qcompiler.target import Target

GROUP = "qcompiler.plugins"


@dataclass(frozen=True)
class Plugin:
    """What a package adds. `collectors` and `pipelines` are keyed by the name that users type."""

    name: str
    passes: tuple[type[Pass], ...] = ()
    collectors: Mapping[str, type[Collector]] = field(default_factory=dict)
    ops: tuple[OpRule, ...] = ()
    targets: tuple[Target, ...] = ()
    pipelines: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Registry:
    """Everything that plug-ins gave, by name.

    `source`: (kind, name) -> the plug-in that a thing came from. `packages`: plug-in -> the package or file that holds it.
    """

    passes: dict[str, type[Pass]] = field(default_factory=dict)
    collectors: dict[str, type[Collector]] = field(default_factory=dict)
    ops: dict[str, OpRule] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)
    pipelines: dict[str, str] = field(default_factory=dict)
    source: dict[tuple[str, str], str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)

    def home(self, kind: str, name: str) -> str:
        """The package and its version, or the file, that a thing came from."""
        plugin = self.source[kind, name]
        return self.packages.get(plugin) or plugin

    def add(self, plugin: Plugin, package: str = "") -> None:
        """Add all that a plug-in offers. Raises UserError where a name is taken, naming both packages."""
        self.packages[plugin.name] = package
        offers: tuple[tuple[str, dict[str, Any], Iterable[tuple[str, Any]]], ...] = (
            ("pass", self.passes, ((p.name, p) for p in plugin.passes)),
            ("collector", self.collectors, plugin.collectors.items()),
            ("op", self.ops, ((op_key(r.op, r.domain), r) for r in plugin.ops)),
            ("target", self.targets, ((t.name, t) for t in plugin.targets)),
            ("pipeline", self.pipelines, plugin.pipelines.items()),
        )
        for kind, table, items in offers:
            for name, thing in items:
                if name in table:
                    owner = self.source[kind, name]
                    raise UserError(f"two plug-ins define the {kind} {name!r}: {owner} and {plugin.name}", "plug-ins")
                table[name] = thing
                self.source[kind, name] = plugin.name


def load_registry(files: Iterable[Path] = ()) -> Registry:
    """The core's rows, every installed plug-in in the order of names, then the given files.

    Raises UserError, naming the plug-in, for one that cannot be imported or clashes.
    """
    registry = Registry()
    registry.add(Plugin("qcompiler", collectors=COLLECTORS, ops=tuple(OPS.values())), f"qcompiler {__version__}")
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        try:
            plugin = entry.load()
        except Exception as error:
            what = f"plug-in {entry.name!r} of {_package(entry)} does not load: {type(error).__name__}: {error}"
            raise UserError(what, entry.value) from error
        registry.add(_checked(plugin, entry.value), _package(entry))
    for path in files:
        registry.add(_load_file(path), path.name)
    return registry


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.module


def _checked(plugin: object, where: str) -> Plugin:
    if not isinstance(plugin, Plugin):
        raise UserError(f"expected a qcompiler.plugin.Plugin, found {type(plugin).__name__}", where)
    return plugin


def _load_file(path: Path) -> Plugin:
    if not path.is_file():
        raise UserError("no such file", f"--load {path}")
    spec = importlib.util.spec_from_file_location(f"qcompiler_loaded_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError("not a Python file", f"--load {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"does not load: {type(error).__name__}: {error}", f"--load {path}") from error
    if not hasattr(module, "PLUGIN"):
        raise UserError("the file defines no PLUGIN", f"--load {path}")
    return _checked(module.PLUGIN, f"--load {path}")
