"""Windows: small pieces of the tensors of a float model, cut from the same places of many samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from qcompiler import ir
from qcompiler.ir import Graph, Tensor
from qcompiler.quant import F32
from qcompiler.runtime import run_all, session
from qcompiler.state import Feeds

LIMIT = 96_000_000
"""Bytes that the windows of all samples may take; fewer samples are cut where they would take more."""

LEAST_SAMPLES = 4

_LEAST_SIDE = 3
"""Of a window: room for the commonest kernel."""

_UNKNOWN = 2**20
"""Taken for the size of an axis that is not known."""

_PREFIX = "qcompiler.window"

Axes = Mapping[str, tuple[int, ...]]


def cut(
    graph: Graph, tensors: Sequence[Tensor], axes: Axes, samples: Iterable[Feeds], values: int
) -> dict[str, list[F32]]:
    """For each float32 tensor, a window of each sample; all axes are kept.

    `axes`: by tensor, the axes to shorten, so that about `values` values are left. Tensors that agree in the sizes of these
    axes are cut at the same place, whatever their channels. The place depends on the position of the sample only.
    """
    sizes = _sizes(tensors, axes, values)
    held = 4 * sum(_channels(t, axes[t.name]) * math.prod(sizes[t.name]) for t in tensors)
    feeds = list(islice(samples, max(LEAST_SAMPLES, LIMIT // max(held, 1))))
    runner = session(_instrumented(ir.to_proto(graph), tensors, axes, sizes), low_memory=True, consume=True)
    seeds = np.random.default_rng(0).integers(0, 2**31, (len(feeds), 1))
    rows = run_all(runner, [{**feed, _SEED: seed} for feed, seed in zip(feeds, seeds, strict=True)])
    return {t.name: [row[i] for row in rows] for i, t in enumerate(tensors)}


def _sizes(tensors: Sequence[Tensor], axes: Axes, values: int) -> dict[str, tuple[int, ...]]:
    """How much to keep of the axes: the same for all tensors that agree in them, so that they still fit each other."""
    most: dict[tuple[int, ...], int] = {}
    for t in tensors:
        dims = _dims(t, axes[t.name])
        most[dims] = max(most.get(dims, 1), _channels(t, axes[t.name]))
    windows = {dims: _window(dims, values // channels) for dims, channels in most.items()}
    return {t.name: windows[_dims(t, axes[t.name])] for t in tensors}


def _dims(tensor: Tensor, axes: Sequence[int]) -> tuple[int, ...]:
    shape = ir.shape(tensor) or ()
    return tuple(d if isinstance(d, int) else _UNKNOWN for d in (shape[axis] for axis in axes))


def _channels(tensor: Tensor, axes: Sequence[int]) -> int:
    return math.prod(d for i, d in enumerate(ir.shape(tensor) or ()) if i not in axes and isinstance(d, int))


def _window(dims: tuple[int, ...], places: int) -> tuple[int, ...]:
    """The sides of a window that covers about so many places, as near to a square as the dims allow."""
    sides = dict.fromkeys(range(len(dims)), 1)
    for done, i in enumerate(sorted(sides, key=lambda i: dims[i])):
        side = int(max(places, 1) ** (1 / (len(dims) - done)))
        sides[i] = min(max(side, _LEAST_SIDE), dims[i])
        places //= sides[i]
    return tuple(sides.values())


_SEED = f"{_PREFIX}.seed"


def _instrumented(
    model: ModelProto, tensors: Sequence[Tensor], axes: Axes, sizes: Mapping[str, tuple[int, ...]]
) -> ModelProto:
    """The model with the windows as outputs; a new input, the seed, says where they lie."""
    graph, one = model.graph, f"{_PREFIX}.one"
    graph.input.append(helper.make_tensor_value_info(_SEED, TensorProto.INT64, [1]))
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), one))
    del graph.output[:]
    for i, tensor in enumerate(tensors):
        at, size, shape, dims, kept, gap, room, start, end, window = (f"{_PREFIX}.{i}.{j}" for j in range(10))
        graph.output.append(helper.make_tensor_value_info(window, TensorProto.FLOAT, None))
        if not axes[tensor.name]:
            graph.node.append(helper.make_node("Identity", [tensor.name], [window]))
            continue
        for name, numbers in ((at, axes[tensor.name]), (size, sizes[tensor.name])):
            graph.initializer.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
        graph.node.extend(
            [
                helper.make_node("Shape", [tensor.name], [shape]),
                helper.make_node("Gather", [shape, at], [dims]),
                helper.make_node("Min", [dims, size], [kept]),
                helper.make_node("Sub", [dims, kept], [gap]),
                helper.make_node("Add", [gap, one], [room]),
                helper.make_node("Mod", [_SEED, room], [start]),
                helper.make_node("Add", [start, kept], [end]),
                helper.make_node("Slice", [tensor.name, start, end, at], [window]),
            ]
        )
    return model
