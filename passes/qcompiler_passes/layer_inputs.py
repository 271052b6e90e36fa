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
    dims = len(shape) - 2
    strides, dilations = (layer.attrs.get(key, [1] * dims) for key in ("strides", "dilations"))
    pads = layer.attrs.get("pads", [0] * 2 * dims)
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:dims], pads[dims:], strict=True)])
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, shape[2:], strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(x, reach, axis=tuple(range(2, 2 + dims)))
    steps = [slice(None, None, step) for step in (*strides, *dilations)]
    windows = windows[(slice(None), slice(None), *steps)]
    windows = np.moveaxis(windows, 1, 1 + dims)  # batch, positions, channels, kernel
    positions = np.unravel_index(
        spread(int(np.prod(windows.shape[: 1 + dims])), wanted, sample), windows.shape[: 1 + dims]
    )
    groups = x.shape[1] // shape[1]
    found = windows[positions].reshape(len(positions[0]), groups, -1)
    return np.asarray(found.transpose(1, 0, 2), np.float32)
