"""The story of a float layer: which passes touched it, what it was quantized to, and which kernels do its work."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qcompiler import functions, ir
from qcompiler.errors import UserError
from qcompiler.instrument import Watcher
from qcompiler.job import prepare
from qcompiler.ops import Role, op_key, rule_of
from qcompiler.pipeline import Pass
from qcompiler.plan import CompileOptions
from qcompiler.state import Block, CompileState, Phase
from qcompiler.text import format_graph


@dataclass(frozen=True)
class NodeView:
    """A node as it stood after a pass: its line in the text form, and the float layers that it does the work of."""

    name: str
    op: str
    text: str
    outputs: tuple[str, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """What a pass did to the nodes of a layer. `refused`: why it left a node, and which; `joined`: layers that came to it."""

    stage: str
    removed: tuple[NodeView, ...]
    added: tuple[NodeView, ...]
    refused: tuple[str, ...]
    joined: tuple[str, ...]

    def lines(self, verbose: bool) -> Iterator[str]:
        """The step in short, or with the text of the nodes."""
        before, after = _ops(self.removed), _ops(self.added)
        change = (
            f"{before or 'nothing'} -> {after or 'nothing'}" if before != after else f"{after} changes" if after else ""
        )
        joined = f", together with {', '.join(self.joined)}" if self.joined else ""
        yield f"  {self.stage:<18}  {change}{joined}".rstrip()
        if verbose:
            yield from (f"    - {view.text}" for view in self.removed)
            yield from (f"    + {view.text}" for view in self.added)
        yield from (f"    left {line}" for line in self.refused)


@dataclass(frozen=True)
class TensorFacts:
    """What a tensor was quantized to. `scale`: least and greatest of `channels` scales. `shared`: whose params it has, or ""."""

    name: str
    role: str
    dtype: str
    scale: tuple[float, float] | None = None
    channels: int = 1
    zero_point: int | None = None
    shared: str = ""


@dataclass(frozen=True)
class BlockFacts:
    """A block of the layer: its nodes, root first, whether it is integer or why not, and its tensors."""

    nodes: tuple[str, ...]
    quantized: bool
    reason: str
    bounds: tuple[float, float]
    tensors: tuple[TensorFacts, ...]


@dataclass(frozen=True)
class Multiplier:
    """Least and greatest of the integers m of a node that multiplies by `m * 2**-shift`."""

    node: str
    op: str
    low: int
    high: int
    shift: int | None


@dataclass(frozen=True)
class Story:
    """All that happened to one float layer. `nodes`: what does its work in the end; none if nothing has to."""

    layer: str
    op: str
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]
    blocks: tuple[BlockFacts, ...]
    multipliers: tuple[Multiplier, ...]
    nodes: tuple[NodeView, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; an absent bound is null."""
        facts = asdict(self)
        for block in facts["blocks"]:
            block["bounds"] = [edge if np.isfinite(edge) else None for edge in block["bounds"]]
        return facts

    def lines(self, verbose: bool = False) -> Iterator[str]:
        """The story as text; `verbose` shows the nodes before and after each pass."""
        yield f"{self.layer}  {self.op} -> {', '.join(self.outputs)}"
        for step in self.steps:
            yield from step.lines(verbose)
        for block in self.blocks:
            yield from _block_lines(block)
        for m in self.multipliers:
            values = f"{m.low}" if m.low == m.high else f"{m.low} .. {m.high}"
            yield f"  {'multiplier':<10}  {values}{'' if m.shift is None else f' * 2**-{m.shift}'}  {m.op} {m.node}"
        for node in self.nodes:
            others = [layer for layer in node.layers if layer != self.layer]
            also = f", which also does {', '.join(others)}" if others else ""
            yield f"  {'becomes':<10}  {node.op} {node.name}{also}"
        if not self.nodes:
            yield f"  {'becomes':<10}  nothing: no node has to do its work"


