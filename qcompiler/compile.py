"""compile_model: the library face of the command."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from qcompiler import emit as emitter
from qcompiler import ir
from qcompiler.data import Preprocess, as_source
from qcompiler.detached import total_bytes
from qcompiler.errors import UserError
from qcompiler.evaluate import Judge, judge
from qcompiler.instrument import Dump, Operators, PassTime, Reproducer, Runnable, Timing, Verify
from qcompiler.load import input_specs, is_quantized, load_model
from qcompiler.measure import evaluate, measure, random_samples
from qcompiler.mixed import PROBES, Goal, Trials, figures_of, reach
from qcompiler.modes import STATIC, mode_pipeline
from qcompiler.pipeline import Instrument, Pipeline, closest, parse_pipeline
from qcompiler.plugin import Registry, load_registry
from qcompiler.report import Layer, Reached, Report, layers_of
from qcompiler.snapshot import Data, Recipe
from qcompiler.split import Split
from qcompiler.state import CompileState, Feeds
from qcompiler.target import Target

DEFAULT_TARGET = "ort-cpu"

LAST_PASS = {"qdq": "insert-qdq", "integer": "fold-scales", "kernels": None}
"""Where the default pipeline is cut for each form of output."""

LAST = ("guard-float", "cleanup")
"""The passes that end the pipeline of every form."""

Progress = Callable[[int, int | None], None]
"""Called with the number of samples done, and of all samples if it is known."""


@dataclass(frozen=True)
class CompileOptions:
    """What decides how a model is compiled; see `compile_model`."""

    emit: str = "kernels"
    level: int | None = None
    mode: str | None = None
    bits: int | None = None
    collector: str | None = None
    samples: int | None = None
    target: str | Target = DEFAULT_TARGET
    per_tensor: bool = False
    optimize: str | None = None
    profile: str | Path | None = None
    passes: str | None = None
    until: str | None = None
    keep_float: Iterable[str] | Mapping[str, str] = ()
    preprocess: Preprocess | None = None
    load: Iterable[str | Path] = ()
    progress: Progress | None = None


@dataclass(frozen=True)
class Job:
    """A compilation that is ready to run: the state at its start, the pipeline, and what it was made from.

    `recipe`: what snapshots record of it; its pipeline goes on behind `until`.
    """

    state: CompileState
    pipeline: Pipeline
    float_model: onnx.ModelProto
    split: Split | None
    registry: Registry
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def guards(self) -> list[Instrument]:
        """What tells the user's mistakes from those of passes, before other instruments see an error."""
        return [] if self.split is None else [Runnable(self.float_model, self.split)]


@dataclass(frozen=True)
class CompileResult:
    """A compiled model, the facts about it, and where it was written (None if nowhere)."""

    model: onnx.ModelProto
    report: Report
    path: Path | None = None


def prepare(model: str | Path | onnx.ModelProto, calib: Any, options: CompileOptions) -> Job:
    """Load the model, the plug-ins and the calibration data. Raises UserError for whatever the caller can mend."""
    registry = load_registry(Path(p) for p in options.load)
    target = _target(registry, options.target, options.per_tensor)
    planned = _pipeline(registry, options)
    pipeline = planned if options.until is None else planned.until(options.until)
    float_model = load_model(model)
    if options.mode not in (None, STATIC) and is_quantized(float_model):
        raise UserError("the model is quantized already", f"--mode {options.mode}")
    specs = input_specs(float_model)
    split = None if calib is None else Split(as_source(calib, specs, options.preprocess, options.samples))
    if split is None and not is_quantized(float_model) and any(p.name == "calibrate" for p in pipeline.passes):
        raise UserError("calibration data is missing; give some samples of what the model is fed", "--calib")
    state = CompileState(
        ir.from_proto(float_model),
        target,
        registry.ops,
        keep_float=_reasons(options.keep_float),
        collectors=registry.collectors,
        calibration=split,
        progress=options.progress,
        metadata={p.key: p.value for p in float_model.metadata_props},
    )
    name = float_model.graph.name if isinstance(model, onnx.ModelProto) else str(model)
    recipe = Recipe(
        name, str(planned), tuple(str(Path(p).absolute()) for p in options.load), _data(calib, split, options)
    )
    return Job(state, pipeline, float_model, split, registry, recipe)


def _reasons(patterns: Iterable[str] | Mapping[str, str]) -> dict[str, str]:
    if isinstance(patterns, Mapping):
        return dict(patterns)
    return {pattern: f"kept in float as {pattern!r} asks" for pattern in patterns}


def _data(calib: Any, split: Split | None, options: CompileOptions) -> Data | None:
    path = str(Path(calib).absolute()) if isinstance(calib, str | os.PathLike) else None
    return None if split is None else Data(path, options.samples, options.preprocess, split.source.digest)


