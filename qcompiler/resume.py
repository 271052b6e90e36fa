"""Compile on from a snapshot: the rest of the pipeline, to the bytes that a straight run gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from qcompiler import emit, ir, snapshot
from qcompiler.data import Preprocess, as_source
from qcompiler.errors import UserError
from qcompiler.instrument import Dump, Runnable, Verify
from qcompiler.load import input_specs
from qcompiler.pipeline import Instrument, Pipeline, parse_pipeline
from qcompiler.plan import Progress
from qcompiler.plugin import Registry, load_registry
from qcompiler.snapshot import Data, Recipe, Snapshot
from qcompiler.split import Split
from qcompiler.state import CompileState, Feeds


@dataclass(frozen=True)
class Resumed:
    """What came of it: the model, its state, and the passes that ran."""

    model: onnx.ModelProto
    state: CompileState
    passes: Pipeline


def resume(
    path: str | Path,
    calib: Any = None,
    *,
    output: str | Path | None = None,
    until: str | None = None,
    samples: int | None = None,
    preprocess: Preprocess | None = None,
    load: Iterable[str | Path] = (),
    verify: bool = True,
    dump: str | Path | None = None,
    progress: Progress | None = None,
    instruments: Sequence[Instrument] = (),
) -> Resumed:
    """Run the passes that a snapshot has before it; write the model if `output` is given.

    calib, samples, preprocess: as for `compile_model`; without calib, the data that the snapshot names is read, if a pass needs
    it. until: a pass or phase to stop after. load: plug-in files; those that the snapshot names are not loaded unasked.

    Raises UserError for whatever the caller can mend.
    """
    path = Path(path)
    if output is not None:
        emit.check_path(Path(output), path)
    registry = load_registry(Path(p) for p in load)
    found = snapshot.read(path, registry)
    planned = _pipeline(found, registry, path)
    rest = Pipeline(planned.passes[found.done :])
    rest = rest if until is None else rest.until(until)
    state, source = found.state, ir.to_proto(found.state.graph)
    data = _data(found.recipe.data, calib, samples, preprocess, source)
    if data is not None and (found.digest is None or calib is not None):
        data.open()
    state.calibration, state.progress = data, progress
    guards: list[Instrument] = [] if data is None else [Runnable(source, data)]
    watchers = [*guards, *instruments]
    if dump is not None:
        watchers.append(Dump(Path(dump), _recipe(found, data), number=found.done))
    rest.run(state, [*watchers, *([Verify()] if verify else [])])
    made_by = {"pipeline": str(Pipeline((*planned.passes[: found.done], *rest.passes)))}
    if data is not None:
        made_by["calibration"] = found.digest or data.digest()
    model = emit.to_model(state, made_by)
    emit.check(model, source)
    if output is not None:
        emit.write(model, Path(output))
    return Resumed(model, state, rest)


@dataclass(frozen=True)
class _Samples:
    """Calibration samples that are opened when a pass reads them: few passes behind calibration do."""

    origin: Any
    limit: int | None
    preprocess: Preprocess | None
    model: onnx.ModelProto

    @cached_property
    def split(self) -> Split:
        """The samples. Raises UserError if nobody said where they are, or they are no longer there."""
        if self.origin is None:
            raise UserError("the snapshot does not say where its calibration data is; give it", "--calib")
        if isinstance(self.origin, str) and not Path(self.origin).exists():
            raise UserError("the calibration data is no longer there; give it with --calib", self.origin)
        return Split(as_source(self.origin, input_specs(self.model), self.preprocess, self.limit))

    def open(self) -> Split:
        """Open them now. Raises UserError as `split` does."""
        return self.split

    def __iter__(self) -> Iterator[Feeds]:
        return iter(self.split)

    def __len__(self) -> int:
        return len(self.split)

    def digest(self) -> str:
        """The digest of all that is fed."""
        return self.split.source.digest()


def _data(
    recorded: Data | None, calib: Any, limit: int | None, preprocess: Preprocess | None, model: onnx.ModelProto
) -> _Samples | None:
    if recorded is None:
        return None if calib is None else _Samples(calib, limit, preprocess, model)
    origin = recorded.path if calib is None else calib
    return _Samples(origin, limit or recorded.samples, preprocess or recorded.preprocess, model)


def _recipe(found: Snapshot, data: _Samples | None) -> Recipe:
    if data is None:
        return found.recipe
    path = str(Path(data.origin).absolute()) if isinstance(data.origin, str | Path) else None
    return replace(found.recipe, data=Data(path, data.limit, data.preprocess, lambda: found.digest or data.digest()))


def _pipeline(found: Snapshot, registry: Registry, path: Path) -> Pipeline:
    try:
        return parse_pipeline(found.recipe.pipeline, registry.passes)
    except UserError as error:
        if not found.recipe.load:
            raise
        files = ", ".join(found.recipe.load)
        raise UserError(
            f"{error.what}; it was made with --load {files}: give it again if you trust it", str(path)
        ) from error