def explain(model: str | Path | onnx.ModelProto, pattern: str, calib: Any, options: CompileOptions) -> list[Story]:
    """Compile and tell what happened to the layers that `pattern` matches: a node's name, a pattern of names, or a tensor.

    Without calibration data the story ends at the choice of what is quantized. Raises UserError if no layer matches.
    """
    job = prepare(model, calib, options)
    history = History(pattern)
    job.pipeline.run(job.state, [*job.guards, history])
    return [history.story(layer) for layer in history.layers]


@dataclass
class History(Watcher):
    """Records what becomes of the layers that a pattern matches."""

    pattern: str
    layers: dict[str, NodeView] = field(default_factory=dict)
    _stages: list[str] = field(default_factory=list)
    _views: list[list[NodeView]] = field(default_factory=list)
    _refusals: list[dict[str, str]] = field(default_factory=list)
    _blocks: list[BlockFacts] = field(default_factory=list)
    _members: dict[str, set[str]] = field(default_factory=dict)
    _multipliers: dict[str, tuple[Multiplier, tuple[str, ...]]] = field(default_factory=dict)

    def before(self, stage: Pass, state: CompileState) -> None:
        """Look at the model as it was loaded."""
        if not self._views:
            self._views.append(_views(state))

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        """Look at the nodes, refusals and tables. Raises UserError after the first pass, which names nodes, if none matches."""
        views = _views(state)
        if not self.layers:
            own = {v.name: v for v in (*views, *self._views[0]) if v.layers == (v.name,) and v.name}
            self.layers = {name: own[name] for name in match(self.pattern, own)}
        self._stages.append(stage.name)
        self._views.append([v for v in views if not self.layers.keys().isdisjoint(v.layers)])
        late = state.phase >= Phase.QDQ  # then each refusal counts; before, most say that a rule is for other nodes
        refusals = {n: r.reason for n, r in state.refusals.items() if r.culprit and (late or r.culprit != n)}
        self._refusals.append(refusals)
        if Phase.ANNOTATED <= state.phase <= Phase.CALIBRATED:
            self._blocks = [_block_facts(state, block) for block in state.blocks.values()]
            self._members = {v.name: set(v.layers) for v in views}
        for node in state.graph.nodes:
            if node.domain == functions.DOMAIN and node.op in ("Requantize", "Rescale"):
                self._multipliers[node.name] = _multiplier(node), state.origin.get(node.name, ())

    def story(self, layer: str) -> Story:
        """What happened to one of the layers."""
        first = self.layers[layer]
        blocks = [b for b in self._blocks if any(layer in self._members.get(n, ()) for n in b.nodes)]
        factors = [m for m, layers in self._multipliers.values() if layer in layers]
        last = tuple(v for v in self._views[-1] if layer in v.layers)
        return Story(layer, first.op, first.outputs, tuple(self._steps(layer)), tuple(blocks), tuple(factors), last)

    def _steps(self, layer: str) -> Iterator[Step]:
        before = [v for v in self._views[0] if layer in v.layers] or [self.layers[layer]]
        for stage, views, refusals in zip(self._stages, self._views[1:], self._refusals, strict=True):
            after = [v for v in views if layer in v.layers]
            removed, added = _without(before, after), _without(after, before)
            refused = tuple(f"{v.name} {v.op}: {refusals[v.name]}" for v in after if v.name in refusals)
            joined = tuple(dict.fromkeys(n for v in after for n in v.layers if not any(n in b.layers for b in before)))
            if removed or added or refused or (joined and before):
                yield Step(stage, removed, added, refused, joined)
            before = after


def _without(views: Sequence[NodeView], others: Sequence[NodeView]) -> tuple[NodeView, ...]:
    known = {v.text for v in others}
    return tuple(v for v in views if v.text not in known)


def _ops(views: Sequence[NodeView]) -> str:
    return " + ".join(op if n == 1 else f"{n} x {op}" for op, n in Counter(v.op for v in views).items())