def compile_model(
    model: str | Path | onnx.ModelProto,
    calib: Any = None,
    *,
    output: str | Path | None = None,
    verify: bool = True,
    compare: bool = True,
    timed: bool = True,
    dump: str | Path | None = None,
    dump_changed: bool = False,
    reproduce: str | Path | None = None,
    instruments: Sequence[Instrument] = (),
    eval: Any = None,
    min_sqnr: float | None = None,
    max_drop: float | None = None,
    **options: Any,
) -> CompileResult:
    """Compile a float ONNX model to int8; write it if `output` is given.

    calib: a path (images, .npy, .npz, test data), or samples: arrays or mappings from input names to arrays; see `data`.
    verify: check the invariants after every pass. compare: measure accuracy and speed against the float model on samples
    that are held back from calibration, and warn of outputs below 10 dB; without `timed` measure no speed. dump: a folder
    for a snapshot after every pass, or with dump_changed after those that changed something. reproduce: a new folder for
    what reproduces the crash of a pass. instruments: what else watches the passes. eval: labelled data or a function that
    judges both models; see `evaluate`. min_sqnr, max_drop: keep the fewest and cheapest layers in float that it takes for
    so many dB at every output, or to lose no more of the metric.

    options: the fields of `CompileOptions`: emit: `kernels` (fast), `integer` or `qdq`; all three compute the same. level: 0
    (fast to compile) to 3 (most accurate). mode: another pipeline than those, such as `dynamic`; see docs/modes.md. bits: of
    weights in mode `weight-only`. collector: how ranges are measured. samples: use at most so many. target, per_tensor:
    the hardware, one weight scale per tensor. optimize: `latency`, `size` or `integer`. profile: a file of `qcompile profile`.
    keep_float: patterns of node or output names, or a mapping from such to reasons. passes: a pipeline in text form instead of
    a level, until: a pass or phase to stop after. preprocess: of images. load: plug-in files. progress: called with samples
    done and in all.

    Raises UserError for whatever the caller can mend.
    """
    target_path = None if output is None else Path(output)
    if target_path is not None:
        emitter.check_path(target_path, None if isinstance(model, onnx.ModelProto) else Path(model))
    choices, goal = CompileOptions(**options), Goal(min_sqnr, max_drop)
    if goal and choices.mode not in (None, STATIC):
        raise UserError(f"mode {choices.mode} cannot be tuned to a goal", "--min-sqnr, --max-drop")
    job = prepare(model, calib, choices)
    judged = None if eval is None else judge(eval, input_specs(job.float_model), choices.preprocess)
    reached = _keep_for(goal, job, judged) if goal else None
    if reached is not None:
        choices = replace(choices, keep_float={**job.state.keep_float, **reached.reasons})
        job = prepare(model, calib, choices)
    timing, operators = Timing(), Operators()
    watchers: list[Instrument] = [*job.guards, timing, *instruments, operators]
    watchers += [Dump(Path(dump), job.recipe, dump_changed)] if dump is not None else []
    watchers += [Verify()] if verify else []
    reproducer = None
    if reproduce is not None:
        passes = job.pipeline.passes
        reproducer = Reproducer(Path(reproduce), job.recipe, passes, lambda: prepare(model, calib, choices).state)
        watchers.append(reproducer)
    job.pipeline.run(job.state, watchers)
    compiled = finish(job, reproducer)
    report = _report(job, compiled, layers_of(job.state, operators.of), timing.passes)
    report.path = None if target_path is None else str(target_path)
    if compare:
        _compare(report, job, compiled, timed)
    if judged is not None:
        report.score = evaluate(judged, job.float_model, compiled)
    report.reached = reached
    if target_path is not None:
        emitter.write(compiled, target_path)
    return CompileResult(compiled, report, target_path)


def _report(job: Job, compiled: onnx.ModelProto, layers: list[Layer], passes: list[PassTime]) -> Report:
    report = Report(
        source=job.recipe.model,
        path=None,
        target=job.state.target.name,
        emit=job.state.phase.name.lower(),
        pipeline=str(job.pipeline),
        layers=layers,
        bytes=(total_bytes(job.float_model), total_bytes(compiled)),
        notes=list(job.state.notes),
        predicted=job.state.predicted,
        passes=passes,
    )
    if is_quantized(job.float_model):
        report.original = "the quantized original"
    if job.split is not None:
        _describe_samples(report, job.split)
    return report


def _compare(report: Report, job: Job, compiled: onnx.ModelProto, timed: bool) -> None:
    """Measure on the samples that are held back, or on random ones if a quantized model came without data."""
    samples: Sequence[Feeds] = []
    if job.split is not None:
        samples = job.split.held_back
    elif job.state.imported:
        samples = random_samples(input_specs(job.float_model), job.state.imported)
    if samples:
        measure(report, job.float_model, compiled, samples, timed)


