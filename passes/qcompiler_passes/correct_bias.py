"""correct-bias: take the mean error of quantization out of every layer through its bias, at no cost at run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.channel_means import ChannelMeans, Channels
from qcompiler.collectors import MinMax
from qcompiler.ir import Node, Tensor
from qcompiler.observe import observe
from qcompiler.rewrite import Rewriter
from qcompiler.state import CompileState, Feeds, Phase
from qcompiler_passes.biases import ensure_bias, layers_with_bias, results
from qcompiler_passes.quantized_prefix import QuantizedPrefix, in_float

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


_FINITE = (float(np.finfo(np.float32).min), float(np.finfo(np.float32).max))

LEAST_ACTIVE = 0.1
"""Below this share of outputs inside the activation's bounds, the bias is taken to move the mean as if it were this share."""


@dataclass(frozen=True)
class CorrectBias:
    """Empirical bias correction, layer after layer (after Nagel et al. 2019, arXiv 1906.04721, section 4.2).

    Rounding shifts the mean of each output channel. The shift is measured on `samples` calibration samples, as the difference
    between the float layer and the quantized layer behind the already quantized and corrected layers before it, and taken out
    of the bias. Two things differ from the paper: means are compared behind the activation, where the next layer sees them, and
    divided by the share of outputs that the bias moves there; and each shift is shrunk by its sampling error, as estimated
    from the samples' variance, so that few samples do not add noise. Layers that stay float are corrected, too, where quantized
    ones are before them. Layers without a place for a bias (MatMul) stay as they are, and so
    do models that came quantized: their biases were chosen with that in view.
    """

    samples: int = 64

    name: ClassVar[str] = "correct-bias"
    requires: ClassVar[Phase] = Phase.CALIBRATED
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of layers corrected."""
        if state.phase >= Phase.QDQ or state.calibration is None or state.imported:
            return 0
        layers = [n for n in layers_with_bias(state) if n.name not in state.corrected]
        if not layers:
            return 0
        samples = list(islice(state.calibration, self.samples))
        exact = _means(state, layers, samples)
        ensure_bias(state, layers)
        quantized = _Measurement(state, layers, samples)
        del samples  # which are let go as the measurement moves on
        rewriter = Rewriter(state)
        for layer, wanted in zip(layers, exact, strict=True):
            if rewriter.exhausted:
                break
            measured, active = quantized.next_layer()
            shift = _shift(wanted[: len(measured)], measured, active)
            bias = (ir.array(layer.inputs[2]) + shift).astype(np.float32)
            rewriter.set_input(layer, 2, rewriter.constant(f"{layer.name}_corrected_bias", bias))
            quantized.prefix.shift_bias(shift)
            state.corrected.add(layer.name)
            rewriter.count += 1
        state.means = {}
        return rewriter.count


def _shift(wanted: F64, measured: F64, active: F64) -> F64:
    """How far to move the bias of each channel.

    wanted, measured: means behind the activation, shape (samples, channels); active: share of outputs within its bounds.
    The estimate is multiplied by max(0, 1 - variance of the mean / mean**2), the positive-part James-Stein factor.
    """
    error = wanted - measured
    mean = error.mean(axis=0)
    variance = error.var(axis=0) / len(error)
    signal = np.square(mean)
    certainty = np.divide(np.maximum(signal - variance, 0), signal, out=np.zeros_like(mean), where=signal > variance)
    share = active.mean(axis=0)
    return np.where(share > 0, mean * certainty / np.maximum(share, LEAST_ACTIVE), 0)


def _means(state: CompileState, layers: list[Node], samples: list[Feeds]) -> list[F64]:
    """Per layer, the mean of each channel in float, as calibrate noted it or as measured now: (samples, channels)."""
    channels, count = results(state, layers), len(samples)
    known: Mapping[str, F32] = state.means
    if any(c.tensor not in known or len(known[c.tensor]) < count for c in channels):
        means = ChannelMeans(channels, count)
        observe(ir.to_proto(state.graph), [c.tensor for c in channels], samples, MinMax, means=means)
        known = means.finish()
    return [known[c.tensor][:count].astype(np.float64) for c in channels]


class _Measurement:
    """What layers give behind the quantized prefix, one after the other."""

    def __init__(self, state: CompileState, layers: list[Node], samples: list[Feeds]) -> None:
        self.prefix = QuantizedPrefix(state, layers, samples)
        self._graph, self._results = self.prefix.graph, iter(results(state, layers))

    def next_layer(self) -> tuple[F64, F64]:
        """The channel means behind the activation, and the shares that the bias moves: (samples, channels) each."""
        layer, channels, count = self.prefix.next_layer(), next(self._results), len(self._graph.nodes)
        raw = self._in_float(layer, channels)
        rows = self.prefix.run(self._averages(raw, channels))
        for node in self._graph.nodes[count:]:
            ir.detach(node)
        del self._graph.nodes[count:]
        means = np.asarray([row[1] for row in rows], np.float64)
        return means, np.asarray([row[2] for row in rows], np.float64) if channels.bounded else np.ones_like(means)

    def _in_float(self, layer: Node, channels: Channels) -> Tensor:
        """What the layer gives before it is rounded, at the positions that count.

        Weight and bias are constants, for which ONNX Runtime has its fast float kernels. Means of what is rounded would hold
        the error that all values of a constant background have in common: no bias takes that away.
        """
        inputs = [layer.inputs[0], *(ir.Constant(f"{t.name}_constant", in_float(t)) for t in layer.inputs[1:])]
        attrs = dict(layer.attrs)
        if max(channels.steps, default=1) > 1:
            strides = attrs.get("strides", [1] * len(channels.steps))
            attrs["strides"] = [stride * step for stride, step in zip(strides, channels.steps, strict=True)]
        return self._append(layer.op, inputs, **attrs)

    def _averages(self, raw: Tensor, channels: Channels) -> list[Tensor]:
        """Of each channel, the mean behind the activation and, if that has bounds, the share that the bias moves."""
        if not channels.bounded:
            return [self._mean(raw, channels)]
        bounds = [
            ir.Constant(f"{raw.name}_{which}", np.asarray(np.clip(bound, *_FINITE), np.float32))
            for which, bound in (("low", channels.low), ("high", channels.high))
        ]
        clipped = self._append("Clip", [raw, *bounds])
        within = self._append("Cast", [self._append("Equal", [raw, clipped], np.bool_)], to=1)
        return [self._mean(t, channels) for t in (clipped, within)]

    def _mean(self, tensor: Tensor, channels: Channels) -> Tensor:
        if self._graph.opset < 18:
            return self._append("ReduceMean", [tensor], axes=channels.axes, keepdims=0)
        axes = ir.Constant(f"{tensor.name}_axes", np.asarray(channels.axes, np.int64))
        return self._append("ReduceMean", [tensor, axes], keepdims=0)

    def _append(self, op: str, inputs: list[Tensor], dtype: Any = np.float32, **attrs: Any) -> Tensor:
        name = f"{inputs[0].name}_tap_{op}"
        self._graph.nodes.append(ir.Node(op, name, attrs, inputs, [ir.Variable(name, np.dtype(dtype))]))
        return self._graph.nodes[-1].outputs[0]
