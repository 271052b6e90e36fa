"""Imports point inward, and each outside library has one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcompiler

CORE = Path(qcompiler.__file__).parent
CHAIN = ["quant", "ir", "state", "rewrite", "pipeline", "plugin", "compile", "cli"]
MODULES = sorted(p.stem for p in CORE.glob("*.py") if p.stem != "__init__")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any level; `from qcompiler import ir` counts as `qcompiler.ir`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            yield from (f"{module}.{a.name}" for a in node.names) if module == "qcompiler" else [module]


def core_imports(module: str) -> set[str]:
    return {name.split(".")[1] for name in imports(CORE / f"{module}.py") if name.startswith("qcompiler.")}


def reachable(module: str) -> set[str]:
    found, pending = set(), [module]
    while pending:
        for inner in core_imports(pending.pop()) & set(MODULES):
            if inner not in found:
                found.add(inner)
                pending.append(inner)
    return found


@pytest.mark.parametrize("inner", range(len(CHAIN)), ids=CHAIN)
def test_no_module_reaches_outward(inner: int) -> None:
    assert not reachable(CHAIN[inner]) & set(CHAIN[inner + 1 :])


@pytest.mark.parametrize("module", MODULES)
def test_no_cycles(module: str) -> None:
    assert module not in reachable(module)


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_the_core_does_not_know_the_passes(module: str) -> None:
    assert not any(name.split(".")[0] == "qcompiler_passes" for name in imports(CORE / f"{module}.py"))


def test_outside_libraries_have_one_door() -> None:
    doors = {
        "onnx_graphsurgeon": {"ir", "value_types"},
        "onnxruntime": {"runtime"},
        "click": {"cli", "options"},
        "rich": {"options"},
        "jinja2": {"html_report"},
        "matplotlib": {"figures"},
    }
    files = [*CORE.glob("*.py"), *(CORE.parent / "passes" / "qcompiler_passes").glob("*.py")]
    for library, allowed in doors.items():
        users = {p.stem for p in files if any(name.split(".")[0] == library for name in imports(p))}
        assert users <= allowed, library


def test_importing_the_package_is_light() -> None:
    heavy = ("numpy", "onnx", "onnxruntime", "onnx_graphsurgeon", "rich", "jinja2", "matplotlib")
    code = f"import sys, qcompiler, qcompiler.cli; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
