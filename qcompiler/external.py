"""External data: read from beside the model and from nowhere else, so that a model cannot name any file of the machine."""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import external_data_helper

from qcompiler import detached
from qcompiler.errors import UserError

MAX_BYTES = 2**31 - 1
"""The limit of protobuf."""


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and every subgraph in its nodes, at any depth."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from graphs(inner)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that holds data: initializers and attributes, of subgraphs and functions too."""
    all_graphs = list(graphs(model.graph))
    for graph in all_graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in (n for owner in (*all_graphs, *model.functions) for n in owner.node):
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t


def refuse_unloaded(model: onnx.ModelProto) -> None:
    """Raise UserError for a model in memory whose data is in a file: nobody knows in which folder."""
    for tensor in _tensors(model):
        if external_data_helper.uses_external_data(tensor):
            raise UserError(
                "its data is in another file; load it, or give the model as a path", f"tensor '{tensor.name}'"
            )


def load_external_data(model: onnx.ModelProto, path: Path) -> None:
    """Bring all external tensors into the model that was read from `path`; the large ones of a model over 2 GB stay outside.

    Those refer to their file by its absolute path; see `detached`. Raises UserError for data that is missing, not in the
    model's folder, shorter than it says, or more than can be brought in.
    """
    found = [_Data.find(tensor, path) for tensor in _tensors(model) if external_data_helper.uses_external_data(tensor)]
    if not found:
        return
    held = model.ByteSize()
    is_large = held + sum(data.length for data in found) > detached.MODEL_LIMIT
    initializers = {id(tensor) for tensor in model.graph.initializer}
    for data in found:
        if is_large and id(data.tensor) in initializers and data.can_be_mapped:
            detached.point(data.tensor, str(data.file), data.offset, data.length)
            continue
        held += data.length
        if held > MAX_BYTES:
            raise UserError("the model has more than 2 GB in small or unusual tensors", str(path))
        data.bring_in()


def data_files(path: Path) -> set[Path]:
    """The files with external data of the model in a file; none if it cannot be read."""
    try:
        tensors = list(_tensors(onnx.load(path, load_external_data=False)))
    except Exception:  # whoever loads it will say why
        return set()
    entries = (entry for tensor in tensors for entry in tensor.external_data if entry.key == "location")
    return {path.parent / entry.value for entry in entries}


@dataclass(frozen=True)
class _Data:
    """Where the data of a tensor is."""

    tensor: onnx.TensorProto
    file: Path
    offset: int
    length: int

    @classmethod
    def find(cls, tensor: onnx.TensorProto, path: Path) -> _Data:
        """Resolve and check what an external tensor of the model at `path` says."""
        where = f"{path}: tensor '{tensor.name}'"
        info = {entry.key: entry.value for entry in tensor.external_data}
        file = _external_file(path, info.get("location", ""), where)
        try:
            size = file.stat().st_size
            offset = int(info.get("offset") or 0)
            length = int(info.get("length") or size - offset)
        except ValueError:
            raise UserError("the offset or length of its external data is not a number", where) from None
        if offset < 0 or length < 0 or offset + length > size:
            raise UserError(f"its external data lies outside the {size} bytes of {file.name}", where)
        return cls(tensor, file, offset, length)

    @property
    def can_be_mapped(self) -> bool:
        """Whether the tensor is large, and its bytes are those of an array."""
        if self.length < detached.LARGE or min(self.tensor.dims, default=0) < 0:
            return False
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.tensor.data_type)
        return dtype.isbuiltin == 1 and math.prod(self.tensor.dims) * dtype.itemsize == self.length

    def bring_in(self) -> None:
        """Read the data into the tensor."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            self.tensor.raw_data = stream.read(self.length)
        self.tensor.ClearField("external_data")
        self.tensor.data_location = onnx.TensorProto.DEFAULT


def _external_file(model: Path, location: str, where: str) -> Path:
    """The file at `location` in the model's folder; links that lead out of it are refused, hard links too."""
    folder = model.parent.resolve()
    try:
        file = (folder / location).resolve()
        inside = bool(location) and not Path(location).is_absolute() and file.is_relative_to(folder)
        if not inside or file == folder:
            raise UserError(f"its external data {location!r} is not a file in the model's folder", where)
        status = file.stat()
    except (OSError, ValueError, RuntimeError):  # the last for links that lead to themselves, in Python up to 3.12
        raise UserError(f"its external data {location!r} cannot be read", where) from None
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise UserError(f"its external data {location!r} is not a regular file of its own", where)
    return file
