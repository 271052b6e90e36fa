"""How good a model is at its task, judged on labelled data or by a function of the user's.

| `--eval`                    | what it is                                                                                 |
| --------------------------- | ------------------------------------------------------------------------------------------ |
| a folder of folders         | images by class; folders called by numbers are these classes, others count in sorted order |
| a folder with `labels.csv`  | lines `FILE,CLASS` beside or above the images                                              |
| a `.npz`                    | labels `labels` or `y`, and arrays by the inputs' names, or `x` for a model with one input |
| `FILE.py:FUNCTION`          | called with a `Predictor`; returns a number, the higher the better                         |

The metric of labelled data is top-1 in percent: how often the greatest of the first output's columns is the label. An `x` of
uint8 for a float model holds images, [N, H, W] or [N, H, W, C], which are preprocessed as calibration images are.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler import runtime
from qcompiler.data import Source, as_source
from qcompiler.errors import UserError
from qcompiler.images import SUFFIXES, ImageReader, ImageRecord, PixelRecord, Preprocess
from qcompiler.runtime import Session
from qcompiler.samples import InputSpec, reading

Array = NDArray[Any]
TABLES = ("labels.csv", "labels.txt")


class Predictor:
    """A model to call: `predict(x)`, or `predict({"input": x, …})`, returns the list of all outputs. `session`: what runs it."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, feeds: Any) -> list[Any]:
        """Run the model on a mapping from input names to arrays; one array feeds the first input."""
        if not isinstance(feeds, Mapping):
            feeds = {self.session.get_inputs()[0].name: np.asarray(feeds)}
        return runtime.run(self.session, feeds)


@dataclass(frozen=True)
class Judge:
    """A metric, the higher the better. `unit`: `%` or nothing; `samples`: how many it takes, 0 if it does not say; `source`: the
    samples, if they are known.
    """

    name: str
    unit: str
    samples: int
    score: Callable[[Session], float]
    source: Source | None = None

    def drop(self, before: float, after: float) -> float:
        """What was lost, in percentage points where the metric is a percentage, else in percent of the value before."""
        if self.unit == "%":
            return before - after
        return 100 * (before - after) / abs(before) if before else 0.0 if after >= 0 else math.inf


def judge(given: Any, inputs: Sequence[InputSpec], preprocess: Preprocess | None = None) -> Judge:
    """Make a judge of what a caller gives: a path, `FILE.py:FUNCTION`, or a function; see above.

    Raises UserError if it is none of these, or the data does not fit the model.
    """
    if callable(given):
        return _of_function(given, getattr(given, "__name__", type(given).__name__))
    if not isinstance(given, str | os.PathLike):
        raise UserError(f"a {type(given).__name__} judges no model; give a path or a function", "--eval")
    file, _, name = str(given).rpartition(":")
    if file.endswith(".py"):
        return _of_function(_load(Path(file), name), name)
    path = Path(given)
    if not path.exists():
        raise UserError("there is no such file or folder", f"--eval {path}")
    if path.is_dir():
        return _of_labels(*_labelled_folder(path, inputs, preprocess), f"--eval {path}")
    if path.suffix.lower() != ".npz":
        raise UserError(
            "labelled data is a folder or a .npz; a function is given as FILE.py:FUNCTION", f"--eval {path}"
        )
    return _of_labels(*_labelled_arrays(path, inputs, preprocess), f"--eval {path}")


def _of_function(function: Callable[[Predictor], Any], name: str) -> Judge:
    def score(session: Session) -> float:
        try:
            value = float(function(Predictor(session)))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"the function raised {type(error).__name__}: {error}", f"--eval {name}") from error
        if not math.isfinite(value):
            raise UserError(f"the function returned {value}", f"--eval {name}")
        return value

    return Judge(name, "", 0, score)


