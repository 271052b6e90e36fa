"""The pipelines that the ablation compares."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qcompiler.plugin import Registry, load_registry

SCRIPT = Path(__file__).parent.parent / "benchmarks/ablation.py"


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablation"] = module
    spec.loader.exec_module(module)
    return module


def registry(base: str, full: str) -> Registry:
    known = load_registry()
    known.pipelines |= {"O0": base, "O1": base, "O2": base, "O3": full}
    return known


def test_each_technique_alone_and_left_out(ablation: ModuleType) -> None:
    base = "normalize,fold-bias,fold-batchnorm,fold-bias,calibrate{collector=minmax},scale-weights{search=false}"
    full = "normalize,fold-bias,fold-batchnorm,fold-bias,calibrate,scale-weights,correct-bias{samples=8}"
    found = {what: str(p) for what, p in ablation.variants(registry(base, full), []).items()}
    front = "normalize,fold-bias,fold-batchnorm,fold-bias,"
    assert found == {
        "O0": base,
        "O0 + calibrate{collector=omse}": f"{front}calibrate,scale-weights{{search=false}}",
        "O0 + scale-weights{search=true}": f"{front}calibrate{{collector=minmax}},scale-weights",
        "O0 + correct-bias{samples=8}": f"{base},correct-bias{{samples=8}}",
        "O1": base,
        "O2": base,
        "all but calibrate{collector=omse}": full.replace("calibrate", "calibrate{collector=minmax}"),
        "all but scale-weights{search=true}": full.replace("scale-weights", "scale-weights{search=false}"),
        "all but correct-bias{samples=8}": full.replace(",correct-bias{samples=8}", ""),
        "all (O3)": full,
    }


def test_a_pass_that_no_level_runs(ablation: ModuleType) -> None:
    found = ablation.variants(registry("normalize,cleanup", "normalize,cleanup"), ["fold-bias:cleanup"])
    assert str(found["O0 + fold-bias"]) == str(found["all"]) == "normalize,fold-bias,cleanup"


def test_a_pass_without_a_part_of_it(ablation: ModuleType) -> None:
    base, full = "normalize,scale-weights", "normalize,scale-weights,round-weights{samples=4}"
    found = ablation.variants(registry(base, full), [])
    parts = {what: str(p) for what, p in found.items() if what.startswith("all, ")}
    assert parts == {"all, round-weights{compensate=false}": f"{base},round-weights{{samples=4 compensate=false}}"}


def test_the_levels_differ_in_techniques(ablation: ModuleType) -> None:
    found = ablation.variants(load_registry(), [])
    assert len([what for what in found if what.startswith("O0 + ")]) >= 3
    assert str(found["all (O3)"]) == load_registry().pipelines["O3"]
