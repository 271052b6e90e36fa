"""A compilation that is ready to run, and the model that it ends in."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from qcompiler import emit as emitter
from qcompiler import ir
from qcompiler.data import as_source
from qcompiler.errors import UserError
from qcompiler.instrument import Reproducer, Runnable
from qcompiler.load import input_specs, is_quantized, load_model
from qcompiler.modes import STATIC
from qcompiler.pipeline import Instrument, Pipeline
from qcompiler.plan import CompileOptions, pipeline_of, target_of
from qcompiler.plugin import Registry, load_registry
from qcompiler.snapshot import Data, Recipe
from qcompiler.split import Split
from qcompiler.state import CompileState


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


def prepare(model: str | Path | onnx.ModelProto, calib: Any, options: CompileOptions) -> Job:
    """Load the model, the plug-ins and the calibration data. Raises UserError for whatever the caller can mend."""
    registry = load_registry(Path(p) for p in options.load)
    target = target_of(registry, options.target, options.per_tensor)
    planned = pipeline_of(registry, options)
    pipeline = planned if options.until is None else planned.until(options.until)
    float_model = load_model(model)
    if options.mode not in (None, STATIC) and is_quantized(float_model):
        raise UserError("the model is quantized already", f"--mode {options.mode}")
    split = None
    if calib is not None:
        split = Split(as_source(calib, input_specs(float_model), options.preprocess, options.samples))
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
