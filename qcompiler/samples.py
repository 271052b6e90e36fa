"""How arrays from one place (a file, a dict) become samples that fit the model's inputs: names, dtypes, the batch axis.

The batch axis. An *item* is one row of the batch. Arrays are cut into items by a reshape to `(items, *item shape)`:

| model input    | array            | items                               |
| -------------- | ---------------- | ----------------------------------- |
| [1 or N, C, H] | [C, H]           | 1 (the batch axis is added)         |
| [1 or N, C, H] | [100, C, H]      | 100                                 |
| [4, C, H]      | [100, C, H]      | 100, fed in groups of 4             |
| [1 or N, C, H] | [100, 1, C, H]   | 100                                 |
| [], [T], [2,3] | the same shape   | 1                                   |
| [], [T]        | [100], [100, T]  | 100                                 |

Where several inputs are cut, each has one item, which is then repeated for all samples, or as many as the others.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qcompiler.errors import UserError

Array = NDArray[Any]
DType = np.dtype[Any]
Sample = dict[str, Array]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class InputSpec:
    """What the model wants for one input. A dimension is fixed (int) or dynamic (a symbol, None, or negative)."""

    name: str
    dtype: DType
    shape: tuple[int | str | None, ...] | None
    """None where even the rank is unknown: then every array is one sample as it stands."""
    finite: bool = True
    """Whether NaN and infinity are refused; masks hold infinity."""

    def __post_init__(self) -> None:
        if self.shape is not None:
            # Some exporters write -1 for a dynamic dimension.
            dims = tuple(None if isinstance(dim, int) and dim < 0 else dim for dim in self.shape)
            object.__setattr__(self, "shape", dims)

    def __str__(self) -> str:
        dims = "any shape" if self.shape is None else show_shape(self.shape)
        return f"input '{self.name}' ({self.dtype} {dims})"


class Header(NamedTuple):
    """The shape and dtype of an array whose bytes have not been read."""

    shape: Shape
    dtype: DType


@dataclass(frozen=True)
class Batch:
    """Which inputs have a leading batch axis, and how many items one sample holds."""

    size: int
    names: frozenset[str]


@dataclass(frozen=True)
class Cuts:
    """How the arrays of one place are cut: input name → (key of the array, its shape as (items, *item shape))."""

    count: int
    of: Mapping[str, tuple[str, Shape]]

    def item(self, arrays: Mapping[str, Array], name: str, index: int) -> Array:
        """Return item `index` of an input; a lone item is every item."""
        key, shape = self.of[name]
        items = arrays[key].reshape(shape)
        return np.asarray(items[index if shape[0] > 1 else 0])


def show_shape(shape: Sequence[int | str | None]) -> str:
    """Print a shape as users write it, with `?` for an unnamed dimension."""
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


@contextmanager
def reading(where: Path | str, failure: str) -> Iterator[None]:
    """Turn whatever a parser raises on foreign bytes into one `UserError` that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise UserError(f"{failure}: {reason}", str(where)) from error


def batch_of(inputs: Sequence[InputSpec]) -> Batch:
    """Find the batch axis: a dynamic leading dimension, else one of 1, else that of the first input of rank 2 or more.

    An input of rank 1 never decides: alone, its only axis is a signal, not a batch.
    """
    if not inputs:
        raise UserError("the model has no inputs, so that there is nothing to feed")
    ranked = [spec.shape for spec in inputs if spec.shape is not None and len(spec.shape) >= 2]
    if not ranked:
        return Batch(1, frozenset())
    leads = [shape[0] for shape in ranked]
    dynamic: list[int | str | None] = [lead for lead in leads if not isinstance(lead, int)]
    axis = dynamic or [1 if 1 in leads else leads[0]]
    names = frozenset(spec.name for spec in inputs if spec.shape and spec.shape[0] in axis)
    return Batch(max(axis[0], 1) if isinstance(axis[0], int) else 1, names)


def cut(
    arrays: Mapping[str, Header | Array], inputs: Sequence[InputSpec], batch: Batch, where: str, exact: bool = False
) -> Cuts:
    """Match arrays to inputs and find their items, from shapes and dtypes alone.

    `exact`: every key must be the name of an input. Otherwise keys besides the inputs' names (labels) are ignored, and a
    model with one input takes the only array. Raises `UserError` where something does not fit.
    """
    keys = _match_exactly(arrays, inputs, where) if exact else _match(arrays, inputs, where)
    shapes: dict[str, Shape] = {}
    for spec in inputs:
        header = arrays[keys[spec.name]]
        if refusal := _refuse_dtype(header.dtype, spec.dtype):
            raise UserError(f"{spec}: {refusal}", where)
        shape = _items(header.shape, spec, batch)
        if shape is None:
            raise UserError(f"{spec} cannot take an array of shape {show_shape(header.shape)}", where)
        shapes[spec.name] = shape
    if any(shape[0] == 0 for shape in shapes.values()) or all(math.prod(shape) == 0 for shape in shapes.values()):
        raise UserError("the array is empty", where)
    counts = {name: shape[0] for name, shape in shapes.items() if shape[0] > 1}
    heads = {spec.name: tuple(arrays[keys[spec.name]].shape) for spec in inputs}
    if len(set(counts.values())) > 1 or _batch_elsewhere(heads, inputs, batch, counts):
        if not _one_feed(heads, inputs):
            sizes = ", ".join(f"'{name}' {count}" for name, count in counts.items())
            raise UserError(f"the inputs hold different numbers of samples: {sizes}", where)
        counts, shapes = {}, {name: (1, *shape) for name, shape in heads.items()}
    return Cuts(max(counts.values(), default=1), {name: (keys[name], shape) for name, shape in shapes.items()})


