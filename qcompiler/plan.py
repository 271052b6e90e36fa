"""What a compilation is asked for, and the passes that follow from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qcompiler.data import Preprocess
from qcompiler.errors import UserError
from qcompiler.modes import STATIC, mode_pipeline
from qcompiler.pipeline import Pipeline, closest, parse_pipeline
from qcompiler.plugin import Registry
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


def target_of(registry: Registry, target: str | Target, per_tensor: bool) -> Target:
    """The target of that name. Raises UserError if there is none."""
    if isinstance(target, str):
        if target not in registry.targets:
            raise UserError(f"no target is called {target!r}{closest(target, registry.targets)}", "--target")
        target = registry.targets[target]
    return replace(target, per_channel=False) if per_tensor else target


def pipeline_of(registry: Registry, options: CompileOptions) -> Pipeline:
    """The passes of the level, or those that were asked for, as far as `emit` goes, with the collector put in.

    Raises UserError for options that do not go together.
    """
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