def _load(path: Path, name: str) -> Callable[[Predictor], Any]:
    where = f"--eval {path}:{name}"
    if not path.is_file():
        raise UserError("no such file", where)
    spec = importlib.util.spec_from_file_location(f"qcompiler_eval_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"does not load: {type(error).__name__}: {error}", where) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"the file has no function {name!r}", where)
    return function  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Labels:
    """The labels of all items, shape (N,). `classes`: how many there must be; None if the labels do not say."""

    values: Array
    classes: int | None = None


def _of_labels(source: Source, labels: _Labels, where: str) -> Judge:
    """Top-1 on a source whose items have these labels, in order."""
    size = source.batch.size
    if len(labels.values) // size != len(source):
        raise UserError(f"{len(source) * size} samples, but {len(labels.values)} labels", where)

    def score(session: Session) -> float:
        right = 0
        for i, feeds in enumerate(source):
            wanted = labels.values[i * size : (i + 1) * size]
            scores = _scores(runtime.run(session, feeds)[0], size, where)
            _check_classes(scores, labels, where)
            right += int(np.count_nonzero((scores if scores.ndim == 1 else scores.argmax(axis=1)) == wanted))
        return round(100 * right / (len(source) * size), 4)

    return Judge("top-1", "%", len(source) * size, score, source)


def _scores(output: Any, size: int, where: str) -> Array:
    """The first output as [N, C], from [N, C, 1, 1] or [C] of a batch of one, too; or as [N] if it holds classes as integers."""
    scores = np.asarray(output)
    if scores.dtype.kind in "iu" and scores.size == size:
        return scores.reshape(size)
    columns = scores.shape[1] if scores.ndim > 1 else scores.size
    if columns < 2 or scores.size != size * columns:
        shape = list(scores.shape)
        raise UserError(f"top-1 takes [samples, classes], but the first output is {shape}: give a function", where)
    return scores.reshape(size, columns)


def _check_classes(scores: Array, labels: _Labels, where: str) -> None:
    if scores.ndim == 1:
        return
    columns = scores.shape[1]
    if labels.classes is not None and labels.classes != columns:
        what = (
            f"{labels.classes} folders, but the model has {columns} classes: call folders by number, or add labels.csv"
        )
        raise UserError(what, where)
    if labels.values.max(initial=0) >= columns:
        raise UserError(f"a label is {labels.values.max()}, but the model has {columns} classes", where)


def _labelled_arrays(path: Path, inputs: Sequence[InputSpec], preprocess: Preprocess | None) -> tuple[Source, _Labels]:
    with reading(path, "not a readable .npz"), np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    names = [spec.name for spec in inputs]
    key = next((k for k in ("labels", "y") if k in arrays and k not in names), None)
    if key is None or arrays[key].ndim != 1 or arrays[key].dtype.kind not in "iu":
        raise UserError("there are no labels: integers [N] called `labels` or `y`", f"--eval {path}")
    labels = _Labels(arrays[key])
    feeds = {name: arrays[name] for name in names if name in arrays}
    if len(names) == 1 and not feeds and "x" in arrays:
        feeds = {names[0]: arrays["x"]}
    if len(names) == len(feeds) == 1 and feeds[names[0]].dtype == np.uint8 and inputs[0].dtype != np.uint8:
        reader = ImageReader(inputs[0], preprocess)
        images = PixelRecord(_channels_last(feeds[names[0]], path), reader, str(path))
        return Source(lambda: [images], reader.batch), labels
    return as_source(feeds, inputs), labels


def _channels_last(pixels: Array, path: Path) -> Array:
    if pixels.ndim == 4 and pixels.shape[3] not in (1, 3, 4) and pixels.shape[1] in (1, 3, 4):
        pixels = np.moveaxis(pixels, 1, -1)
    if pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[3] not in (1, 3, 4)):
        raise UserError(f"images are [N, H, W] or [N, H, W, C], not {list(pixels.shape)}", f"--eval {path}")
    return pixels


def _labelled_folder(path: Path, inputs: Sequence[InputSpec], preprocess: Preprocess | None) -> tuple[Source, _Labels]:
    if len(inputs) != 1:
        raise UserError("images feed one input: give a .npz or a function", f"--eval {path}")
    table = next((path / name for name in TABLES if (path / name).is_file()), None)
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    numbered = all(folder.name.isdecimal() for folder in folders)
    pairs = _from_folders(folders, numbered) if table is None else _from_table(table)
    if not pairs:
        raise UserError("there are no images in folders that are classes, and no labels.csv", f"--eval {path}")
    reader = ImageReader(inputs[0], preprocess)
    records = [ImageRecord(file, reader) for file, _ in pairs]
    values = np.array([label for _, label in pairs])
    return Source(lambda: records, reader.batch), _Labels(values, None if table or numbered else len(folders))


def _from_folders(folders: Sequence[Path], numbered: bool) -> list[tuple[Path, int]]:
    return [
        (file, int(folder.name) if numbered else position)
        for position, folder in enumerate(folders)
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in SUFFIXES and file.is_file()
    ]


def _from_table(table: Path) -> list[tuple[Path, int]]:
    with reading(table, "not a readable table"), table.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file, skipinitialspace=True) if row]
    pairs = []
    for number, row in enumerate(rows, 1):
        if len(row) != 2 or not row[1].strip().isdecimal():
            if number == 1:
                continue  # a heading
            raise UserError(f"line {number} is not FILE,CLASS with a number for the class", str(table))
        pairs.append((table.parent / row[0], int(row[1])))
    return pairs