def match(pattern: str, layers: dict[str, NodeView]) -> list[str]:
    """The layers of that name; else those whose names fit the pattern; else those that make the tensor of that name.

    Raises UserError, with names that come near, if there are none.
    """
    if pattern in layers:
        return [pattern]
    found = [name for name, view in layers.items() if fnmatchcase(name, pattern) and view.op != "Constant"]
    found = found or [view.name for view in layers.values() if pattern in view.outputs]
    if found:
        return found
    names = list(dict.fromkeys(n for view in layers.values() for n in (view.name, *view.outputs)))
    near = [n for n in names if pattern.lower() in n.lower()] or difflib.get_close_matches(pattern, names, cutoff=0.4)
    hint = f"did you mean {', '.join(map(repr, near[:3]))}?" if near else f"the first of {len(layers)} is {names[0]!r}"
    raise UserError(f"no node or tensor is called {pattern!r}; {hint}", "NODE")


def _views(state: CompileState) -> list[NodeView]:
    return [
        NodeView(
            node.name,
            op_key(node.op, node.domain),
            line,
            tuple(t.name for t in node.outputs),
            state.origin.get(node.name, (node.name,)),
        )
        for graph in ir.all_graphs(state.graph)
        for node, line in zip(graph.nodes, format_graph(graph).splitlines()[1:-1], strict=True)
    ]


def _block_facts(state: CompileState, block: Block) -> BlockFacts:
    tensors: list[TensorFacts] = []
    root = next((n for n in state.graph.nodes if n.name == block.root), None)
    rule = None if root is None else rule_of(state.ops, root)
    if block.quantized and root is not None and rule is not None:
        for index, tensor in enumerate(root.inputs):
            if rule.role(index) in (Role.ACT, Role.WEIGHT) and not tensor.is_empty():
                tensors.append(_tensor_facts(state, tensor.name, rule.role(index).value))
        tensors += [_tensor_facts(state, name, "result") for name in block.outputs]
    return BlockFacts(block.nodes, block.quantized, block.reason, (block.low, block.high), tuple(tensors))


def _tensor_facts(state: CompileState, name: str, role: str) -> TensorFacts:
    leader = state.leader(name)
    shared = "" if leader == name else leader
    params = state.params.get(name, state.params.get(leader))
    if params is None:
        weight = role == Role.WEIGHT.value
        spec = state.target.weight if weight else state.specs.get(name)
        return TensorFacts(name, role, "float" if spec is None else spec.dtype, shared=shared)
    if params.spec.log2:
        return TensorFacts(name, role, f"{params.spec.dtype} log2", shared=shared)
    scale = float(params.scales.min()), float(params.scales.max())
    return TensorFacts(name, role, params.spec.dtype, scale, params.scales.size, params.zero_point, shared)


def _multiplier(node: ir.Node) -> Multiplier:
    at = 1 if node.op == "Requantize" else 2
    values = ir.array(node.inputs[at])
    shift = int(ir.array(node.inputs[2])) if node.op == "Requantize" else None
    return Multiplier(node.name, node.op, int(values.min()), int(values.max()), shift)


def _block_lines(block: BlockFacts) -> Iterator[str]:
    low, high = block.bounds
    clamp = f", clamped to {low:g} .. {high:g}" if np.isfinite(low) or np.isfinite(high) else ""
    what = block.reason or "integer" if block.quantized else f"float: {block.reason}"
    yield f"  {'block':<10}  {' + '.join(block.nodes)}{clamp}: {what}"
    yield from (f"  {t.role:<10}  {_describe(t)}" for t in block.tensors)


def _describe(tensor: TensorFacts) -> str:
    parts: Sequence[str] = [tensor.name, tensor.dtype]
    if tensor.scale is not None:
        low, high = tensor.scale
        scale = f"scale {low:.6g}" if low == high else f"scale {low:.6g} .. {high:.6g}"
        many = f" ({tensor.channels} channels)" if tensor.channels > 1 else ""
        parts = [*parts, f"{scale}{many}", f"zero point {tensor.zero_point}"]
    shared = f", shared with {tensor.shared}" if tensor.shared else ""
    return "  ".join(parts) + shared
