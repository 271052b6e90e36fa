"""What each mode costs, and each choice within the static one: accuracy, size and latency.

python benchmarks/modes.py                                          the models in models/
python benchmarks/modes.py MODEL... --calib DATA [--eval DATA] [--preset NAME]

Everything that can be int8 is (--optimize size), so that the static rows have the same layers in int8. Times are medians of CPU
time on one thread, with the float model and the compiled one in turns; of some such races the fastest counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from qcompiler import compile_model, runtime
from qcompiler.data import open_source
from qcompiler.errors import UserError
from qcompiler.evaluate import judge
from qcompiler.images import PRESETS
from qcompiler.load import input_specs, load_model
from qcompiler.measure import compare
from qcompiler.pipeline import Pipeline, parse_pipeline
from qcompiler.plugin import Registry, load_registry
from qcompiler.runtime import Feeds
from qcompiler.split import Split
from qcompiler.target import Target

MODELS = Path(__file__).resolve().parent.parent / "models"
MAX_SAMPLES = 200
ROUNDS = 5

FUSION = ("fold-bias", "fold-batchnorm", "fold-pad", "equalize", "migrate-scales")
"""The passes that the pipeline without fusion lacks; its blocks are single nodes."""

Compile = Callable[[Path, dict[str, Any]], onnx.ModelProto]


@dataclass(frozen=True)
class Row:
    """One compiled model. `sqnr`: of the worst output in dB; `score`: what the judge says; `size`: share of the float model."""

    model: str
    what: str
    score: float | None
    sqnr: float | None
    size: float
    speed: float


def unfused(registry: Registry) -> Pipeline:
    """The default pipeline without the folding of layers into each other, and with a block for every node."""
    default = parse_pipeline(registry.pipelines["default"], registry.passes)
    kept = [stage for stage in default.passes if stage.name not in FUSION]
    [blocks] = parse_pipeline("form-blocks{fuse=false}", registry.passes).passes
    return Pipeline(tuple(blocks if stage.name == blocks.name else stage for stage in kept))


def symmetric(target: Target) -> Target:
    """The target with the zero point of activations in the middle."""
    return replace(target, activation=replace(target.activation, symmetric=True))


def variants(registry: Registry, calib: Path) -> dict[str, Compile]:
    """How to compile, by what it shows; each takes a model and common options."""

    def with_data(**options: Any) -> Compile:
        return lambda model, common: compile_model(model, calib, **common, **options).model

    def without_data(**options: Any) -> Compile:
        return lambda model, common: compile_model(model, compare=False, **options).model

    def again(model: Path, common: dict[str, Any]) -> onnx.ModelProto:
        return compile_model(compile_model(model, calib, emit="qdq", **common).model, compare=False).model

    size: dict[str, Any] = {"optimize": "size"}
    with_conv = registry.pipelines["dynamic"].replace("quantize-dynamic", "quantize-dynamic{least=1 conv=true}")
    return {
        "static": with_data(**size),
        "static, not fused": with_data(passes=str(unfused(registry)), **size),
        "static, symmetric activations": with_data(target=symmetric(registry.targets["ort-cpu"]), **size),
        "static, weights per tensor": with_data(per_tensor=True, **size),
        "static, `--optimize latency`": with_data(),
        "its Q/DQ form, compiled again without data": again,
        "dynamic": without_data(mode="dynamic"),
        "dynamic, with Conv": without_data(passes=with_conv),
        "weight-only, 8 bits": without_data(mode="weight-only", bits=8),
        "weight-only, 4 bits": without_data(mode="weight-only"),
        "weight-only, 4 bits, with data": with_data(mode="weight-only"),
        "float16": without_data(mode="float16"),
    }


def measure(model: Path, given: argparse.Namespace, compilers: dict[str, Compile]) -> Iterator[Row]:
    """Compile in each way and compare with the float model."""
    preprocess = PRESETS[given.preset] if given.preset else None
    before = load_model(model)
    specs = input_specs(before)
    judged = judge(given.eval, specs, preprocess) if given.eval else None
    samples = list(Split(open_source(given.calib, specs, preprocess)).held_back)
    if judged is not None and judged.source is not None:
        samples = spread(list(judged.source))
    runner = runtime.session(before)
    yield Row(model.stem, "float", None if judged is None else judged.score(runner), None, 1.0, 1.0)
    for what, compiler in compilers.items():
        after = compiler(model, {"preprocess": preprocess, "compare": False})
        session = runtime.session(after)
        found = [match.sqnr for match in compare(runner, session, samples) if match.sqnr is not None]
        races = [runtime.race(runner, session, samples[0], given.seconds / ROUNDS) for _ in range(ROUNDS)]
        slow, fast = min(races, key=sum)
        score = None if judged is None else judged.score(session)
        size = after.ByteSize() / before.ByteSize()
        yield Row(model.stem, what, score, min(found, default=None), round(size, 3), round(slow / fast, 2))


def spread(samples: Sequence[Feeds]) -> list[Feeds]:
    """At most `MAX_SAMPLES` of the samples, at even distances."""
    return list(samples[:: max(1, len(samples) // MAX_SAMPLES)])[:MAX_SAMPLES]


def show(rows: Sequence[Row]) -> None:
    """Print a table for each model."""
    for model in dict.fromkeys(row.model for row in rows):
        print(f"\n**{model}**\n\n| | score | SQNR, dB | size | speed |\n| --- | --- | --- | --- | --- |")
        for row in rows:
            if row.model == model:
                score = "" if row.score is None else f"{row.score:.2f}"
                sqnr = "" if row.sqnr is None else f"{row.sqnr:.1f}"
                print(f"| {row.what} | {score} | {sqnr} | {row.size:.2f} | {row.speed:.2f}x |")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--calib", type=Path, help="calibration data, as for qcompile")
    parser.add_argument("--eval", help="labelled data or FILE.py:FUNCTION, as for qcompile")
    parser.add_argument("--preset", choices=list(PRESETS), help="preprocessing of images")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each comparison of speed")
    parser.add_argument("--json", action="store_true", help="print a list of objects in place of the tables")
    given = parser.parse_args()
    if not given.models:
        given.models = [MODELS / "digits_resnet.onnx", MODELS / "condenser.onnx"]
        given.calib, given.eval = given.calib or MODELS / "mnist_calib", given.eval or MODELS / "mnist_test.npz"
    elif given.calib is None:
        parser.error("--calib is missing")
    return given


def main() -> None:
    given = arguments()
    try:
        compilers = variants(load_registry(), given.calib)
        rows = [row for model in given.models for row in measure(model, given, compilers)]
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    if given.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        show(rows)


if __name__ == "__main__":
    main()
