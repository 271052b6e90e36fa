"""Means of the channels of tensors, taken for each sample while a model is observed."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qcompiler.quant import F32

_PREFIX = "qcompiler.mean"


@dataclass(frozen=True)
class Channels:
    """The channels of a float32 tensor, on axis 1.

    `steps`: along each axis behind, every so many positions count, from the first. `low`, `high`: bounds at which values are
    clipped; `clipped`: whether they are so already.
    """

    tensor: str
    count: int
    steps: tuple[int, ...]
    low: float = -math.inf
    high: float = math.inf
    clipped: bool = False

    @property
    def axes(self) -> list[int]:
        """All but that of the channels."""
        return [0, *range(2, 2 + len(self.steps))]

    @property
    def bounded(self) -> bool:
        """Whether values may lie beyond the bounds."""
        return math.isfinite(self.low) or math.isfinite(self.high)


class ChannelMeans:
    """The mean of each channel for each of the first `samples` samples."""

    def __init__(self, channels: Sequence[Channels], samples: int) -> None:
        self._channels, self._samples = channels, samples
        self._sections: list[list[Channels]] = []
        self._rows: dict[int, Sequence[F32]] = {}

    def __len__(self) -> int:
        """The number of outputs added to the model."""
        return len(self._sections)

    def instrument(self, section: onnx.ModelProto, known: Collection[str]) -> list[str]:
        """Add an output to a section of the model, which has the tensors `known`; return its name, if there is anything in it."""
        own = [c for c in self._channels if c.tensor in known]
        if not own:
            return []
        writer = _Writer(section, f"{_PREFIX}.{len(self)}")
        joined = writer.node("Concat", [writer.mean(c) for c in own], axis=0)
        section.graph.output.append(helper.make_tensor_value_info(joined, TensorProto.FLOAT, None))
        self._sections.append(own)
        return [joined]

    def take(self, index: int, values: Sequence[F32]) -> None:
        """Keep the values of the outputs for a sample. Each sample is handed in once, in any order."""
        if index < self._samples:
            self._rows[index] = values

    def finish(self) -> dict[str, F32]:
        """By tensor, float32 (samples, channels)."""
        found: dict[str, F32] = {}
        for i, own in enumerate(self._sections):
            rows = np.stack([row[i] for _, row in sorted(self._rows.items())])
            ends = np.cumsum([c.count for c in own])
            found |= zip((c.tensor for c in own), np.split(rows, ends[:-1], axis=1), strict=True)
        return found


class _Writer:
    """Adds nodes to a graph; all that is named starts with `prefix`."""

    def __init__(self, model: onnx.ModelProto, prefix: str) -> None:
        self._graph, self._prefix, self._count = model.graph, prefix, 0
        self._opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self._constants: dict[str, str] = {}

    def mean(self, channels: Channels) -> str:
        """The mean of each channel: 1-D."""
        tensor = self._clipped(channels)
        if self._opset < 18:
            return self.node("ReduceMean", [tensor], axes=channels.axes, keepdims=0)
        return self.node("ReduceMean", [tensor, self._constant(channels.axes)], keepdims=0)

    def node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """The only output of a new node."""
        output = self._name()
        self._graph.node.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def _clipped(self, channels: Channels) -> str:
        """What counts of a tensor, within its bounds."""
        tensor = channels.tensor
        if max(channels.steps, default=1) > 1:
            count = len(channels.steps)
            ranges = [0] * count, [2**63 - 1] * count, channels.axes[1:], channels.steps
            tensor = self.node("Slice", [tensor, *map(self._constant, ranges)])
        if channels.clipped or not channels.bounded:
            return tensor
        return self.node("Clip", [tensor, self._constant(float(channels.low)), self._constant(float(channels.high))])

    def _constant(self, value: float | Sequence[int]) -> str:
        """A number, float32, or several, int64."""
        array: NDArray[Any] = np.asarray(value, np.float32 if isinstance(value, float) else np.int64)
        text = f"{array.dtype} {array.tolist()}"
        if text not in self._constants:
            self._constants[text] = self._name()
            self._graph.initializer.append(numpy_helper.from_array(array, self._constants[text]))
        return self._constants[text]

    def _name(self) -> str:
        self._count += 1
        return f"{self._prefix}.{self._count}"
