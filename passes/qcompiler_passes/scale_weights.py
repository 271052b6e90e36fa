"""scale-weights: give every weight its scale, so that the requantize multiplier of its operator is an integer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir, quant
from qcompiler.errors import UserError
from qcompiler.ir import Node
from qcompiler.ops import Lowering, rule_of
from qcompiler.quant import F32, QuantParams, QuantSpec
from qcompiler.state import CompileState, Phase
from qcompiler.threads import each
from qcompiler_passes import import_weights

_BUDGET = 3_000_000
"""Weights looked at per tensor: small ones, whose few values gain most from a good scale, get more candidates."""

_CACHED = 65536
"""About how many rounded weights are looked at together, so that they stay in the cache."""


@dataclass(frozen=True)
class ScaleWeights:
    """Choose each weight scale per output channel.

    The scale that covers the largest weight is rounded up to one whose rescale factor `s_x * s_w / s_y` is `m * 2**-16`, then
    others near it are tried and the one with the least mean squared rounding and clipping error wins (OMSE on exact values;
    Choukroun et al. 2019, arXiv 1902.06822). `search=false` keeps the first. Operators with a float result take any scale.
    In a model that came with params, channels whose weights lie on a grid keep the integers of that grid, and the factor is
    rounded to the nearest instead.

    `rounding=stochastic` also fixes the integers: up with the probability of the fraction, down otherwise, from a generator with
    this `seed` (Gupta et al. 2015, arXiv 1502.02551). Unbiased, but with twice the mean squared error of rounding to nearest.
    """

    search: bool = True
    rounding: str = "nearest"
    seed: int = 0

    name: ClassVar[str] = "scale-weights"
    requires: ClassVar[Phase] = Phase.CALIBRATED
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of weights that got params. Raises UserError for an unknown rounding."""
        if self.rounding not in ("nearest", "stochastic"):
            raise UserError(f"no rounding is called {self.rounding!r}; choose nearest or stochastic", self.name)
        grid, weights = _Grid(), _weights(state)
        scales = each(lambda weight: _best_scale(weight, self.search), weights)
        for weight, scale in zip(weights, scales, strict=True):
            state.params[weight.name] = _params(state, weight, scale, grid)
        if self.rounding == "stochastic":
            generator = np.random.default_rng(self.seed)
            for weight in weights:
                if weight.name not in state.integers:
                    array = ir.array(weight.node.inputs[1])
                    state.integers[weight.name] = _stochastic(array, state.params[weight.name], generator)
        state.notes += grid.notes()
        return len(weights)


@dataclass(frozen=True)
class _Weight:
    """A weight that needs scales. `s_x`, `s_y`: the scales of what its operator reads and gives, None for a float result."""

    node: Node
    spec: QuantSpec
    s_x: float
    s_y: float | None

    @property
    def name(self) -> str:
        return self.node.inputs[1].name

    def rows(self) -> F32:
        """Shape (channels, weights per channel)."""
        array, axis = ir.array(self.node.inputs[1]), self.spec.axis
        rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1) if axis is not None else array.reshape(1, -1)
        return np.ascontiguousarray(rows, np.float32)


def _weights(state: CompileState) -> list[_Weight]:
    """Those without params of quantized blocks, each once."""
    found: dict[str, _Weight] = {}
    for node in state.graph.nodes:
        block = state.blocks.get(node.name)
        rule = rule_of(state.ops, node)
        if block is None or rule is None or not block.quantized or rule.lowering is not Lowering.MAC:
            continue
        name, output = node.inputs[1].name, state.params.get(block.outputs[0])
        if name not in state.params and name not in found:
            spec = state.target.weight.per_channel(rule.weight_axis if state.target.per_channel else None)
            s_x = float(state.params[node.inputs[0].name].scale)
            found[name] = _Weight(node, spec, s_x, None if output is None else float(output.scale))
    return list(found.values())


def _params(state: CompileState, weight: _Weight, scale: F32, grid: _Grid) -> QuantParams:
    """The params with the best scale, or one that the model came with; wider where the bias asks for it."""
    spec, rows, s_x, s_y = weight.spec, weight.rows(), weight.s_x, weight.s_y
    step = import_weights.steps(rows, spec) if state.imported else np.zeros(len(rows))
    trained = import_weights.on_grid(step, s_x, s_y)
    scale = np.where(trained > 0, trained, scale)
    bias = ir.optional_input(weight.node, 2)
    if bias is not None:
        scale = _room_for_bias(scale, np.asarray(ir.array(bias), np.float64), s_x, s_y)
    if state.imported:
        first = spec.axis or 0
        shape = np.moveaxis(ir.array(weight.node.inputs[1]), first, 0).shape
        kernel = int(np.prod(shape[2:]))
        integers = grid.integers(rows, step, scale, scale == trained, kernel, spec)
        state.integers[weight.name] = np.ascontiguousarray(np.moveaxis(integers.reshape(shape), 0, first))
    return QuantParams(spec, scale if spec.axis is not None else scale.reshape(()), 0)


