"""migrate-scales: move the spread between channels from what LayerNormalization gives into the weights that read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.state import CompileState, Phase
from qcompiler_passes.balance import balance

_SOURCES = frozenset({"LayerNormalization"})


@dataclass(frozen=True)
class MigrateScales:
    """SmoothQuant (Xiao et al. 2022, arXiv 2211.10438), for weights with a scale per channel.

    A few channels of a transformer's activations are far larger than the others. Each is divided by
    `max|x|**alpha / max|w|**beta` in the scale and bias of the LayerNormalization that makes it, and multiplied by that in the
    weights of all that read it, wherever this lowers the estimated noise. The paper's beta is 1 - alpha; with a weight scale per
    output channel, 0 measured better. Activations are measured on `samples` calibration samples.
    """

    alpha: float = 0.5
    beta: float = 0.0
    samples: int = 16

    name: ClassVar[str] = "migrate-scales"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of groups of tensors whose channels changed."""
        return balance(state, _SOURCES, self.samples, self.alpha, self.beta) if state.phase < Phase.FUSED else 0
