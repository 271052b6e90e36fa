"""migrate-scales: move the spread between channels from what LayerNormalization gives into the weights that read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.state import CompileState, Phase
from qcompiler_passes.balance import balance

_SOURCES = frozenset({"LayerNormalization"})


@dataclass(frozen=True)
class MigrateScales:
    """SmoothQuant (Xiao et al. 2022, arXiv 2211.10438).

    A few channels of a transformer's activations are far larger than the others. Each is divided by
    `max|x|**alpha / max|w|**(1 - alpha)` in the scale and bias of the LayerNormalization that makes it, and multiplied by it in
    the weights of all that read it. Activations are measured on `samples` calibration samples.
    """

    alpha: float = 0.5
    samples: int = 16

    name: ClassVar[str] = "migrate-scales"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of groups of tensors whose channels changed."""
        return balance(state, _SOURCES, self.samples, self.alpha, 1 - self.alpha) if state.phase < Phase.FUSED else 0
