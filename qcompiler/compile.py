"""compile_model: the library face of the command."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from qcompiler import emit as emitter
from qcompiler import ir
from qcompiler.data import Preprocess, Source, as_source
from qcompiler.errors import UserError
from qcompiler.instrument import Dump, Operators, Timing, Verify, silence_graphsurgeon
from qcompiler.load import input_specs, load_model
from qcompiler.measure import measure
from qcompiler.pipeline import Instrument, Pipeline, closest, parse_pipeline
from qcompiler.plugin import Registry, load_registry
from qcompiler.report import Report, layers_of
from qcompiler.state import CompileState, Feeds
from qcompiler.target import Target

DEFAULT_TARGET = "ort-cpu"

LAST_PASS = {"qdq": "insert-qdq", "integer": "fold-scales", "kernels": None}
"""Where the default pipeline is cut for each form of output."""

MAX_HELD_BACK = 16

Progress = Callable[[int, int | None], None]
"""Called with the number of samples done, and of all samples if it is known."""


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
    emit: str = "kernels",
    collector: str | None = None,
    samples: int | None = None,
    target: str | Target = DEFAULT_TARGET,
    per_tensor: bool = False,
    passes: str | None = None,
    until: str | None = None,
    keep_float: Iterable[str] = (),
    preprocess: Preprocess | None = None,
    load: Iterable[str | Path] = (),
    verify: bool = True,
    compare: bool = True,
    dump: str | Path | None = None,
    progress: Progress | None = None,
) -> CompileResult:
    """Compile a float ONNX model to int8; write it if `output` is given.

    calib: a path (images, .npy, .npz, test data), or samples: arrays or mappings from input names to arrays; see `data`.
    emit: `kernels` (fast), `integer` or `qdq`; all three compute the same. collector: how ranges are measured. samples: use at
    most so many. keep_float: patterns of node or output names. passes: a pipeline in text form instead of the default one,
    until: a pass or phase to stop after. load: plug-in files. compare: measure accuracy and speed against the float model on
    samples that are held back from calibration.

    Raises UserError for whatever the caller can mend.
    """
    silence_graphsurgeon()
    source = None if isinstance(model, onnx.ModelProto) else Path(model)
    target_path = None if output is None else Path(output)
    registry = load_registry(Path(p) for p in load)
    chosen = _target(registry, target, per_tensor)
    pipeline = _pipeline(registry, emit, passes, until, collector)
    if target_path is not None:
        emitter.check_path(target_path, source)
    float_model = load_model(model)
    split = None if calib is None else Split(as_source(calib, input_specs(float_model), preprocess, samples))
    if split is None and any(p.name == "calibrate" for p in pipeline.passes):
        raise UserError("calibration data is missing; give some samples of what the model is fed", "--calib")

    state = CompileState(
        ir.from_proto(float_model),
        chosen,
        registry.ops,
        keep_float=tuple(keep_float),
        collectors=registry.collectors,
        calibration=split,
        progress=progress,
        metadata={p.key: p.value for p in float_model.metadata_props},
    )
    timing, operators = Timing(), Operators()
    instruments: list[Instrument] = [timing, operators]
    instruments += [Dump(Path(dump))] if dump is not None else []
    instruments += [Verify()] if verify else []
    pipeline.run(state, instruments)

    made_by = {"pipeline": str(pipeline)} | ({} if split is None else {"calibration": split.source.digest()})
    compiled = emitter.to_model(state, made_by)
    emitter.check(compiled, float_model)
    report = Report(
        source=str(source or float_model.graph.name),
        path=None if target_path is None else str(target_path),
        target=chosen.name,
        emit=state.phase.name.lower(),
        pipeline=str(pipeline),
        layers=layers_of(state, operators.of),
        bytes=(float_model.ByteSize(), compiled.ByteSize()),
        notes=list(state.notes),
        passes=timing.passes,
    )
    if split is not None:
        _describe_samples(report, split)
        if compare:
            measure(report, float_model, compiled, split.held_back)
    if target_path is not None:
        emitter.write(compiled, target_path)
    return CompileResult(compiled, report, target_path)


def _describe_samples(report: Report, split: Split) -> None:
    report.samples, report.held_back = len(split), len(split.held_back)
    if split.shared:
        report.notes.append("the only sample serves both calibration and comparison: give more")


@dataclass
class Split:
    """The samples that calibrate: all but a tenth (1 to 16, evenly spread), which is held back for the comparison.

    A single sample serves both. Held-back samples are kept when they come by, so that no file is read twice.
    """

    source: Source
    _held: dict[int, Feeds] = field(default_factory=dict)

    @property
    def shared(self) -> bool:
        """Whether one sample serves both ends."""
        return len(self.source) == 1

    @property
    def held_back(self) -> list[Feeds]:
        """The samples for the comparison."""
        if not self._held:
            for _ in self:
                pass
        return list(self._held.values())

    def __len__(self) -> int:
        return 1 if self.shared else len(self.source) - self._count()

    def __iter__(self) -> Iterator[Feeds]:
        total, held = len(self.source), self._count()
        for i, feeds in enumerate(self.source):
            if i * held // total != (i + 1) * held // total:
                self._held[i] = feeds
                if not self.shared:
                    continue
            yield feeds

    def _count(self) -> int:
        return min(MAX_HELD_BACK, max(1, len(self.source) // 10))


def _target(registry: Registry, target: str | Target, per_tensor: bool) -> Target:
    if isinstance(target, str):
        if target not in registry.targets:
            raise UserError(f"no target is called {target!r}{closest(target, registry.targets)}", "--target")
        target = registry.targets[target]
    return replace(target, per_channel=False) if per_tensor else target


def _pipeline(registry: Registry, emit: str, passes: str | None, until: str | None, collector: str | None) -> Pipeline:
    if emit not in LAST_PASS:
        raise UserError(f"no form is called {emit!r}; choose {', '.join(LAST_PASS)}", "--emit")
    if passes is not None:
        pipeline = parse_pipeline(registry.pipelines.get(passes, passes), registry.passes)
    else:
        pipeline = parse_pipeline(registry.pipelines["default"], registry.passes)
        last = LAST_PASS[emit]
        if last is not None:
            pipeline = Pipeline((*pipeline.until(last).passes, registry.passes["cleanup"]()))
    if collector is not None:
        pipeline = _with_collector(registry, pipeline, collector)
    return pipeline if until is None else pipeline.until(until)


def _with_collector(registry: Registry, pipeline: Pipeline, collector: str) -> Pipeline:
    if collector not in registry.collectors:
        raise UserError(f"no collector is called {collector!r}{closest(collector, registry.collectors)}", "--collector")
    stages: list[Any] = [
        replace(stage, collector=collector) if stage.name == "calibrate" else stage  # type: ignore[type-var]
        for stage in pipeline.passes
    ]
    return Pipeline(tuple(stages))
