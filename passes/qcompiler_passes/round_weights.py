"""round-weights: integers for weights with which a layer gives, on the data that it sees, what the float layer gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Node
from qcompiler.ops import Lowering, rule_of
from qcompiler.quant import F32, QuantParams
from qcompiler.replay import FRONT_BYTES, Replay
from qcompiler.rewrite import Rewriter
from qcompiler.state import CompileState, Feeds, Phase
from qcompiler.threads import each
from qcompiler_passes.biases import ensure_bias
from qcompiler_passes.compensate import Moments, compensated
from qcompiler_passes.layer_inputs import takes_vectors, vectors
from qcompiler_passes.nearest_plane import damp, nearest_plane
from qcompiler_passes.quantized_prefix import QuantizedPrefix, in_float

_COMPENSATED = 2048
"""Layers of more weights per output channel are rounded only: the regression takes the cube of that number of operations."""

_LEAST_ROWS = 16
"""Of every sample, so many vectors are looked at, if it has them."""


@dataclass(frozen=True)
class RoundWeights:
    """Choose the integers of each weight by what the layer computes, layer after layer behind those that are chosen already.

    First the weights are changed so that they make up for the errors in what the layer reads (GPTAQ, Li et al. 2025,
    arXiv 2504.02692; `compensate=false` leaves that out). Then, for each output channel, integers q are sought that minimize
    (s q - w) H (s q - w)^T, H the covariance of what the weights are multiplied with (GPTQ, Frantar et al. 2022,
    arXiv 2210.17323). Both are measured on `samples` calibration samples, and about the mean where the layer has a bias:
    correct-bias, which has to follow, removes the error of the mean. `rows`: how many vectors are looked at, per weight of an
    output channel. `damping`: what is added to the diagonal of H, relative to its mean. `largest`: layers of more weights per
    output channel are left to rounding to the nearest.
    """

    samples: int = 64
    rows: int = 16
    damping: float = 0.02
    largest: int = 1 << 16
    compensate: bool = True

    name: ClassVar[str] = "round-weights"
    requires: ClassVar[Phase] = Phase.CALIBRATED
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of weights rounded."""
        if state.phase >= Phase.QDQ or state.calibration is None:
            return 0
        layers = [n for n in state.graph.nodes if self._is_due(state, n)]
        if not layers:
            return 0
        samples = list(islice(state.calibration, self.samples))
        ensure_bias(state, [n for n in layers if n.op != "MatMul"])
        exact = _float_inputs(state, layers, samples) if self.compensate else None
        quantized = QuantizedPrefix(state, layers, samples)
        del samples  # which are let go as the measurements move on
        rewriter = Rewriter(state)
        for layer in layers:
            if rewriter.exhausted:
                break
            node = quantized.next_layer()
            given = [in_float(node.inputs[0], row[0]) for row in quantized.run()]
            wanted = given if exact is None else [row[0] for row in exact.advance()]
            name = layer.inputs[1].name
            if name in state.integers:  # shared with an earlier layer
                continue
            state.integers[name], shift = self._rounded(
                layer, state.params[name], list(zip(given, wanted, strict=False))
            )
            quantized.set_weight(state.integers[name])
            if layer.op != "MatMul":
                quantized.shift_bias(shift)
            rewriter.count += 1
        return rewriter.count

    def _is_due(self, state: CompileState, node: Node) -> bool:
        if not _is_layer(state, node) or node.inputs[1].name in state.integers:
            return False
        shape = ir.array(node.inputs[1]).shape
        return int(np.prod(shape[1:] if node.op == "Conv" else shape[:1])) <= self.largest

    def _rounded(
        self, layer: Node, params: QuantParams, pairs: list[tuple[F32, F32]]
    ) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """The integers for the weight of a layer, and by how much the mean of each channel is too low then.

        pairs: what the layer reads behind quantized layers and behind float layers, for each sample.
        """
        weight = np.asarray(ir.array(layer.inputs[1]), np.float32)
        by_row = weight if layer.op == "Conv" else weight.T
        groups = int(layer.attrs.get("group", 1)) if layer.op == "Conv" else 1
        w = by_row.reshape(groups, by_row.shape[0] // groups, -1)
        is_depthwise = groups > 1 and weight.shape[1] == 1  # one channel holds too little to make up for errors with
        compensate = self.compensate and not is_depthwise and w.shape[2] <= _COMPENSATED and len(pairs) > 1
        halves = self._moments(layer, weight.shape, w.shape[2], pairs, compensate)
        whole = halves[0] + halves[1]
        aim = compensated(w, halves) if compensate else w
        scale = np.broadcast_to(np.asarray(params.scale).reshape(-1), by_row.shape[:1]).reshape(*w.shape[:2], 1)
        hessian = np.asarray(whole.squares(), np.float32)
        damp(hessian, self.damping)
        spec = params.spec
        rounded = nearest_plane(aim, np.broadcast_to(scale, w.shape), hessian, spec.qmin, spec.qmax)
        x, d = whole.means()
        shift = np.einsum("grk,gk->gr", w, x + d) - np.einsum("grk,gk->gr", rounded * scale, x)
        integers = rounded.reshape(by_row.shape).astype(spec.dtype)
        return np.ascontiguousarray(integers if layer.op == "Conv" else integers.T), shift.reshape(-1)

    def _moments(
        self, layer: Node, shape: tuple[int, ...], columns: int, pairs: list[tuple[F32, F32]], crossed: bool
    ) -> tuple[Moments, Moments]:
        """Those of every other sample, and of the rest."""
        wanted = max(-(-self.rows * columns // len(pairs)), _LEAST_ROWS)
        origin = None if layer.op == "MatMul" else vectors(layer, shape, pairs[0][0], 1, 0)

        def moments(first: int) -> Moments:
            found = Moments(origin, crossed)
            for i in range(first, len(pairs), 2):
                x, float_x = pairs[i]
                some = vectors(layer, shape, x, wanted, i)
                exact = some if float_x is x else vectors(layer, shape, float_x, wanted, i)
                found.add(some, exact - some)
            return found

        even, odd = each(moments, (0, 1))
        return even, odd


def _float_inputs(state: CompileState, layers: Sequence[Node], samples: Sequence[Feeds]) -> Replay:
    graph = state.graph.copy()
    nodes = {n.name: n for n in graph.nodes}
    return Replay(graph, samples, [nodes[n.name].inputs[0] for n in layers], 4 * FRONT_BYTES)


def _is_layer(state: CompileState, node: Node) -> bool:
    block, rule = state.blocks.get(node.name), rule_of(state.ops, node)
    is_mac = block is not None and block.quantized and rule is not None and rule.lowering is Lowering.MAC
    return is_mac and takes_vectors(node)
