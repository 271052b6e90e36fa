"""Integer-only transformers, after the tables of FQ-ViT (Lin et al. 2021, arXiv 2111.13824).

python benchmarks/transformers.py                                           models/tiny_vit.onnx
python benchmarks/transformers.py MODEL --calib DATA --eval DATA [--preset NAME]

Compiles for the target `integer` with one way after the other to find ranges; then with factors of powers of two for the inputs
of LayerNormalization (PTF), and with attention on a logarithmic scale (LIS), each with 8 and 4 bits for attention.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qcompiler import compile_model, runtime
from qcompiler.errors import UserError
from qcompiler.evaluate import judge
from qcompiler.images import PRESETS
from qcompiler.load import input_specs, load_model
from qcompiler.measure import compare
from qcompiler.pipeline import Pass, Pipeline, parse_pipeline
from qcompiler.plugin import load_registry

MODELS = Path(__file__).resolve().parent.parent / "models"
MAX_SAMPLES = 50
COLLECTORS = {"MinMax": "minmax", "EMA": "ema", "Percentile": "percentile", "OMSE": "omse"}


@dataclass(frozen=True)
class Method:
    """A row of the table. `level`: the pipeline that it changes; `ptf`, `lis`: whether it has them."""

    name: str
    level: str = "O0"
    collector: str = "minmax"
    ptf: bool = False
    lis: bool = False


METHODS = (
    *(Method(name, collector=collector) for name, collector in COLLECTORS.items()),
    Method("MinMax + PTF", ptf=True),
    Method("MinMax + PTF + LIS", ptf=True, lis=True),
    Method("-O2 without PTF and LIS", level="O2", collector="omse"),
    Method("-O2, the default", level="O2", collector="omse", ptf=True, lis=True),
)


@dataclass(frozen=True)
class Row:
    """One method on one model: `bits` of weights/activations/attention, the judge's score, SQNR of the worst output in dB."""

    model: str
    method: str
    bits: str
    score: float
    sqnr: float | None


def pipeline(text: str, method: Method, attention_bits: int) -> Pipeline:
    """The pipeline of a level with what the method changes."""

    def changed(stage: Pass) -> Pass:
        options: dict[str, Any] = {}
        if stage.name == "calibrate":
            options = {"collector": method.collector}
        elif stage.name == "annotate":
            options = {"attention": "log2" if method.lis else "linear", "attention_bits": attention_bits}
        return replace(stage, **options) if options else stage  # type: ignore[type-var]

    stages = parse_pipeline(text, load_registry().passes).passes
    return Pipeline(tuple(changed(s) for s in stages if method.ptf or s.name != "power-of-two-factors"))


def measure(model: Path, given: argparse.Namespace) -> Iterator[Row]:
    """The float model, then each method with 8 and 4 bits for attention."""
    preprocess = PRESETS[given.preset] if given.preset else None
    before = load_model(model)
    judged = judge(given.eval, input_specs(before), preprocess)
    if judged.source is None:
        raise UserError("labelled data is wanted, not a function", given.eval)
    step = max(1, len(judged.source) // MAX_SAMPLES)
    samples = [feeds for i, feeds in enumerate(judged.source) if i % step == 0][:MAX_SAMPLES]
    runner = runtime.session(before)
    yield Row(model.stem, "float", "32/32/32", judged.score(runner), None)
    levels = load_registry().pipelines
    for bits in given.bits:
        for method in METHODS:
            text = str(pipeline(levels[method.level], method, bits))
            options: dict[str, Any] = {"preprocess": preprocess, "samples": given.samples, "compare": False}
            after = compile_model(model, given.calib, target="integer", emit="integer", passes=text, **options).model
            session = runtime.session(after)
            found = [match.sqnr for match in compare(runner, session, samples) if match.sqnr is not None]
            row = Row(model.stem, method.name, f"8/8/{bits}", judged.score(session), min(found, default=None))
            print(f"{row.model} {row.method} {row.bits}: {row.score:.2f}, {row.sqnr} dB", file=sys.stderr, flush=True)
            yield row


def show(rows: Sequence[Row]) -> None:
    """Print a table for each model, 8/8/8 beside 8/8/4."""
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        bits = list(dict.fromkeys(row.bits for row in mine if row.sqnr is not None))
        print(f"\n| {model}, float {mine[0].score:.2f} |" + "".join(f" {b}: score | SQNR, dB |" for b in bits))
        print("| --- |" + " --- | --- |" * len(bits))
        for name in dict.fromkeys(row.method for row in mine if row.sqnr is not None):
            cells = [row for row in mine if row.method == name]
            print(f"| {name} |" + "".join(f" {row.score:.2f} | {row.sqnr:.1f} |" for row in cells))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--calib", type=Path, help="calibration data, as for qcompile")
    parser.add_argument("--eval", help="labelled data, as for qcompile")
    parser.add_argument("--samples", type=int, help="calibrate with at most so many samples")
    parser.add_argument("--preset", choices=list(PRESETS), help="preprocessing of images")
    parser.add_argument(
        "--bits", type=int, nargs="*", choices=[8, 4], default=[8, 4], help="of attention  [default: 8 4]"
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects in place of the tables")
    given = parser.parse_args()
    if not given.models:
        given.models = [MODELS / "tiny_vit.onnx"]
        given.calib, given.eval = given.calib or MODELS / "mnist_calib", given.eval or MODELS / "mnist_test.npz"
    elif given.calib is None or given.eval is None:
        parser.error("--calib and --eval are missing")
    return given


def main() -> None:
    given = arguments()
    try:
        rows = [row for model in given.models for row in measure(model, given)]
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    if given.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        show(rows)


if __name__ == "__main__":
    main()
