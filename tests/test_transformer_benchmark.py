"""The pipelines that the benchmark of integer transformers compares."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from qcompiler_passes import LEVELS

SCRIPT = Path(__file__).parent.parent / "benchmarks/transformers.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("transformers_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_each_method_changes_what_it_is_called_for(benchmark: ModuleType) -> None:
    plain = str(benchmark.pipeline(LEVELS["O0"], benchmark.Method("EMA", collector="ema"), 8))
    assert "calibrate{collector=ema " in plain
    assert "attention=linear" in plain
    assert "power-of-two-factors" not in plain
    both = str(benchmark.pipeline(LEVELS["O2"], benchmark.Method("both", "O2", "omse", ptf=True, lis=True), 4))
    assert "power-of-two-factors" in both
    assert "attention_bits=4" in both
    assert "linear" not in both


def test_the_default_method_is_the_default_pipeline(benchmark: ModuleType) -> None:
    assert str(benchmark.pipeline(LEVELS["O2"], benchmark.METHODS[-1], 8)) == LEVELS["O2"]
