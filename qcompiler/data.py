"""Calibration data: a folder, a file or a Python object becomes a re-iterable `Source` of samples that the model can be fed.

Little is held in memory: every iteration reads most of the data again, in the same order (by path). Headers are read, and shapes
and dtypes checked, when a source is opened; values are checked as they are read. In a folder only files of the accepted kinds
count; hidden files and links to folders are passed over. The batch rules are those of `samples`, the image rules those of
`images`.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qcompiler.arrayfiles import ArrayFile, NpyFile, NpzFile, PbFiles
from qcompiler.errors import UserError
from qcompiler.images import PRESETS, SUFFIXES, ImageReader, ImageRecord, Preprocess
from qcompiler.samples import Array, Batch, Cuts, InputSpec, Sample, batch_of, convert, cut, join, reading

__all__ = ["PRESETS", "InputSpec", "Preprocess", "Source", "as_source", "is_sample", "open_source"]

_KINDS = {".npy": "arrays", ".npz": "arrays", ".pb": "tensors"} | dict.fromkeys(SUFFIXES, "images")
READERS = 2
"""Files that are read at a time."""

KEPT_BYTES = 32_000_000
"""What the samples that are kept may take: 53 images of 224 x 224, float32."""

_ACCEPTED = "images (JPEG, PNG, BMP, WebP, GIF, TIFF), .npy, .npz or ONNX test data (input_0.pb)"


class Record(Protocol):
    """One place that holds items: a file, or an element of a Python sequence."""

    @property
    def where(self) -> str:
        """The name for messages."""

    def count(self) -> int:
        """Return the number of items, from headers only."""

    def items(self, indices: Sequence[int]) -> Iterator[Sample]:
        """Yield the chosen items, in order."""


@dataclass(frozen=True)
class ArrayRecord:
    """Arrays in one place, cut into items."""

    file: ArrayFile
    inputs: Sequence[InputSpec]
    batch: Batch
    exact: bool = False

    @property
    def where(self) -> str:
        """The name for messages."""
        return self.file.where

    def count(self) -> int:
        """Return the number of items. Raises `UserError` if the arrays do not fit the inputs."""
        return self._cuts().count

    def items(self, indices: Sequence[int]) -> Iterator[Sample]:
        """Yield the chosen items; the arrays are read once."""
        cuts = self._cuts()
        if indices[-1] >= cuts.count:
            raise UserError("the data changed while it was being read", self.where)
        arrays = self.file.read([key for key, _ in cuts.of.values()])
        for index in indices:
            yield {s.name: convert(cuts.item(arrays, s.name, index), s, self.where) for s in self.inputs}

    def _cuts(self) -> Cuts:
        return cut(self.file.headers(), self.inputs, self.batch, self.where, self.exact)


@dataclass(frozen=True)
class _Memory:
    """Arrays that are already in memory, as an `ArrayFile`."""

    where: str
    arrays: Mapping[str, Array]

    def headers(self) -> Mapping[str, Array]:
        return self.arrays

    def read(self, keys: Sequence[str]) -> Mapping[str, Array]:
        return self.arrays


@dataclass(eq=False)
class Source:
    """Samples (input name → array, in the model's dtypes), always in the same order.

    Every iteration reads them anew, but for the first ones, up to KEPT_BYTES, which several passes want. `records` returns the
    places to read, anew for each iteration. Of `limit` < all samples, evenly spread ones are taken; a last batch that would not
    be full is dropped. Opening one reads all headers and the first sample.
    """

    records: Callable[[], Iterable[Record]]
    batch: Batch
    limit: int | None = None
    _counts: list[int] = field(init=False, default_factory=list, repr=False)
    _chosen: Sequence[int] = field(init=False, repr=False)
    _kept: list[Sample] = field(init=False, default_factory=list, repr=False)
    _kept_bytes: int = field(init=False, default=0, repr=False)
    _hashes: dict[int, bytes] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"the number of samples must be at least 1, not {self.limit}", "limit")
        last = "calibration data"
        for record in self.records():
            self._counts.append(record.count())
            last = record.where
        items = sum(self._counts)
        total = items // self.batch.size
        if not items:
            raise UserError("there are no samples", last)
        if not total:
            raise UserError(f"{items} sample(s) do not fill the model's batch of {self.batch.size}", last)
        count = min(total, self.limit or total)
        self._chosen = [i * total // count for i in range(count)]
        next(self._samples())

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[Sample]:
        kept = list(self._kept)
        yield from kept
        for i, sample in enumerate(self._samples(len(kept)), len(kept)):
            if i not in self._hashes:
                self._hashes[i] = _hash(sample)
            size = sum(array.nbytes for array in sample.values())
            if i == len(self._kept) and self._kept_bytes + size <= KEPT_BYTES:
                self._kept.append(sample)
                self._kept_bytes += size
            yield sample

    def digest(self) -> str:
        """Return a SHA-256 of all that is fed: names, dtypes, shapes, bytes. Free after a complete iteration."""
        if len(self._hashes) < len(self):
            for _ in self:
                pass
        return hashlib.sha256(b"".join(self._hashes[i] for i in range(len(self)))).hexdigest()

    def _samples(self, first: int = 0) -> Iterator[Sample]:
        """Read all samples from the number `first` on."""
        group: list[Sample] = []
        for item, where in _read_ahead((record, indices) for record, indices in self._parts(first) if indices):
            group.append(item)
            if len(group) == self.batch.size:
                yield join(group, self.batch, where)
                group = []

    def _parts(self, first: int) -> Iterator[tuple[Record, list[int]]]:
        """The records, each with the positions of the items to take from it, from the sample `first` on."""
        size = self.batch.size
        wanted = [index * size + row for index in self._chosen[first:] for row in range(size)]
        start = taken = 0
        for record, count in zip(self.records(), self._counts, strict=False):
            stop = start + count
            indices = [item - start for item in wanted[taken : bisect_left(wanted, stop)]]
            yield record, indices
            start, taken = stop, taken + len(indices)
            if taken == len(wanted):
                return
        raise UserError(
            "there was less data on a second reading; a function must return a new iterator on every call",
            "calibration data",
        )


def _hash(sample: Sample) -> bytes:
    found = hashlib.sha256()
    for name, array in sample.items():
        found.update(repr((name, array.dtype.str, array.shape)).encode())
        found.update(_bytes(array))
    return found.digest()


def _bytes(array: Array) -> Any:
    if array.dtype.hasobject:
        return repr(array.tolist()).encode()
    return array.data if array.size else b""


def _read_ahead(parts: Iterable[tuple[Record, list[int]]]) -> Iterator[tuple[Sample, str]]:
    """The items with the places they come from, in order. Where a record gives one item, two are read at a time: images, say."""
    ahead: deque[tuple[Future[list[Sample]], str]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for record, indices in parts:
            if len(indices) == 1:
                ahead.append((pool.submit(lambda r, i: list(r.items(i)), record, indices), record.where))
            while len(ahead) > (READERS if len(indices) == 1 else 0):
                future, where = ahead.popleft()
                yield future.result()[0], where
            if len(indices) > 1:
                yield from ((item, record.where) for item in record.items(indices))
        for future, where in ahead:
            yield future.result()[0], where


def open_source(
    path: Path, inputs: Sequence[InputSpec], preprocess: Preprocess | None = None, limit: int | None = None
) -> Source:
    """Open a file, or a folder with all below it, as calibration data.

    Without `preprocess`, images are scaled to 0..1 (0..255 for an integer input) and to the model's size. Raises
    `UserError` if there is no usable file, kinds are mixed, or a header or the first sample does not fit the model.
    """
    batch = batch_of(inputs)
    with reading(path, "cannot read the calibration data"):
        files = _usable_files(path)
    kinds = sorted({_KINDS[file.suffix.lower()] for file in files})
    if len(kinds) > 1:
        raise UserError(f"the folder holds {' and '.join(kinds)}; give a folder with one kind", str(path))
    records: list[Record]
    if kinds == ["images"]:
        if len(inputs) > 1:
            names = ", ".join(spec.name for spec in inputs)
            raise UserError(f"images feed one input, but the model has {names}: use .npz", str(path))
        reader = ImageReader(inputs[0], preprocess)
        batch, records = reader.batch, [ImageRecord(file, reader) for file in files]
    elif kinds == ["tensors"]:
        folders = [PbFiles(list(group), inputs) for _, group in groupby(files, lambda file: file.parent)]
        records = [ArrayRecord(folder, inputs, batch) for folder in folders]
    else:
        arrays: list[ArrayFile] = [NpzFile(f) if f.suffix.lower() == ".npz" else NpyFile(f) for f in files]
        records = [ArrayRecord(file, inputs, batch) for file in arrays]
    return Source(lambda: records, batch, limit)


def as_source(
    obj: Any, inputs: Sequence[InputSpec], preprocess: Preprocess | None = None, limit: int | None = None
) -> Source:
    """Turn what a Python caller has into a source.

    `obj` is a path, a `Source`, one array or dict of arrays (a sample, or several stacked), a re-iterable of such (a list,
    a data loader), or a function that returns a new iterator over such on every call; it is read once when it is opened.
    An array without a name feeds a model with one input. Raises `UserError` on anything else, generators included.
    """
    if isinstance(obj, Source):
        return obj
    if isinstance(obj, str | os.PathLike):
        return open_source(Path(obj), inputs, preprocess, limit)
    batch = batch_of(inputs)
    elements = _elements(obj)

    def records() -> Iterator[Record]:
        for index, element in enumerate(elements()):
            where = f"sample {index}"
            yield ArrayRecord(_Memory(where, _named(element, inputs, where)), inputs, batch, exact=True)

    return Source(records, batch, limit)


def _usable_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(_walk(path), key=lambda file: file.parts)
        if not files:
            raise UserError(f"the folder has no usable file; accepted are {_ACCEPTED}", str(path))
    elif not path.exists():
        raise UserError("there is no such file or folder", str(path))
    elif path.suffix.lower() in _KINDS:
        files = [path]
    else:
        raise UserError(f"not a kind of calibration data; accepted are {_ACCEPTED}", str(path))
    for file in files:
        # A pipe would block for ever, and a link may point nowhere.
        if not file.is_file():
            raise UserError("not a readable file", str(file))
    return files


def is_sample(file: Path, samples: Path) -> bool:
    """Whether an existing file may be one of those that are read for calibration data in a file or folder."""
    if samples.is_dir():
        return file.suffix.lower() in _KINDS and file.resolve().is_relative_to(samples.resolve())
    return samples.exists() and file.samefile(samples)


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder: {error.strerror}", str(error.filename))

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            kind = _KINDS.get(Path(name).suffix.lower())
            if kind and not name.startswith(".") and (kind != "tensors" or name.startswith("input_")):
                yield Path(root, name)


def _elements(obj: Any) -> Callable[[], Iterable[Any]]:
    if isinstance(obj, Mapping) or hasattr(obj, "__array__"):
        return lambda: (obj,)
    if hasattr(obj, "__next__"):
        raise UserError(
            "a generator can be read only once; give a list, or a function that returns a new generator",
            "calibration data",
        )
    if isinstance(obj, Iterable):
        return lambda: obj
    if callable(obj):
        return obj  # type: ignore[no-any-return]
    raise UserError(f"a {type(obj).__name__} is not calibration data", "calibration data")


def _named(element: Any, inputs: Sequence[InputSpec], where: str) -> dict[str, Array]:
    if not isinstance(element, Mapping):
        if not hasattr(element, "__array__"):
            raise UserError(f"a sample is a dict of arrays or an array, not a {type(element).__name__}", where)
        if len(inputs) != 1:
            names = ", ".join(spec.name for spec in inputs)
            raise UserError(f"an array without a name; the model has the inputs {names}", where)
        element = {inputs[0].name: element}
    try:
        return {str(name): np.asarray(value) for name, value in element.items()}
    except (TypeError, ValueError) as error:
        raise UserError(f"not an array of numbers: {error}", where) from error