def convert(array: Array, spec: InputSpec, where: str) -> Array:
    """Return a C-contiguous copy in the input's dtype. Raises `UserError` on NaN, infinity, overflow and objects but strings."""
    if spec.dtype.hasobject and not all(isinstance(value, str | bytes) for value in array.reshape(-1).tolist()):
        raise UserError(f"{spec}: the array holds other objects than strings", where)
    if spec.finite and array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{spec}: the array holds NaN or infinity", where)
    if array.dtype.kind in "iu" and array.dtype != spec.dtype and array.size:
        limits = np.iinfo(spec.dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise UserError(f"{spec}: the array holds integers that do not fit in {spec.dtype}", where)
    with np.errstate(over="ignore"):
        result: Array = np.array(array, dtype=spec.dtype, order="C", subok=False)
    narrower = result.dtype.kind == "f" and result.dtype.itemsize < array.dtype.itemsize
    if narrower and np.isinf(result).sum() > np.isinf(array).sum():
        raise UserError(f"{spec}: the array holds numbers too large for {spec.dtype}", where)
    return result


def join(items: Sequence[Sample], batch: Batch, where: str) -> Sample:
    """Stack items into one sample along the batch axis. Inputs without that axis must agree."""
    if len(items) == 1:
        return items[0]
    sample: Sample = {}
    for name, first in items[0].items():
        parts = [item[name] for item in items]
        if any(part.shape != first.shape for part in parts):
            raise UserError(f"input '{name}': the {len(items)} items of one batch differ in shape", where)
        if name not in batch.names and any(not np.array_equal(part, first) for part in parts):
            raise UserError(f"input '{name}' has no batch axis, but its value differs within one batch", where)
        sample[name] = np.concatenate(parts) if name in batch.names else first
    return sample


def _fits(shape: Shape, want: Sequence[int | str | None]) -> bool:
    return len(shape) == len(want) and all(
        have == dim or not isinstance(dim, int) for have, dim in zip(shape, want, strict=True)
    )


def _items(shape: Shape, spec: InputSpec, batch: Batch) -> Shape | None:
    """Return the array's shape as (items, *item shape), or None if it does not fit the input."""
    want = spec.shape
    if want is None:
        return (1, *shape)
    if spec.name not in batch.names:
        stacked = batch.size == 1 and _fits(shape[1:], want) and len(shape) == len(want) + 1
        return (1, *shape) if _fits(shape, want) else shape if stacked else None
    lead = len(shape) - len(want) + 1
    if lead not in (0, 1, 2) or not _fits(shape[lead:], want[1:]) or (lead == 2 and not _fits(shape[1:], want)):
        return None
    return (math.prod(shape[:lead]), 1, *shape[lead:])


def _match_exactly(arrays: Collection[str], inputs: Sequence[InputSpec], where: str) -> dict[str, str]:
    names = [spec.name for spec in inputs]
    for wrong, kind in (
        ([name for name in names if name not in arrays], "no array for the input"),
        ([key for key in arrays if key not in names], "the model has no input"),
    ):
        if wrong:
            raise UserError(f"{kind} '{wrong[0]}'; the inputs are {', '.join(names)}", where)
    return {name: name for name in names}


def _match(arrays: Mapping[str, Header | Array], inputs: Sequence[InputSpec], where: str) -> dict[str, str]:
    missing = [spec for spec in inputs if spec.name not in arrays]
    if not missing:
        return {spec.name: spec.name for spec in inputs}
    if len(inputs) == len(arrays) == 1:
        return {inputs[0].name: next(iter(arrays))}
    held = ", ".join(f"{key} {header.dtype} {show_shape(header.shape)}" for key, header in arrays.items())
    raise UserError(f"no array for {missing[0]}; the file holds {held or 'no array'}", where)


def _refuse_dtype(have: DType, want: DType) -> str | None:
    """Say why an array cannot be fed, or return None. Floats may change width; so may integers whose values fit.

    Strings are objects where they are in memory, or in ONNX tensors; only `convert` can tell.
    """
    if want.hasobject and have.kind in "OUT":
        return None
    if have.hasobject:
        return "the file holds pickled Python objects, which are never loaded; save an array of numbers"
    if have.newbyteorder("=") == want or (have.kind == want.kind == "f") or (have.kind in "iu" and want.kind in "iu"):
        return None
    if have.kind in "iu" and want.kind == "f":
        return (
            f"the array holds integers ({have}), so the model's preprocessing is missing; "
            "save what the model is fed, for example x.astype('float32') / 255"
        )
    return f"the array holds {have}"


def _batch_elsewhere(
    shapes: Mapping[str, Shape], inputs: Sequence[InputSpec], batch: Batch, counts: Mapping[str, int]
) -> bool:
    """Whether an input holds the whole batch on an inner axis (`state [2, N, 128]`), so that it cannot be cut."""
    symbols = {spec.shape[0] for spec in inputs if spec.shape and spec.name in batch.names} - {None}
    return any(
        dim in symbols and isinstance(dim, str) and size in counts.values()
        for spec in inputs
        if spec.shape is not None
        for dim, size in list(zip(spec.shape, shapes[spec.name], strict=False))[1:]
    )


def _one_feed(shapes: Mapping[str, Shape], inputs: Sequence[InputSpec]) -> bool:
    """Whether the arrays, as they stand, are one valid sample: every symbol has one size. Unnamed ones prove nothing."""
    sizes: dict[str, int] = {}
    for spec in inputs:
        if spec.shape is None:
            continue
        if not _fits(shapes[spec.name], spec.shape) or (spec.shape and spec.shape[0] is None):
            return False
        for dim, size in zip(spec.shape, shapes[spec.name], strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                return False
    return True
