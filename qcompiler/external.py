"""External data: read from beside the model and from nowhere else, so that a model cannot name any file of the machine."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import external_data_helper

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
    """Bring all external tensors into the model that was read from `path`.

    Raises UserError for data that is missing, not in the model's folder, shorter than it says, or larger than 2 GB in all.
    """
    total = model.ByteSize()
    for tensor in _tensors(model):
        if not external_data_helper.uses_external_data(tensor):
            continue
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
        total += length
        if total > MAX_BYTES:
            raise UserError("the model and its external data are larger than 2 GB", str(path))
        with file.open("rb") as stream:
            stream.seek(offset)
            tensor.raw_data = stream.read(length)
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT


def _external_file(model: Path, location: str, where: str) -> Path:
    """The file at `location` in the model's folder; links that lead out of it are refused, hard links too."""
    folder = model.parent.resolve()
    try:
        file = (folder / location).resolve()
        inside = bool(location) and not Path(location).is_absolute() and file.is_relative_to(folder)
        if not inside or file == folder:
            raise UserError(f"its external data {location!r} is not a file in the model's folder", where)
        status = file.stat()
    except (OSError, ValueError):
        raise UserError(f"its external data {location!r} cannot be read", where) from None
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise UserError(f"its external data {location!r} is not a regular file of its own", where)
    return file