def _keep_for(goal: Goal, job: Job, judged: Judge | None) -> Reached:
    """The layers that have to stay float for a goal, found on copies of the job's state."""
    if goal.max_drop is not None and judged is None:
        raise UserError("it needs --eval, to tell what a model loses", "--max-drop")
    if job.split is None:
        raise UserError("calibration data is missing; give some samples of what the model is fed", "--calib")
    probes = job.split.spread(PROBES)
    figures = figures_of(job.float_model, job.split.held_back, judged if goal.max_drop is not None else None)
    return reach(Trials(job.state, job.pipeline, probes, figures, job.guards), goal)


def finish(job: Job, reproducer: Reproducer | None = None) -> onnx.ModelProto:
    """The model of a job whose pipeline has run, with what made it in its metadata, checked and loaded once.

    Raises EmitError if it is not valid; the reproducer then looks for the pass that made it so.
    """
    made_by = {"pipeline": str(job.pipeline)}
    if job.split is not None:
        made_by["calibration"] = job.split.source.digest()

    def emitted(state: CompileState) -> onnx.ModelProto:
        compiled = emitter.to_model(state, made_by)
        emitter.check(compiled, job.float_model)
        return compiled

    try:
        return emitted(job.state)
    except emitter.EmitError as error:
        if reproducer is not None:
            reproducer.rejected(error, emitted)
        raise


def _describe_samples(report: Report, split: Split) -> None:
    report.samples, report.held_back = len(split), len(split.held_back)
    if split.shared:
        report.notes.append("the only sample serves both calibration and comparison: give more")


def _target(registry: Registry, target: str | Target, per_tensor: bool) -> Target:
    if isinstance(target, str):
        if target not in registry.targets:
            raise UserError(f"no target is called {target!r}{closest(target, registry.targets)}", "--target")
        target = registry.targets[target]
    return replace(target, per_channel=False) if per_tensor else target


def _pipeline(registry: Registry, options: CompileOptions) -> Pipeline:
    """The passes of the level, or those that were asked for, as far as `emit` goes, with the collector put in."""
    if options.emit not in LAST_PASS:
        raise UserError(f"no form is called {options.emit!r}; choose {', '.join(LAST_PASS)}", "--emit")
    pipeline = _named(registry, options)
    last = LAST_PASS["integer" if options.optimize == "integer" else options.emit]
    if last is not None and any(stage.name == last for stage in pipeline.passes):
        pipeline = Pipeline((*pipeline.until(last).passes, *(registry.passes[name]() for name in LAST)))
    if options.optimize is not None:
        pipeline = _with(pipeline, ("account", "place"), objective=options.optimize)
    if options.profile is not None:
        pipeline = _with(pipeline, ("account", "place"), profile=str(Path(options.profile).absolute()))
    return pipeline if options.collector is None else _with_collector(registry, pipeline, options.collector)


def _named(registry: Registry, options: CompileOptions) -> Pipeline:
    given = {
        "-O": options.level,
        "--passes": options.passes,
        "--emit": options.emit,
        "--collector": options.collector,
        "--optimize": options.optimize,
        "--profile": options.profile,
        "--bits": options.bits,
    }
    if options.mode not in (None, STATIC):
        pipeline = mode_pipeline(registry, options.mode, given)
        return pipeline if options.bits is None else _with(pipeline, ("quantize-blocks",), bits=options.bits)
    if options.bits is not None:
        raise UserError("it is for mode weight-only", "--bits")
    if options.passes is None:
        return parse_pipeline(registry.pipelines[_level(registry, options.level)], registry.passes)
    if options.level is not None:
        raise UserError("a level is a pipeline: give one of the two", "-O and --passes")
    return parse_pipeline(registry.pipelines.get(options.passes, options.passes), registry.passes)


def _level(registry: Registry, level: int | None) -> str:
    if level is None:
        return "default"
    levels = [name for name in registry.pipelines if re.fullmatch(r"O\d", name)]
    if f"O{level}" not in levels:
        raise UserError(f"there is no level {level}; choose {', '.join(name[1:] for name in levels)}", "-O")
    return f"O{level}"


def _with_collector(registry: Registry, pipeline: Pipeline, collector: str) -> Pipeline:
    if collector not in registry.collectors:
        raise UserError(f"no collector is called {collector!r}{closest(collector, registry.collectors)}", "--collector")
    return _with(pipeline, ("calibrate",), collector=collector)


def _with(pipeline: Pipeline, names: Sequence[str], **options: Any) -> Pipeline:
    """The pipeline with options of some passes changed."""
    stages: list[Any] = [
        replace(stage, **options) if stage.name in names else stage  # type: ignore[type-var]
        for stage in pipeline.passes
    ]
    return Pipeline(tuple(stages))
