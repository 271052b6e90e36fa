"""Weights beside a ModelProto instead of in it: protobuf ends at 2 GiB, and each copy of a proto copies what it holds.

In the proto of a larger model a large initializer is external data: of a file, by its absolute path, or of an array in memory,
by a number with a `#` before it. Either way `array_of` gives the array without a copy; files are mapped.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper, helper

from qcompiler.errors import UserError

MODEL_LIMIT = 1_800_000_000
"""Bytes of a model above which its large weights stay beside it; protobuf ends at 2 GiB."""

LARGE = 1 << 16
"""Bytes of a weight that is worth it."""

_PAGE = 4096
_SMALL = 1024

_memory: WeakValueDictionary[str, NDArray[Any]] = WeakValueDictionary()
_mapped: WeakValueDictionary[tuple[object, ...], np.memmap[Any, Any]] = WeakValueDictionary()
_numbers = count()


def is_detached(tensor: TensorProto) -> bool:
    """Whether the data of a tensor is elsewhere."""
    return bool(external_data_helper.uses_external_data(tensor))


def of(model: onnx.ModelProto) -> list[TensorProto]:
    """The initializers of the main graph whose data is elsewhere."""
    return [tensor for tensor in model.graph.initializer if is_detached(tensor)]


def refer(name: str, array: NDArray[Any]) -> TensorProto:
    """A tensor of that name that refers to an array; one in memory must live as long as the tensor is used.

    The array must be contiguous.
    """
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
    base = array.base
    if isinstance(base, np.memmap) and base.nbytes == array.nbytes:
        point(tensor, str(base.filename), base.offset, base.nbytes)
        return tensor
    key = f"#{next(_numbers)}"
    _memory[key] = array
    point(tensor, key, 0, array.nbytes)
    return tensor


def point(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Let a tensor refer to bytes of a file instead of what it held."""
    tensor.ClearField("raw_data")
    tensor.ClearField("external_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def array_of(tensor: TensorProto) -> NDArray[Any]:
    """The array that a detached tensor refers to, read-only if it is a mapped file.

    Raises UserError if the file can no longer be mapped, or if the array has gone with the graph that held it.
    """
    location, offset = _place(tensor)
    shape, dtype = tuple(tensor.dims), helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if location.startswith("#"):
        array = _memory.get(location)
        if array is None:
            raise UserError("its weights are gone; write the model to a file", f"tensor '{tensor.name}'")
        return array.reshape(shape)
    try:
        status = Path(location).stat()
        key = (location, status.st_ino, status.st_mtime_ns, offset, shape, dtype)
        found = _mapped.get(key)
        if found is None:  # twice mapped, it would count twice as memory
            found = _mapped[key] = np.memmap(location, dtype, "r", offset, shape)
        return np.asarray(found)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot map its external data: {error}", f"tensor '{tensor.name}'") from error


def _place(tensor: TensorProto) -> tuple[str, int]:
    info = {entry.key: entry.value for entry in tensor.external_data}
    return info["location"], int(info.get("offset") or 0)


def make_relative(tensor: TensorProto) -> bool:
    """Let the path of a detached tensor start at the root of the file system; False if it is in memory."""
    for entry in tensor.external_data:
        if entry.key == "location" and entry.value.startswith("/"):
            entry.value = entry.value.lstrip("/")
            return True
    return False


def let_go() -> None:
    """Give back the memory of mapped files; what is read again comes from the system's cache, or from the disk."""
    for mapped in list(_mapped.values()):
        base = mapped.base
        if isinstance(base, mmap.mmap) and hasattr(base, "madvise"):
            base.madvise(mmap.MADV_DONTNEED)


def total_bytes(model: onnx.ModelProto) -> int:
    """The size of a model with what is beside it."""
    beside = (int(e.value) for t in of(model) for e in t.external_data if e.key == "length")
    return int(model.ByteSize()) + sum(beside)


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself, or for one with detached weights a copy in which these are inputs: it is as valid as the model."""
    loose = of(model)
    if not loose:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    held = [tensor for tensor in copy.graph.initializer if not is_detached(tensor)]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(held)
    copy.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in loose)
    return copy


def exceeds(arrays: Iterable[Any]) -> bool:
    """Whether all of these together are too much for one proto."""
    return bool(sum(array.nbytes for array in arrays) > MODEL_LIMIT)


def write(model: onnx.ModelProto, data: Path) -> onnx.ModelProto:
    """A copy of the model, for the folder of `data`, whose initializers of at least a kilobyte are in this file.

    Each starts at a page, so that readers can map it. The same model gives the same bytes.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with data.open("wb") as file:
        for tensor in copy.graph.initializer:
            values = _bytes_of(tensor)
            if values is None:
                continue
            file.write(bytes(-file.tell() % _PAGE))
            start = file.tell()
            file.write(values)
            point(tensor, data.name, start, file.tell() - start)
    return copy


def _bytes_of(tensor: TensorProto) -> Any:
    """The data of an initializer that goes to a file, without a copy where there is an array; None for one that stays."""
    if is_detached(tensor):
        return array_of(tensor).reshape(-1).view(np.uint8).data
    return tensor.raw_data if len(tensor.raw_data) >= _SMALL else None


def settle(model: onnx.ModelProto, written: onnx.ModelProto, folder: Path) -> None:
    """Let the detached weights of a model refer to the files of its copy that was written to `folder`."""
    files = {t.name: t for t in of(written)}
    for tensor in of(model):
        info = {entry.key: entry.value for entry in files[tensor.name].external_data}
        point(tensor, str(folder.absolute() / info["location"]), int(info["offset"]), int(info["length"]))
