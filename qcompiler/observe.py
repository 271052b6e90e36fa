"""One calibration pass: what the tensors of a float model hold, gathered by collectors.

The model is instrumented: each tensor to observe is reduced inside the graph to its exact bounds and to a strided sample, and
only those leave it. In priority order ONNX Runtime runs the reductions as soon as it can, so that activations die early and
the pass needs hardly more memory than plain inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from threading import Lock
from typing import Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompiler import runtime
from qcompiler.channel_means import ChannelMeans
from qcompiler.collectors import Collector
from qcompiler.errors import UserError
from qcompiler.quant import F32
from qcompiler.relay import SECTION, Relay, split
from qcompiler.runtime import Feeds
from qcompiler.threads import WORKERS, each

SAMPLE_SIZE = 4096
"""About how many values of a tensor are looked at for each calibration sample."""

_PREFIX = "qcompiler.tap"
_SEED = f"{_PREFIX}.seed"


class Progress(Protocol):
    """What a caller may pass to follow the calibration."""

    def __call__(self, done: int, total: int | None) -> None:
        """Take notice that `done` of `total` samples are finished; None where the number is not known."""


def observe(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    source: Iterable[Feeds],
    make: Callable[[], Collector],
    progress: Progress | None = None,
    *,
    sample_size: int = SAMPLE_SIZE,
    limits: Mapping[str, tuple[float, float]] | None = None,
    means: ChannelMeans | None = None,
    workers: int | None = None,
) -> dict[str, Collector]:
    """Run all samples once and return a collector for each of the float32 tensors (graph inputs, results of nodes).

    `limits`: by tensor, the bounds at which values are clipped before they are taken in. `means`: takes what it asks for as
    well. `model` is consumed: it is changed into the instrumented model, so that a large one is not held twice. Of a tensor,
    samples with no elements are passed over.
    Which values are looked at depends on the position of the sample only, and collectors merge exactly, so that the number of
    `workers` (threads; at most two by default) cannot change the result.
    Raises UserError that names the sample if the model does not take it or a value is not finite, ValueError for a tensor that
    the model does not have or that is not float32.
    """
    if not tensors:
        return {}
    runner, order = _instrumented(model, tensors, sample_size, means)
    samples = _Samples(source, progress)
    team = [
        _Worker(runner, {t: (limits or {}).get(t, _NO_LIMITS) for t in order}, make, means)
        for _ in range(workers or WORKERS)
    ]
    each(lambda worker: worker.run(samples), team)
    samples.raise_first_error()
    collectors = team[0].collectors
    for worker in team[1:]:
        for name, collector in collectors.items():
            collector.merge(worker.collectors[name])
    return {name: collectors[name] for name in tensors}


class _Samples:
    """Hands out numbered samples to workers, one at a time, until the source ends or a sample fails."""

    def __init__(self, source: Iterable[Feeds], progress: Progress | None) -> None:
        self._lock = Lock()
        self._samples = enumerate(source)
        self._total = len(source) if isinstance(source, Sized) else None
        self._progress = progress
        self._done = 0
        self._stopped = False
        self._errors: dict[int, UserError] = {}

    def __iter__(self) -> Iterator[tuple[int, Feeds]]:
        while True:
            with self._lock:
                item = None if self._stopped else next(self._samples, None)
            if item is None:
                return
            yield item
            with self._lock:
                self._done += 1
                if self._progress is not None:
                    self._progress(self._done, self._total)

    def stop(self) -> None:
        """Hand out no more."""
        self._stopped = True

    def fail(self, index: int, error: UserError) -> None:
        """Note that a sample failed."""
        self._errors[index] = error
        self.stop()

    def raise_first_error(self) -> None:
        """Raise the error of the first sample that failed: those before it were all handed out, hence are all finished."""
        if self._errors:
            raise self._errors[min(self._errors)]


class _Worker:
    """Runs samples and feeds its own collectors."""

    def __init__(
        self,
        runner: Relay,
        limits: Mapping[str, tuple[float, float]],
        make: Callable[[], Collector],
        means: ChannelMeans | None,
    ) -> None:
        self.runner, self.limits, self.means = runner, limits, means
        self.collectors = {name: make() for name in limits}

    def run(self, samples: _Samples) -> None:
        """Take samples until there are no more or one fails."""
        try:
            for index, feeds in samples:
                try:
                    self._observe(index, feeds)
                except UserError as error:
                    samples.fail(index, error)
                    return
        except BaseException:
            samples.stop()
            raise

    def _observe(self, index: int, feeds: Feeds) -> None:
        where = f"calibration sample {index}"
        try:
            rows = runtime.run(self.runner, {**feeds, _SEED: np.array([_scattered(index)], np.int64)})
        except (UserError, RuntimeError) as error:
            raise UserError(error.what if isinstance(error, UserError) else str(error), where) from error
        if self.means is not None:
            self.means.take(index, rows[len(rows) - len(self.means) :])
            del rows[len(rows) - len(self.means) :]
        ends = (len(rows) - len(self.collectors)) // 2
        lows, highs, values = np.concatenate(rows[:ends]), np.concatenate(rows[ends : 2 * ends]), rows[2 * ends :]
        bounds = zip(lows.tolist(), highs.tolist(), strict=True)
        for (name, collector), (low, high), sample in zip(self.collectors.items(), bounds, values, strict=True):
            if sample.size:
                try:
                    _take(collector, low, high, sample, self.limits[name])
                except ValueError as error:
                    raise UserError(f"tensor {name!r}: {error}", where) from error


_NO_LIMITS = (-math.inf, math.inf)


def _take(collector: Collector, low: float, high: float, sample: F32, limits: tuple[float, float]) -> None:
    """Let the collector observe a tensor clipped at the limits. Raises ValueError if a value is not finite."""
    least, greatest = limits
    if least <= low and high <= greatest:
        collector.observe(low, high, sample)
        return
    if not (math.isfinite(low) and math.isfinite(high) and np.isfinite(sample).all()):
        raise ValueError("a value is not finite")
    inner = np.clip(sample, np.float32(least), np.float32(greatest))
    collector.observe(min(max(low, least), greatest), min(max(high, least), greatest), inner)


def _scattered(index: int) -> int:
    """A number below 2**31 that differs for neighbouring samples in all its digits (Knuth's multiplicative hash)."""
    return (index * 2654435761 + 12345) % 2**32 >> 1


def _instrumented(
    model: onnx.ModelProto, tensors: Sequence[str], sample_size: int, means: ChannelMeans | None
) -> tuple[Relay, list[str]]:
    """What runs the instrumented model, and the order of the tensors in what it gives.

    That is the least values of the tensors of each section, the greatest likewise, then a sample of each tensor, then means.
    """
    _check_tensors(model.graph, tensors)
    sizes = _sizes(model.graph)
    sections = split(model, SECTION // 3)
    taken = {v.name for section in sections[1:] for v in section.graph.input}
    order: list[str] = []
    ends: list[list[str]] = [[], [], [], []]
    for i, section in enumerate(sections):
        known = {name for node in section.graph.node for name in node.output}
        known |= set() if i else {v.name for v in section.graph.input}
        own = [name for name in tensors if name in known]
        kept = [v for v in section.graph.output if v.name in taken]
        del section.graph.output[:]
        section.graph.output.extend(kept)
        added = _instrument(section.graph, own, sizes, sample_size, i)
        averaged = [] if means is None else means.instrument(section, known)
        ends = [[*names, *more] for names, more in zip(ends, (*added, averaged), strict=True)]
        order += own
    return Relay(sections, [name for names in ends for name in names]), order


def _instrument(
    graph: onnx.GraphProto, tensors: Sequence[str], sizes: Mapping[str, int], sample_size: int, section: int
) -> tuple[list[str], list[str], list[str]]:
    """Add outputs: the least and the greatest value of all tensors, shape (tensors,), and a 1-D sample of each.

    The sample has an odd stride, so that it does not stay in one column of a tensor whose width is a power of two. It is computed
    here where the shape is known: the time that ONNX Runtime takes to fold constants grows with the square of their number.
    """
    numbers = {"flat": [-1], "first": [0], "one": [1], "two": [2], "window": [2 * sample_size], "last": [2**63 - 1]}
    constants = {k: numpy_helper.from_array(np.array(v, np.int64), f"{_PREFIX}.{k}") for k, v in numbers.items()}
    graph.input.append(helper.make_tensor_value_info(_SEED, TensorProto.INT64, [1]))
    flat, first, _, _, _, last = (c.name for c in constants.values())
    bounds: tuple[list[str], list[str]] = ([], [])
    samples = []
    starts: set[str] = set()
    for i, tensor in enumerate(tensors):
        row, low, high, stride, start, sample = (f"{_PREFIX}.{section}.{i}.{j}" for j in range(6))
        graph.node.append(helper.make_node("Reshape", [tensor, flat], [row]))
        if tensor in sizes:
            step = sizes[tensor] // (2 * sample_size) * 2 + 1
            stride, start = f"{_PREFIX}.stride.{step}", f"{_PREFIX}.{section}.start.{step}"
            constants.setdefault(stride, numpy_helper.from_array(np.array([step], np.int64), stride))
        else:
            graph.node.extend(_stride_of(row, stride))
        if start not in starts:
            starts.add(start)
            graph.node.append(helper.make_node("Mod", [_SEED, stride], [start]))
        graph.node.extend(
            [
                helper.make_node("ReduceMin", [row], [low], keepdims=1),
                helper.make_node("ReduceMax", [row], [high], keepdims=1),
                helper.make_node("Slice", [row, start, last, first, stride], [sample]),
            ]
        )
        bounds[0].append(low)
        bounds[1].append(high)
        samples.append(sample)
    graph.initializer.extend(constants.values())
    ends = [f"{_PREFIX}.{section}.{which}" for which in ("low", "high")] if tensors else []
    for names, end in zip(bounds, ends, strict=False):
        graph.node.append(helper.make_node("Concat", names, [end], axis=0))
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (*ends, *samples))
    return ends[:1], ends[1:], samples


def _stride_of(row: str, stride: str) -> list[onnx.NodeProto]:
    """What computes the stride, where only a run tells the size."""
    one, two, window = (f"{_PREFIX}.{name}" for name in ("one", "two", "window"))
    size, half, even = (f"{stride}.{i}" for i in range(3))
    return [
        helper.make_node("Shape", [row], [size]),
        helper.make_node("Div", [size, window], [half]),
        helper.make_node("Mul", [half, two], [even]),
        helper.make_node("Add", [even, one], [stride]),
    ]


def _sizes(graph: onnx.GraphProto) -> dict[str, int]:
    """The numbers of elements of tensors whose shapes are known, in a batch of one if that is all that is open."""
    batches = {
        value.type.tensor_type.shape.dim[0].dim_param for value in graph.input if value.type.tensor_type.shape.dim
    }
    found = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        kind = value.type.tensor_type
        dims = list(kind.shape.dim)
        if dims and dims[0].dim_param and dims[0].dim_param in batches:
            del dims[0]
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            found[value.name] = math.prod(dim.dim_value for dim in dims)
    return found


def _check_tensors(graph: onnx.GraphProto, tensors: Sequence[str]) -> None:
    known = {v.name for v in graph.input} | {name for n in graph.node for name in n.output}
    declared = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    for name in tensors:
        if name not in known:
            raise ValueError(f"the model has no tensor {name!r}")
        kind = declared.get(name, TensorProto.UNDEFINED)
        if kind not in {TensorProto.FLOAT, TensorProto.UNDEFINED}:
            raise ValueError(f"tensor {name!r} is not float32, but {TensorProto.DataType.Name(kind).lower()}")
