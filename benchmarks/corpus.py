"""Compile the ONNX backend tests, which come with the onnx package: what ONNX Runtime runs right has to stay right.

    python benchmarks/corpus.py [PATTERN] [--list]

A case that ONNX Runtime runs right may fail in two ways. Our float passes change its results, or refuse it; or its compilation
crashes. `corpus_failures.txt` lists the cases that may fail; a case of the list that passes is an error too.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

from qcompiler import ir, runtime
from qcompiler.compile import compile_model
from qcompiler.errors import UserError
from qcompiler.instrument import Watcher
from qcompiler.job import prepare
from qcompiler.pipeline import Pass, Pipeline, parse_pipeline
from qcompiler.plan import CompileOptions
from qcompiler.plugin import load_registry
from qcompiler.state import CompileState

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator", "real")
LAST_FLOAT_PASS = "form-blocks"
CALIBRATED = ("equalize", "migrate-scales")
"""The float passes that read calibration data."""

ALLOWED = Path(__file__).parent / "corpus_failures.txt"


@dataclass(frozen=True)
class Case:
    """A model with feeds and the outputs that its authors expect. `key`: kind/name."""

    key: str
    model: onnx.ModelProto
    feeds: dict[str, Any]
    expected: list[Any]
    rtol: float
    atol: float


@dataclass(frozen=True)
class Verdict:
    """What became of a case. `runs`: ONNX Runtime gives what is expected. `fault`: of the float passes, or a crash; "" if none.

    `outcome`: of the compilation: `int8`, `float` (nothing quantized), `warned` or `refused`.
    """

    runs: bool
    fault: str
    outcome: str


def cases(start: int = 0, step: int = 1) -> Iterator[Case]:
    """Every `step`-th case from the one at `start` on."""
    for test in _tests()[start::step]:
        if test.model is not None:
            model, (inputs, expected) = test.model, test.data_sets[0]
        elif test.model_dir is not None:
            model = onnx.load(Path(test.model_dir, "model.onnx"))
            inputs, expected = (_stored(test.model_dir, role, model) for role in ("input", "output"))
        else:
            model, inputs, expected = _light(test.url)
        names = _fed(model, len(inputs))
        feeds = {name: _value(x) for name, x in zip(names, inputs, strict=False)}
        yield Case(f"{test.kind}/{test.name}", model, feeds, [_value(x) for x in expected], test.rtol, test.atol)


@cache
def _tests() -> list[Any]:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return [test for kind in KINDS for test in load_model_tests(kind=kind)]


def _fed(model: onnx.ModelProto, count: int) -> list[str]:
    """The names of the inputs that a case feeds; some list initializers among them."""
    names = [value.name for value in model.graph.input]
    constants = {tensor.name for tensor in model.graph.initializer}
    return names if count == len(names) else [name for name in names if name not in constants]


def _stored(folder: str, role: str, model: onnx.ModelProto) -> list[Any]:
    values = model.graph.input if role == "input" else model.graph.output
    data_set, found = Path(folder, "test_data_set_0"), []
    for i in range(len(list(data_set.glob(f"{role}_*.pb")))):
        data = (data_set / f"{role}_{i}.pb").read_bytes()
        if values[i].type.HasField("sequence_type"):
            found.append(numpy_helper.to_list(onnx.SequenceProto.FromString(data)))
        else:
            found.append(numpy_helper.to_array(onnx.TensorProto.FromString(data)))
    return found


def _light(url: str) -> tuple[onnx.ModelProto, list[Any], list[Any]]:
    """A well-known network whose weights are made up."""
    path = Path(onnx.__file__).parent.joinpath(*url.split("/")[1:])
    model = onnx.load(path)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = []
    for value in model.graph.input:
        if value.name not in constants:
            shape = [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
            inputs.append((np.arange(np.prod(shape)).reshape(shape) / np.prod(shape)).astype(np.float32))
    outputs = [path.with_name(f"{path.stem}_output_{i}.pb") for i in range(len(model.graph.output))]
    return model, inputs, [numpy_helper.to_array(onnx.TensorProto.FromString(p.read_bytes())) for p in outputs]


def _value(x: Any) -> Any:
    return numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else x


class Snapshot(Watcher):
    """Keeps the model after the float passes."""

    model: onnx.ModelProto | None = None

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        if stage.name == LAST_FLOAT_PASS:
            self.model = ir.to_proto(state.graph)


def judge(case: Case) -> Verdict:
    """Compile a case, calibrated on its own feeds, and run what the float passes made of it."""
    original = outputs_of(case.model, case.feeds)
    runs = original is not None and alike(original, case.expected, case.rtol, case.atol)
    snapshot, outcome, refusal = Snapshot(), "", ""
    try:
        made = compile_model(case.model, [case.feeds], timed=False, instruments=[snapshot])
        quantized = any(layer.quantized for layer in made.report.layers)
        outcome = "warned" if made.report.warnings else "int8" if quantized else "float"
    except UserError as error:
        outcome, refusal = "refused", str(error)
        if "\n" in refusal:
            return Verdict(runs, f"an error of several lines: {refusal!r}", outcome)
    except Exception as error:
        return Verdict(runs, f"crash: {type(error).__name__}: {error}", "crash")
    if not runs:
        return Verdict(runs, "", outcome)
    try:
        changed = snapshot.model or _without_data(case.model)
    except UserError as error:
        return Verdict(runs, f"refused: {error}", outcome)
    except Exception as error:
        return Verdict(runs, f"crash: {type(error).__name__}: {error}", outcome)
    found = outputs_of(changed, case.feeds)
    if found is None:
        return Verdict(runs, "the float passes made a model that does not run", outcome)
    assert original is not None
    kept = alike(found, original, max(case.rtol, 1e-3), max(case.atol, 1e-5))
    return Verdict(runs, "" if kept else "the float passes changed its results", outcome)


@cache
def float_passes() -> str:
    """The default pipeline up to the last float pass, without those that read data."""
    registry = load_registry()
    pipeline = parse_pipeline(registry.pipelines["default"], registry.passes).until(LAST_FLOAT_PASS)
    return str(Pipeline(tuple(stage for stage in pipeline.passes if stage.name not in CALIBRATED)))


def _without_data(model: onnx.ModelProto) -> onnx.ModelProto:
    job = prepare(model, None, CompileOptions(passes=float_passes()))
    job.pipeline.run(job.state)
    return ir.to_proto(job.state.graph)


def outputs_of(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any] | None:
    """All outputs of a model in ONNX Runtime; None if it does not run it."""
    try:
        runner = runtime.session(model, optimize=False)
        fed = {value.name: feeds[value.name] for value in runner.get_inputs() if value.name in feeds}
        return runtime.run(runner, fed)
    except (UserError, RuntimeError):
        return None


def alike(found: Any, wanted: Any, rtol: float, atol: float) -> bool:
    """Whether outputs agree: arrays, or lists of such, of the same types and shapes."""
    if isinstance(wanted, list) or isinstance(found, list):
        both = isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted)
        return both and all(alike(a, b, rtol, atol) for a, b in zip(found, wanted, strict=True))
    if wanted is None or found is None or isinstance(wanted, dict):
        return bool(found == wanted)
    a, b = np.asarray(found), np.asarray(wanted)
    if a.shape != b.shape or (a.dtype.kind != b.dtype.kind and "O" not in a.dtype.kind + b.dtype.kind):
        return False
    if b.dtype.kind in "fc":
        return a.dtype == b.dtype and bool(np.allclose(a, b, rtol, atol, equal_nan=True))
    return bool(np.array_equal(a.astype(object), b.astype(object)))


def allowed() -> dict[str, str]:
    """The cases that may fail -> why."""
    lines = ALLOWED.read_text().splitlines()
    return dict(line.split("  ", 1) for line in lines if line and not line.startswith("#"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="*")
    parser.add_argument("--list", action="store_true", help="print the lines of corpus_failures.txt")
    parser.add_argument(
        "--warned", action="store_true", help="print the cases whose int8 model is far from the float model"
    )
    given = parser.parse_args()
    start, known, counts, bad = time.process_time(), allowed(), Counter[str](), 0
    for case in cases():
        if not fnmatch(case.key, given.pattern):
            continue
        verdict = judge(case)
        counts["cases"] += 1
        counts[f"{'of these' if verdict.runs else 'of others'}, compiled: {verdict.outcome}"] += 1
        counts["run right by ONNX Runtime"] += verdict.runs
        counts["of these, kept by the float passes"] += verdict.runs and not verdict.fault
        if given.list and verdict.fault:
            print(f"{case.key}  {verdict.fault}")
        elif bool(verdict.fault) != (case.key in known):
            bad += 1
            print(f"{case.key}: {verdict.fault or 'passes; take it from corpus_failures.txt'}")
        if given.warned and verdict.outcome == "warned":
            print(f"{case.key}: warned")
    for what, count in sorted(counts.items()):
        print(f"{count:6} {what}", file=sys.stderr)
    print(f"{time.process_time() - start:6.0f} s of CPU time", file=sys.stderr)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
