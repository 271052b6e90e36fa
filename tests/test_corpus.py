"""A slice of the ONNX backend tests: the float passes keep what ONNX Runtime runs right, and nothing crashes.

`benchmarks/corpus.py` goes through all of them.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks/corpus.py"
STEP, PARTS = 24, (0, 6, 12, 18)
"""Every sixth case, in four tests that can run side by side."""


@cache
def corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("corpus", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["corpus"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def allowed() -> dict[str, str]:
    known: dict[str, str] = corpus().allowed()
    return known


@pytest.mark.parametrize("start", PARTS)
def test_cases(start: int, allowed: dict[str, str]) -> None:
    faults, ran = {}, 0
    for case in corpus().cases(start, STEP):
        verdict = corpus().judge(case)
        ran += verdict.runs
        if bool(verdict.fault) != (case.key in allowed):
            faults[case.key] = verdict.fault or "passes; take it from corpus_failures.txt"
    assert not faults
    assert ran > 40, "most cases run in ONNX Runtime"


def test_no_case_has_to_be_allowed(allowed: dict[str, str]) -> None:
    assert not allowed
