"""Files of arrays: `.npy`, `.npz` and ONNX `input_*.pb`. Headers are read first; nothing is ever unpickled."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import onnx
from onnx import numpy_helper

from qcompiler.errors import UserError
from qcompiler.samples import Array, Header, InputSpec, reading

_BOMB_BYTES, _BOMB_RATIO = 1 << 28, 500
_DAMAGED = "not a readable array file"
_UNNAMED = "(unnamed)"


class ArrayFile(Protocol):
    """Named arrays in one place."""

    @property
    def where(self) -> str:
        """The name for messages."""

    def headers(self) -> Mapping[str, Header | Array]:
        """Return the shape and dtype of every array."""

    def read(self, keys: Sequence[str]) -> Mapping[str, Array]:
        """Return the arrays of these keys."""


@dataclass(frozen=True)
class NpyFile:
    """A `.npy` file: one array without a name, mapped rather than loaded."""

    path: Path

    @property
    def where(self) -> str:
        """The file's name, for messages."""
        return str(self.path)

    def headers(self) -> dict[str, Header]:
        """Return the array's shape and dtype."""
        with reading(self.path, _DAMAGED), self.path.open("rb") as file:
            return {_UNNAMED: _header(file, self.path.stat().st_size)}

    def read(self, keys: Sequence[str]) -> dict[str, Array]:
        """Return the array."""
        with reading(self.path, _DAMAGED):
            return {_UNNAMED: np.load(self.path, mmap_mode="r", allow_pickle=False)}


@dataclass(frozen=True)
class NpzFile:
    """A `.npz` archive of named arrays, loaded one archive at a time."""

    path: Path

    @property
    def where(self) -> str:
        """The file's name, for messages."""
        return str(self.path)

    def headers(self) -> dict[str, Header]:
        """Return shapes and dtypes; decompresses the headers only."""
        found = {}
        with reading(self.path, _DAMAGED), zipfile.ZipFile(self.path) as archive:
            for member in archive.infolist():
                if not member.filename.endswith(".npy"):
                    continue
                if member.file_size > max(_BOMB_BYTES, _BOMB_RATIO * member.compress_size):
                    raise UserError(f"'{member.filename}' would unpack to {member.file_size} bytes", str(self.path))
                with archive.open(member) as file:
                    found[member.filename.removesuffix(".npy")] = _header(file, member.file_size)
        return found

    def read(self, keys: Sequence[str]) -> dict[str, Array]:
        """Return the arrays of these keys."""
        with reading(self.path, _DAMAGED), np.load(self.path, allow_pickle=False) as archive:
            return {key: archive[key] for key in keys}


@dataclass(frozen=True)
class PbFiles:
    """The `input_*.pb` files (TensorProto) of one folder: matched to inputs by the tensors' names, else by number."""

    paths: Sequence[Path]
    inputs: Sequence[InputSpec]

    @property
    def where(self) -> str:
        """The name of the file, or of the folder if there are several."""
        return str(self.paths[0] if len(self.paths) == 1 else self.paths[0].parent)

    def headers(self) -> dict[str, Array]:
        """Return the arrays by input name."""
        found: dict[str, Array] = {}
        for path in self.paths:
            with reading(path, "not a readable ONNX tensor"):
                tensor = onnx.TensorProto.FromString(path.read_bytes())
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    raise UserError("the tensor's data lie in another file, which is not supported", str(path))
                name = self._input_name(tensor.name, path)
                if name in found:
                    raise UserError(f"a second tensor for input '{name}'", str(path))
                found[name] = numpy_helper.to_array(tensor)
        return found

    def read(self, keys: Sequence[str]) -> dict[str, Array]:
        """Return the arrays of these inputs."""
        return self.headers()

    def _input_name(self, name: str, path: Path) -> str:
        number = re.fullmatch(r"input_(\d+)", path.stem)
        if any(spec.name == name for spec in self.inputs):
            return name
        if number and int(number[1]) < len(self.inputs):
            return self.inputs[int(number[1])].name
        raise UserError(f"the model has no input '{name or path.stem}'", str(path))


def _header(file: IO[bytes], available: int) -> Header:
    """Read the header of an array file of `available` bytes."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format is not supported")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if min(shape, default=0) < 0 or (not dtype.hasobject and math.prod(shape) * dtype.itemsize > available):
        raise ValueError("the file is cut short, or its header is wrong")
    return Header(shape, dtype)
