"""Why passes left nodes as they were: what `--why` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from qcompiler import ir
from qcompiler.instrument import Watcher
from qcompiler.ops import op_key
from qcompiler.pipeline import Pass
from qcompiler.state import CompileState, Phase, Refusal


@dataclass(frozen=True)
class Refused:
    """A node that a pass looked at and left. `output`: its first output; `culprit`: what was in the way, "" for no match."""

    node: str
    op: str
    output: str
    reason: str
    culprit: str

    @property
    def blame(self) -> str:
        """The culprit in brackets, unless that is the node itself, or the reason names it."""
        return (
            f" ({self.culprit})"
            if self.culprit not in ("", self.node) and repr(self.culprit) not in self.reason
            else ""
        )


@dataclass
class Refusals(Watcher):
    """Keeps why the passes of these names left nodes as they were; `found` has a list for each run of such a pass."""

    passes: Collection[str]
    found: list[tuple[str, list[Refused]]] = field(default_factory=list)

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        """Keep the refusals of nodes that are still there; the choice of blocks counts as a refusal of the others."""
        if stage.name not in self.passes:
            return
        reasons = dict(state.refusals)
        if stage.establishes is Phase.ANNOTATED:
            reasons |= {b.root: Refusal(b.reason, b.root) for b in state.blocks.values() if not b.quantized}
        nodes = [n for graph in ir.all_graphs(state.graph) for n in graph.nodes if n.name in reasons]
        self.found.append((stage.name, [_refused(node, reasons[node.name]) for node in nodes]))

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data, ready for JSON."""
        return [{"pass": name, "refused": [asdict(r) for r in refused]} for name, refused in self.found]

    def lines(self, verbose: bool = False) -> Iterator[str]:
        """The text of `--why`: nodes that something was in the way of, then, by reason, those that matched nothing.

        `verbose` lists the latter one by one, too.
        """
        for name in [name for name in self.passes if name not in dict(self.found)]:
            yield f"{name}: did not run"
        told: dict[str, list[Refused]] = {}
        for name, refused in self.found:
            if refused and told.get(name) == refused:
                yield f"{name}: left the same {len(refused)} nodes again"
                continue
            told[name] = refused
            yield f"{name}: left {len(refused)} nodes as they were"
            single = [r for r in refused if r.culprit or verbose]
            yield from (f"  {r.node}  {r.op}: {r.reason}{r.blame}" for r in single)
            grouped = Counter((r.op, r.reason) for r in refused if not r.culprit and not verbose)
            yield from (f"  {count} x {op}: {reason}" for (op, reason), count in grouped.most_common())


def _refused(node: ir.Node, refusal: Refusal) -> Refused:
    output = node.outputs[0].name if node.outputs else ""
    return Refused(node.name, op_key(node.op, node.domain), output, refusal.reason, refusal.culprit)
