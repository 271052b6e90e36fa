"""power-of-two-factors: finer steps for the quiet channels of what LayerNorm reads, at the price of a shift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir, quant
from qcompiler.ir import Tensor
from qcompiler.ops import Lowering, rule_of
from qcompiler.quant import QuantParams
from qcompiler.runtime import Session, run, session
from qcompiler.state import CompileState, Feeds, Phase


@dataclass(frozen=True)
class PowerOfTwoFactors:
    """Power-of-Two Factors after FQ-ViT (Lin et al. 2022, arXiv 2111.13824, section 3.2).

    Channels of a residual stream differ by orders of magnitude. Where only LayerNorm and the residual Add read a tensor, its
    channels share one scale and zero point, but channel c has steps of 2**alpha times the scale. The widest steps, with alpha =
    `largest`, cover the range from the least to the greatest value; each channel gets the alpha with the least squared error
    on at most `samples` calibration samples. `largest=0` changes nothing, and so do targets that leave LayerNorm in float.
    """

    largest: int = 3
    samples: int = 32

    name: ClassVar[str] = "power-of-two-factors"
    requires: ClassVar[Phase] = Phase.CALIBRATED
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of tensors that got factors."""
        if not self.largest or state.phase >= Phase.QDQ or state.calibration is None or state.imported:
            return 0
        tensors = [t for t in ir.tensors(state.graph) if _takes_factors(state, t)][: state.rewrite_limit]
        if not tensors:
            return 0
        samples = [feeds for _, feeds in zip(range(self.samples), state.calibration, strict=False)]
        graph = state.graph.copy()
        known = {t.name: t for t in ir.tensors(graph)}
        graph.outputs = [known[t.name] for t in tensors]
        ir.drop_dead_nodes(graph)
        runner = session(ir.to_proto(graph), low_memory=True, consume=True)
        params = _widest(state, tensors, runner, samples, self.largest)
        errors = _errors(params, runner, samples, self.largest)
        for tensor, found, error in zip(tensors, params, errors, strict=True):
            exponents = tuple(int(alpha) for alpha in error.argmin(axis=0))
            state.params[tensor.name] = replace(found, exponents=exponents)
        return len(tensors)


def _takes_factors(state: CompileState, tensor: Tensor) -> bool:
    """Whether LayerNorm reads a tensor, and nothing but LayerNorm and sums read it."""
    params = state.params.get(tensor.name)
    tied = tensor.name in state.ties or tensor.name in state.ties.values()
    if params is None or params.exponents or tied or ir.is_constant(tensor):
        return False
    lowerings = []
    for node in tensor.outputs:
        block, rule = state.blocks.get(node.name), rule_of(state.ops, node)
        if block is None or rule is None:
            return False
        if block.quantized:
            lowerings.append(rule.lowering)
            if rule.lowering is Lowering.ADD and not _plain_sum(state, node):
                return False
    maker = ir.producer(tensor)
    made = None if maker is None else state.blocks.get(maker.name)
    if maker is not None and (
        made is None or (made.quantized and not (_is_norm(state, maker) or _plain_sum(state, maker)))
    ):
        return False
    return Lowering.NORM in lowerings and set(lowerings) <= {Lowering.NORM, Lowering.ADD}


def _is_norm(state: CompileState, node: ir.Node) -> bool:
    rule = rule_of(state.ops, node)
    return rule is not None and rule.lowering is Lowering.NORM


def _plain_sum(state: CompileState, node: ir.Node) -> bool:
    """Whether a node is an Add alone in its block: an absorbed activation has bounds for all channels alike."""
    rule, block = rule_of(state.ops, node), state.blocks[node.name]
    return rule is not None and rule.lowering is Lowering.ADD and block.nodes == (node.name,)


def _widest(
    state: CompileState, tensors: Sequence[Tensor], runner: Session, samples: Sequence[Feeds], largest: int
) -> list[QuantParams]:
    """Per tensor, the params whose range is that of the values when the scale is multiplied by 2**largest."""
    low, high = np.full(len(tensors), np.inf), np.full(len(tensors), -np.inf)
    for sample in samples:
        values = run(runner, sample)
        low = np.minimum(low, [v.min() for v in values])
        high = np.maximum(high, [v.max() for v in values])
    found = []
    for tensor, least, greatest in zip(tensors, low, high, strict=True):
        params = quant.params_from_range(float(least), float(greatest), state.params[tensor.name].spec)
        found.append(params.with_scale(params.scale * np.float32(2.0**-largest)))
    return found


def _errors(
    params: Sequence[QuantParams], runner: Session, samples: Sequence[Feeds], largest: int
) -> list[NDArray[Any]]:
    """Per tensor, the sums of squared errors: shape (largest + 1, channels)."""
    sums: list[Any] = [0.0] * len(params)
    for sample in samples:
        for i, (values, p) in enumerate(zip(run(runner, sample), params, strict=True)):
            rows = values.reshape(-1, values.shape[-1])
            errors = []
            for alpha in range(largest + 1):
                scaled = p.with_scale(p.scale * np.float32(2**alpha))
                rounded = quant.dequantize(quant.quantize(rows, scaled), scaled)
                errors.append(np.square(rows - rounded, dtype=np.float64).sum(axis=0))
            sums[i] = sums[i] + np.stack(errors)
    return sums
