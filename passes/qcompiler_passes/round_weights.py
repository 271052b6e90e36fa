"""round-weights: round each weight so that the rounding errors of a layer cancel on the data that it sees."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Node
from qcompiler.ops import Lowering, rule_of
from qcompiler.quant import F32, QuantParams
from qcompiler.replay import Replay
from qcompiler.rewrite import Rewriter
from qcompiler.state import CompileState, Phase
from qcompiler_passes.nearest_plane import covariance, damp, nearest_plane, spread


@dataclass(frozen=True)
class RoundWeights:
    """Round by what the layer computes instead of to the nearest integer (GPTQ, Frantar et al. 2022, arXiv 2210.17323).

    For each output channel the integers q are sought that minimize (s q - w) H (s q - w)^T, H the covariance of what the weights
    are multiplied with on `samples` calibration samples. H is centered where the layer has a bias: correct-bias, which has to
    follow, removes the error of the mean. `rows`: how many inputs are looked at, per weight of an output channel. `damping`:
    what is added to the diagonal of H, relative to its mean.
    """

    samples: int = 32
    rows: int = 8
    damping: float = 0.01

    name: ClassVar[str] = "round-weights"
    requires: ClassVar[Phase] = Phase.CALIBRATED
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of weights rounded."""
        if state.phase >= Phase.QDQ or state.calibration is None:
            return 0
        names = {n.name for n in state.graph.nodes if _is_layer(state, n) and n.inputs[1].name not in state.integers}
        if not names:
            return 0
        graph = state.graph.copy()
        layers = [n for n in graph.nodes if n.name in names]
        replay = Replay(graph, list(islice(state.calibration, self.samples)), [n.inputs[0] for n in layers])
        rewriter = Rewriter(state)
        for layer in layers:
            if rewriter.exhausted:
                break
            rows = [row[0] for row in replay.advance()]
            weight = layer.inputs[1].name
            state.integers[weight] = self._rounded(layer, state.params[weight], rows)
            rewriter.count += 1
        return rewriter.count

    def _rounded(self, layer: Node, params: QuantParams, values: list[NDArray[Any]]) -> NDArray[Any]:
        """The integers for the weight of a layer that reads `values`, one per sample."""
        weight = np.asarray(ir.array(layer.inputs[1]), np.float32)
        by_row = weight if layer.op == "Conv" else weight.T
        groups = int(layer.attrs.get("group", 1)) if layer.op == "Conv" else 1
        w = by_row.reshape(groups, by_row.shape[0] // groups, -1)
        wanted = -(-self.rows * w.shape[2] // len(values))
        inputs = (_inputs(layer, weight.shape, x, wanted, i) for i, x in enumerate(values))
        hessian = covariance(inputs, centered=layer.op != "MatMul")
        damp(hessian, self.damping)
        scale = np.broadcast_to(np.asarray(params.scale).reshape(-1), by_row.shape[:1]).reshape(*w.shape[:2], 1)
        rounded = nearest_plane(w, np.broadcast_to(scale, w.shape), hessian, params.spec.qmin, params.spec.qmax)
        integers = rounded.reshape(by_row.shape).astype(params.spec.dtype)
        return np.ascontiguousarray(integers if layer.op == "Conv" else integers.T)


def _is_layer(state: CompileState, node: Node) -> bool:
    block, rule = state.blocks.get(node.name), rule_of(state.ops, node)
    known = node.op in ("Conv", "Gemm", "MatMul") and node.domain in ("", None)
    known = known and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    return known and block is not None and block.quantized and rule is not None and rule.lowering is Lowering.MAC


def _inputs(layer: Node, shape: tuple[int, ...], x: NDArray[Any], wanted: int, sample: int) -> F32:
    """About `wanted` of the vectors that the weights of a layer are multiplied with: (groups, vectors, weights per channel)."""
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
    vectors = windows[positions].reshape(len(positions[0]), groups, -1)
    return np.asarray(vectors.transpose(1, 0, 2), np.float32)
