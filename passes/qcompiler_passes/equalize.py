"""equalize: let the channels of each tensor use the same share of the range that they have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.state import CompileState, Phase
from qcompiler_passes.balance import balance

_SOURCES = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True)
class Equalize:
    """Cross-layer equalization (after Nagel et al. 2019, arXiv 1906.04721, section 4.1).

    A channel is multiplied by a factor in the weights that make it and divided by it in those that read it, through whatever
    lies between and is homogeneous: Relu, pooling, residual connections, concatenation, reshaping. Two things differ from the
    paper. Factors come from what channels hold in `samples` calibration samples, as `1 / reach**alpha`, because weights have a
    scale per channel anyway, while an activation has one for all its channels. And groups of tensors that share factors keep
    them only if that lowers the estimated noise in the results of their readers, that of their weights included.
    """

    alpha: float = 0.5
    samples: int = 32

    name: ClassVar[str] = "equalize"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of groups of tensors whose channels changed."""
        return balance(state, _SOURCES, self.samples, self.alpha, 0.0) if state.phase < Phase.FUSED else 0
