"""compile_model: the library face of the command."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from qcompiler import emit as emitter
from qcompiler.detached import total_bytes
from qcompiler.errors import UserError
from qcompiler.evaluate import Judge, judge
from qcompiler.instrument import Dump, Operators, PassTime, Reproducer, Timing, Verify
from qcompiler.job import Job, finish, prepare
from qcompiler.load import input_specs, is_quantized
from qcompiler.measure import SQNR_FLOOR, evaluate, measure, random_samples
from qcompiler.mixed import PROBES, Goal, Trials, figures_of, reach
from qcompiler.modes import STATIC
from qcompiler.pipeline import Instrument
from qcompiler.plan import CompileOptions
from qcompiler.report import Layer, Reached, Report, layers_of
from qcompiler.split import Split
from qcompiler.state import Feeds


@dataclass(frozen=True)
class CompileResult:
    """A compiled model, the facts about it, and where it was written (None if nowhere)."""

    model: onnx.ModelProto
    report: Report
    path: Path | None = None


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
    that are held back from calibration; where outputs are below 10 dB leave layers in float, with a warning if that takes all;
    without `timed` measure no speed. dump: a folder for a snapshot after every pass, or with dump_changed after those that
    changed something. reproduce: a new folder for what reproduces the crash of a pass. instruments: what else watches the
    passes. eval: labelled data or a function that judges both models; see `evaluate`. min_sqnr, max_drop: keep the fewest and
    cheapest layers in float that it takes for so many dB at every output, or to lose no more of the metric.

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
        emitter.check_path(target_path, _path(model), _path(calib))
    choices, goal = CompileOptions(**options), Goal(min_sqnr, max_drop)
    if goal and choices.mode not in (None, STATIC):
        raise UserError(f"mode {choices.mode} cannot be tuned to a goal", "--min-sqnr, --max-drop")
    job = prepare(model, calib, choices)
    judged = None if eval is None else judge(eval, input_specs(job.float_model), choices.preprocess)
    watch = Watch(instruments, verify, dump, dump_changed, reproduce)
    reached = _keep_for(goal, job, judged) if goal else None
    if reached is not None:
        choices = replace(choices, keep_float={**job.state.keep_float, **reached.reasons})
        job = prepare(model, calib, choices)
    compiled, report = _run(job, watch, lambda: prepare(model, calib, choices))
    if compare:
        _compare(report, job, compiled, timed)
    if compare and report.warnings and not goal and job.split is not None and choices.mode in (None, STATIC):
        reached, kept = _rescue(prepare(model, calib, choices))
        if kept:
            fault, choices = report.warnings[0], replace(choices, keep_float={**job.state.keep_float, **kept})
            job = prepare(model, calib, choices)
            compiled, report = _run(job, watch, lambda: prepare(model, calib, choices))
            _compare(report, job, compiled, timed)
            report.warnings += [] if reached else [f"nothing is quantized, because in int8 {fault}"]
    if judged is not None:
        report.score = evaluate(judged, job.float_model, compiled)
    report.reached = reached
    report.path = None if target_path is None else str(target_path)
    if target_path is not None:
        emitter.write(compiled, target_path)
    return CompileResult(compiled, report, target_path)


def _path(given: Any) -> Path | None:
    return Path(given) if isinstance(given, str | os.PathLike) else None


@dataclass(frozen=True)
class Watch:
    """What watches the passes of a compilation; see `compile_model`."""

    instruments: Sequence[Instrument]
    verify: bool
    dump: str | Path | None
    dump_changed: bool
    reproduce: str | Path | None


def _run(job: Job, watch: Watch, restart: Callable[[], Job]) -> tuple[onnx.ModelProto, Report]:
    """Run the passes of a job. `restart`: makes the same job again."""
    timing, operators = Timing(), Operators()
    watchers: list[Instrument] = [*job.guards, timing, *watch.instruments, operators]
    watchers += [Dump(Path(watch.dump), job.recipe, watch.dump_changed)] if watch.dump is not None else []
    watchers += [Verify()] if watch.verify else []
    reproducer = None
    if watch.reproduce is not None:
        reproducer = Reproducer(Path(watch.reproduce), job.recipe, job.pipeline.passes, lambda: restart().state)
        watchers.append(reproducer)
    job.pipeline.run(job.state, watchers)
    compiled = finish(job, reproducer)
    return compiled, _report(job, compiled, layers_of(job.state, operators.of), timing.passes)


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


def _keep_for(goal: Goal, job: Job, judged: Judge | None, seen: int = 0) -> Reached:
    """The layers that have to stay float for a goal, found on copies of the job's state.

    seen: of the held-back samples that tell whether a choice will do, how many also tell how sensitive the layers are.
    """
    if goal.max_drop is not None and judged is None:
        raise UserError("it needs --eval, to tell what a model loses", "--max-drop")
    if job.split is None:
        raise UserError("calibration data is missing; give some samples of what the model is fed", "--calib")
    probes = [*job.split.spread(PROBES), *job.split.held_back[:seen]]
    figures = figures_of(job.float_model, job.split.held_back, judged if goal.max_drop is not None else None)
    return reach(Trials(job.state, job.pipeline, probes, figures, job.guards), goal)


def _rescue(job: Job) -> tuple[Reached | None, dict[str, str]]:
    """The layers that have to stay float for outputs near the float model's, with the reasons: all if no other choice does it.

    Outputs may be far off because held-back samples go beyond what calibrated, which those that calibrated do not show.
    """
    try:
        reached = _keep_for(Goal(min_sqnr=SQNR_FLOOR), job, None, seen=PROBES)
    except UserError:
        return None, {} if is_quantized(job.float_model) else {"*": "no choice of layers in int8 keeps the outputs"}
    return (reached, reached.reasons) if reached.reasons else (None, {})


def _describe_samples(report: Report, split: Split) -> None:
    report.samples, report.held_back = len(split), len(split.held_back)
    if split.shared:
        report.notes.append("the only sample serves both calibration and comparison: give more")
