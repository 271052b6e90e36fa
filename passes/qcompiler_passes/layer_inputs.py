"""What the weights of a layer are multiplied with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.ir import Node
from qcompiler.quant import F32
from qcompiler_passes.nearest_plane import spread


def takes_vectors(node: Node) -> bool:
    """Whether `vectors` knows what the weights of the node are multiplied with."""
    is_standard = node.op in ("Conv", "Gemm", "MatMul") and node.domain in ("", None)
    return is_standard and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")


def vectors(layer: Node, shape: tuple[int, ...], x: NDArray[Any], wanted: int, sample: int) -> F32:
    """About `wanted` of the vectors that the weights of a layer, of this shape, are multiplied with when it reads x.

    Shape (groups, vectors, weights per output channel). `sample`: which of all samples x is; each takes other positions.
    """
    if layer.op != "Conv":
        rows = x.reshape(-1, x.shape[-1])
        return np.asarray(rows[spread(len(rows), wanted, sample)][None], np.float32)
    positions, outside = _taps(layer, x.shape, shape[2:], wanted, sample)
    by_channel = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
    found = np.take(by_channel, positions, axis=1)
    if outside.any():
        found[:, outside] = 0
    by_group = found.reshape(-1, shape[1], *positions.shape).transpose(0, 2, 1, 3)
    return np.asarray(by_group.reshape(len(by_group), len(positions), -1), np.float32)


def _taps(
    conv: Node, shape: tuple[int, ...], kernel: tuple[int, ...], wanted: int, sample: int
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Where a convolution takes about `wanted` of its vectors from, as positions in all but the channels of what it reads.

    Shape (vectors, weights per channel). The second array: which of them are padding.
    """
    dims = len(kernel)
    strides, dilations = (conv.attrs.get(key, [1] * dims) for key in ("strides", "dilations"))
    pads = conv.attrs.get("pads", [0] * 2 * dims)
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    padded = [size + before + after for size, before, after in zip(shape[2:], pads[:dims], pads[dims:], strict=True)]
    counts = [(size - r) // step + 1 for size, r, step in zip(padded, reach, strides, strict=True)]
    total = shape[0] * int(np.prod(counts))
    position, *starts = np.unravel_index(spread(total, wanted, sample)[:, None], (shape[0], *counts))
    outside = np.zeros((len(position), int(np.prod(kernel))), np.bool_)
    offsets = np.indices(kernel).reshape(dims, 1, -1)
    for i, size in enumerate(shape[2:]):
        place = starts[i] * strides[i] - pads[i] + offsets[i] * dilations[i]
        outside |= (place < 0) | (place >= size)
        position = position * size + place
    return np.where(outside, 0, position), outside
