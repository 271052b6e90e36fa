"""An example plug-in: one pass, one collector, one operator row, one target and one pipeline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from qcompiler_passes import DEFAULT_PIPELINE
from qcompiler_passes.targets import ORT_CPU

from qcompiler import UserError, ir
from qcompiler.collectors import MinMax
from qcompiler.ir import Node
from qcompiler.ops import Lowering, OpRule, Result, Role
from qcompiler.plugin import Plugin
from qcompiler.quant import QuantParams, QuantSpec, params_from_range
from qcompiler.rewrite import Refusal, Rewriter, apply_rules
from qcompiler.state import CompileState, Phase


@dataclass(frozen=True)
class PruneWeights:
    """Set weights of Conv and Gemm to zero that are small beside the largest one. `share`: how small."""

    share: float = 0.01

    name: ClassVar[str] = "prune-weights"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of weights that changed. Raises UserError for a share that is none."""
        if not 0 <= self.share < 1:
            raise UserError(f"share must be at least 0 and less than 1, not {self.share:g}", self.name)
        return apply_rules(Rewriter(state), {"Conv": self._prune, "Gemm": self._prune})

    def _prune(self, rewriter: Rewriter, node: Node) -> Refusal | None:
        weight = ir.value(node.inputs[1])
        if weight is None or weight.dtype != np.float32 or not weight.size:
            return Refusal("the weight is not a float constant", node.inputs[1].name)
        small = (np.abs(weight) < self.share * np.abs(weight).max()) & (weight != 0)
        if not small.any():
            return Refusal("no weight is small", node.inputs[1].name)
        pruned = rewriter.constant(f"{node.inputs[1].name}_pruned", np.where(small, np.float32(0), weight))
        rewriter.set_input(node, 1, pruned)
        return None


class PowerOfTwo(MinMax):
    """The least power of two that covers all values, on both sides of zero if there are negative ones."""

    def finish(self, spec: QuantSpec) -> QuantParams:
        """Choose the range. Raises ValueError if nothing was observed."""
        super().finish(spec)
        limit = 2.0 ** np.ceil(np.log2(max(abs(self.low), abs(self.high), 2.0**-60)))
        return params_from_range(-limit if self.low < 0 else 0.0, limit, spec)


EXAMPLE_NPU = replace(
    ORT_CPU,
    name="example-npu",
    description="as ort-cpu, without averages",
    stays_float={**ORT_CPU.stays_float, "GlobalAveragePool": "the NPU has no unit for averages"},
)

PLUGIN = Plugin(
    "example",
    passes=(PruneWeights,),
    collectors={"power-of-two": PowerOfTwo},
    ops=(OpRule("Asinh", (Role.ACT,), Result.OWN, Lowering.TABLE),),
    targets=(EXAMPLE_NPU,),
    pipelines={"pruned": DEFAULT_PIPELINE.replace("form-blocks", "prune-weights,form-blocks")},
)