def _stochastic(values: NDArray[Any], params: QuantParams, generator: np.random.Generator) -> NDArray[Any]:
    """Integers next to values / scale, the upper with the probability of the fraction, so that their mean is that quotient."""
    spec = params.spec
    shape = [1] * values.ndim
    if spec.axis is not None:
        shape[spec.axis] = -1
    lower = np.floor(values.astype(np.float64) / params.scale.reshape(shape) + generator.random(values.shape))
    return np.clip(lower, spec.qmin, spec.qmax).astype(spec.dtype)


def _best_scale(weight: _Weight, search: bool) -> F32:
    """Shape (channels,)."""
    rows, spec = weight.rows(), weight.spec
    largest = np.maximum(np.abs(rows).max(axis=1), np.finfo(np.float32).tiny * 2.0**40)
    candidates = int(np.clip(_BUDGET // max(rows.size, 1), 6, 80)) if search else 0
    fractions = np.append(1.0, np.linspace(1.2, 0.7, candidates))
    scales = _snapped(largest / spec.qmax * fractions[:, None], weight.s_x, weight.s_y)
    best = _errors(rows, scales, spec).argmin(axis=0) if search else np.zeros(len(rows), np.int64)
    return np.asarray(scales[best, np.arange(len(rows))], np.float32)


def _snapped(wanted: NDArray[np.floating], s_x: float, s_y: float | None) -> F32:
    if s_y is None:
        return np.asarray(np.maximum(wanted, quant.MIN_SCALE), np.float32)
    return quant.snap_weight_scale(wanted, s_x, s_y)


def _errors(rows: F32, scales: F32, spec: QuantSpec) -> F32:
    """The sum of squared errors under each of the scales, both of shape (candidates, channels)."""
    errors = np.empty_like(scales)
    block = max(1, _CACHED // (len(scales) * rows.shape[1]))
    for start in range(0, len(rows), block):
        some = slice(start, start + block)
        step = scales[:, some, None]
        back = rows[some] / step
        np.rint(back, out=back)
        np.clip(back, spec.qmin, spec.qmax, out=back)
        back *= step
        back -= rows[some]
        errors[:, some] = np.square(back, out=back).sum(axis=2)
    return errors


def _room_for_bias(scale: F32, bias: NDArray[np.float64], s_x: float, s_y: float | None) -> F32:
    """Widen scales where the int32 bias would take more than half of the accumulator."""
    least = np.abs(bias).reshape(-1) / (s_x * 2.0**30)
    least = np.broadcast_to(least, scale.shape) if scale.size > 1 else np.asarray([least.max()])
    return np.asarray(np.where(scale < least, _snapped(least, s_x, s_y), scale), np.float32)


class _Grid:
    """The integers that the weights of a quantized model came with, and how many of them were kept."""

    def __init__(self) -> None:
        self.channels = self.kept = 0
        self.error = 0.0

    def integers(
        self, rows: F32, step: NDArray[np.float64], scale: F32, kept: NDArray[np.bool_], kernel: int, spec: QuantSpec
    ) -> NDArray[Any]:
        """The integers of weights in rows: those of the grid where it is kept, else new ones under `scale`."""
        self.channels += len(rows)
        self.kept += int(kept.sum())
        if kept.any():
            self.error = max(self.error, float(np.abs(scale[kept] / step[kept] - 1).max()))
        found = np.empty(rows.shape, spec.dtype)
        found[kept] = np.clip(np.rint(rows[kept] / step[kept, None]), spec.qmin, spec.qmax)
        found[~kept] = import_weights.rounded(rows[~kept], scale[~kept], kernel, spec)
        return found

    def notes(self) -> list[str]:
        if not self.channels:
            return []
        snapped = f"; multipliers snapped to the dyadic grid: at most {self.error:.2%}" if self.error else ""
        return [f"trained integers: {self.kept} of {self.channels} weight channels{snapped}"]
