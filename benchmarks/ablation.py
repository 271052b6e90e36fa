"""What each technique for accuracy brings: alone, by its absence from all of them, and without a part of it.

python benchmarks/ablation.py                                               the models in models/
python benchmarks/ablation.py MODEL... --calib DATA [--eval DATA] [--test DATA] [--preset NAME]

The techniques are read from the registry: what -O3, or another level (--level O2), does beyond -O0, pass by pass. A pass that no
level runs can be put in with --insert PASS:BEFORE, where BEFORE is the pass that it stands before.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import onnx

from qcompiler import compile_model, runtime
from qcompiler.data import Preprocess, open_source
from qcompiler.errors import UserError
from qcompiler.evaluate import Judge, judge
from qcompiler.images import PRESETS
from qcompiler.load import input_specs, load_model
from qcompiler.measure import compare
from qcompiler.pipeline import Pass, Pipeline, format_value, parse_pipeline
from qcompiler.plugin import Registry, load_registry
from qcompiler.runtime import Feeds
from qcompiler.split import Split

MODELS = Path(__file__).resolve().parent.parent / "models"
MAX_SAMPLES = 200
BASE, FULL = "O0", "O3"
LEVELS = ("O1", "O2", "O3")


@dataclass(frozen=True)
class Stage:
    """A place in the pipelines: the pass of the base there, and that of the full one; None where one has none."""

    base: Pass | None
    full: Pass | None

    @property
    def technique(self) -> str:
        """What the full pipeline does here that the base does not, or nothing."""
        if self.full is None or self.base == self.full:
            return ""
        if self.base is None:
            return str(Pipeline((self.full,)))
        pairs = [(f.name, getattr(self.full, f.name), getattr(self.base, f.name)) for f in fields(self.full)]  # type: ignore[arg-type]
        return self.full.name + "{" + " ".join(f"{k}={format_value(a)}" for k, a, b in pairs if a != b) + "}"


@dataclass(frozen=True)
class Row:
    """One pipeline on one model. `sqnr`: of the worst output in dB; `score`: what the judge says; `seconds`: CPU time."""

    model: str
    what: str
    pipeline: str
    sqnr: float | None
    score: float | None
    seconds: float


def stages(base: Pipeline, full: Pipeline) -> list[Stage]:
    """The places of the full pipeline; the n-th pass of a name stands for the n-th of that name in the base."""
    places = {}
    for seen, stage in numbered(base):
        places[seen] = stage
    return [Stage(places.get(key), stage) for key, stage in numbered(full)]


def numbered(pipeline: Pipeline) -> Iterator[tuple[tuple[str, int], Pass]]:
    counts: Counter[str] = Counter()
    for stage in pipeline.passes:
        counts[stage.name] += 1
        yield (stage.name, counts[stage.name]), stage


def with_techniques(places: Sequence[Stage], chosen: Collection[str]) -> Pipeline:
    """The base with some techniques."""
    found = [place.full if not place.technique or place.technique in chosen else place.base for place in places]
    return Pipeline(tuple(stage for stage in found if stage is not None))


def variants(registry: Registry, insert: Sequence[str], level: str = FULL) -> dict[str, Pipeline]:
    """The pipelines to compare, by what they show."""
    base, full = (parse_pipeline(registry.pipelines[name], registry.passes) for name in (BASE, level))
    for item in insert:
        text, _, before = item.rpartition(":")
        [extra] = parse_pipeline(text, registry.passes).passes
        at = [stage.name for stage in full.passes].index(before)
        full = Pipeline((*full.passes[:at], extra, *full.passes[at:]))
    places = stages(base, full)
    techniques = [place.technique for place in places if place.technique]
    found = {BASE: base}
    found |= {f"{BASE} + {t}": with_techniques(places, [t]) for t in techniques}
    found |= {name: parse_pipeline(registry.pipelines[name], registry.passes) for name in LEVELS[: LEVELS.index(level)]}
    found |= {f"all but {t}": with_techniques(places, [x for x in techniques if x != t]) for t in techniques}
    found |= {f"all, {p.name}{{{option}=false}}": full_with(places, p, option) for p, option in switches(places)}
    return {**found, f"all ({level})" if not insert else "all": with_techniques(places, techniques)}


def switches(places: Sequence[Stage]) -> Iterator[tuple[Pass, str]]:
    """The passes that only the full pipeline has, with each of their options that can be switched off."""
    for place in places:
        if place.full is not None and place.base is None:
            for field in fields(place.full):  # type: ignore[arg-type]
                if getattr(place.full, field.name) is True:
                    yield place.full, field.name


def full_with(places: Sequence[Stage], changed: Pass, option: str) -> Pipeline:
    """The full pipeline with one option of a pass switched off."""
    stages = [place.full for place in places if place.full is not None]
    return Pipeline(tuple(replace(s, **{option: False}) if s is changed else s for s in stages))  # type: ignore[type-var]


def measure(model: Path, given: argparse.Namespace, pipelines: dict[str, Pipeline]) -> Iterator[Row]:
    """Compile with each pipeline and compare with the float model."""
    preprocess = PRESETS[given.preset] if given.preset else None
    before = load_model(model)
    judged = judge(given.eval, input_specs(before), preprocess) if given.eval else None
    samples = test_samples(before, given, judged, preprocess)
    runner = runtime.session(before)
    if judged is not None:
        yield Row(model.stem, "float", "", None, judged.score(runner), 0.0)
    options: dict[str, Any] = {"preprocess": preprocess, "compare": False, "optimize": given.optimize}
    compile_model(model, given.calib, until="calibrate", **options)  # so that the first row is not that of a cold start
    for what, pipeline in pipelines.items():
        start = time.process_time()
        after = compile_model(model, given.calib, passes=str(pipeline), **options).model
        seconds = time.process_time() - start
        session = runtime.session(after)
        found = [match.sqnr for match in compare(runner, session, samples) if match.sqnr is not None]
        score = None if judged is None else judged.score(session)
        yield Row(model.stem, what, str(pipeline), min(found, default=None), score, round(seconds, 2))


def test_samples(
    model: onnx.ModelProto, given: argparse.Namespace, judged: Judge | None, preprocess: Preprocess | None
) -> Sequence[Feeds]:
    """What SQNR is measured on: the test data, else that of the judge, else what the compiler holds back."""
    specs = input_specs(model)
    if given.test is not None:
        source = open_source(given.test, specs, preprocess)
    elif judged is not None and judged.source is not None:
        source = judged.source
    else:
        return Split(open_source(given.calib, specs, preprocess)).held_back
    step = max(1, len(source) // MAX_SAMPLES)
    return [feeds for i, feeds in enumerate(source) if i % step == 0][:MAX_SAMPLES]


def show(rows: Sequence[Row]) -> None:
    """Print a table for each model."""
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        has_score = any(row.score is not None for row in mine)
        print(f"\n**{model}**\n\n| pipeline | SQNR, dB |{' score |' if has_score else ''} compile, CPU s |")
        print(f"| --- | --- |{' --- |' if has_score else ''} --- |")
        for row in mine:
            sqnr = "" if row.sqnr is None else f"{row.sqnr:.1f}"
            score = f" {row.score:.2f} |" if row.score is not None else ""
            print(f"| {row.what} | {sqnr} |{score} {f'{row.seconds:.1f}' if row.seconds else ''} |")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--calib", type=Path, help="calibration data, as for qcompile")
    parser.add_argument("--eval", help="labelled data or FILE.py:FUNCTION, as for qcompile")
    parser.add_argument("--test", type=Path, help="data as for --calib, for SQNR  [default: that of --eval]")
    parser.add_argument("--preset", choices=list(PRESETS), help="preprocessing of images")
    parser.add_argument(
        "--insert", action="append", default=[], metavar="PASS:BEFORE", help="a pass that no level runs"
    )
    parser.add_argument(
        "--optimize", default="size", choices=["latency", "size"], help="what is quantized  [default: size]"
    )
    parser.add_argument("--level", default=FULL, choices=LEVELS, help="what all techniques are  [default: O3]")
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
        pipelines = variants(load_registry(), given.insert, given.level)
        rows = [row for model in given.models for row in measure(model, given, pipelines)]
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    if given.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        show(rows)


if __name__ == "__main__":
    main()
