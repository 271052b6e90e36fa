"""account: note what the float model costs, and choose the rewrites for the target by what the model will cost with them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from qcompiler.concrete_shapes import concrete_shapes
from qcompiler.state import CompileState, Phase
from qcompiler.work import Accountant
from qcompiler_passes.annotate import Annotate
from qcompiler_passes.expand_activations import ExpandActivations
from qcompiler_passes.expand_operators import ExpandOperators
from qcompiler_passes.fold_width import FoldWidth
from qcompiler_passes.form_blocks import FormBlocks
from qcompiler_passes.pad_channels import PadChannels
from qcompiler_passes.place import Place, costs_of
from qcompiler_passes.split_groups import SplitGroups

CHOICES: tuple[tuple[str, ...], ...] = (
    ("fold-width", "pad-channels"),
    ("fold-width",),
    (),
    ("fold-width", "pad-channels", "expand-activations"),
)
"""What may be left out. These rewrites speed integers up on one thread, but slow down what `place` then keeps in float."""

MARGIN = 0.995
"""A rewrite must save this much of the predicted time."""


@dataclass(frozen=True)
class Account:
    """Note the work of the float model, which `place` compares with, and the passes to skip because the model, placed, is
    predicted to be as fast without them. The graph does not change.

    `objective`, `profile`: those of `place`. Without a cost table nothing is skipped.
    """

    objective: str = "latency"
    profile: str = ""

    name: ClassVar[str] = "account"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return 0. Raises UserError for a profile that cannot be read."""
        if state.phase is not Phase.FLOAT or state.float_work:
            return 0
        shapes = concrete_shapes(state)
        if shapes is None:
            return 0
        twin = _twin(state)
        FormBlocks().run(twin)
        accountant = Accountant(twin, shapes)
        state.float_work = (*accountant.total(()), *accountant.written_out())
        if self.objective == "latency":
            self._choose(state)
        return 0

    def _choose(self, state: CompileState) -> None:
        best, tried = (math.inf, math.inf), set()
        for skip in CHOICES:
            twin, used = _twin(state), []
            for rewrite in (ExpandOperators(), ExpandActivations(), SplitGroups(), PadChannels(), FoldWidth()):
                if rewrite.name not in skip and rewrite.run(twin):
                    used.append(rewrite.name)
            if tuple(used) in tried:
                continue
            tried.add(tuple(used))
            for stage in (FormBlocks(), Annotate(), Place(self.objective, self.profile)):
                stage.run(twin)
            costs = costs_of(twin, self.profile)
            if costs is not None and costs.rank() < (best[0], MARGIN * best[1]):
                best, state.skip = costs.rank(), skip


def _twin(state: CompileState) -> CompileState:
    """A copy on which passes can be tried."""
    twin = state.clone()
    twin.rewrite_limit, twin.skip = None, ()
    return twin
