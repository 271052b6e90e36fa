"""What the user learns about a compilation, as data and as a short summary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from glob import escape
from typing import Any

from qcompiler.instrument import PassTime
from qcompiler.state import CompileState, Phase

MAX_GROUPS = 8
"""How many reasons the summary shows; `-v` shows all."""

HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""The operators that take the time; what became of them comes first."""

_UNDECIDED = ("float", "fused")
"""The phases in which nothing is known about the layers."""

CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")
"""What a float model has at integer inputs and outputs: no layers."""


@dataclass(frozen=True)
class Layer:
    """One block of the float model; `reason` says why it stays float, or how else than by constant scales it is quantized."""

    name: str
    op: str
    quantized: bool
    reason: str = ""


@dataclass(frozen=True)
class OutputMatch:
    """How near an output comes to the float model's: SQNR in dB (None if exact, or not float), the share of equal elements, and
    how many values are not finite where the float model's are.
    """

    name: str
    sqnr: float | None
    equal: float
    not_finite: int = 0


@dataclass(frozen=True)
class Speed:
    """Median milliseconds of one inference, both models in one process, in turns."""

    float_ms: float
    int8_ms: float


@dataclass(frozen=True)
class Score:
    """What a metric says of both models, the higher the better. `unit`: `%` or nothing; `samples`: 0 if it does not say."""

    name: str
    unit: str
    samples: int
    before: float
    after: float

    def __str__(self) -> str:
        before, after = (f"{value:.2f} %" if self.unit else f"{value:.5g}" for value in (self.before, self.after))
        return f"{before} -> {after}" + (f" ({self.samples} samples)" if self.samples else "")


@dataclass(frozen=True)
class Figures:
    """What a model achieves: the SQNR of its worst output in dB (None if exact), and what a metric loses."""

    sqnr: float | None
    drop: float | None = None

    def __str__(self) -> str:
        near = "exact" if self.sqnr is None else f"{self.sqnr:.1f} dB"
        return near if self.drop is None else f"{near}, {self.drop:.2f} % lost"


@dataclass(frozen=True)
class Reached:
    """How a goal was reached. `kept`: the layers in float, of `layers` that could be quantized; `without`: the figures with
    all of them quantized; `figures`: with these in float; `trials`: how often the model was compiled to find them.
    """

    goal: str
    kept: tuple[str, ...]
    layers: int
    without: Figures
    figures: Figures
    trials: int

    @property
    def reasons(self) -> dict[str, str]:
        """Pattern of a layer's name -> why it stays float."""
        return {escape(name): f"kept in float to {self.goal}" for name in self.kept}

    def __str__(self) -> str:
        if not self.kept:
            return f"{self.goal}: {self.figures} with no layer kept in float"
        names = ", ".join(self.kept[:MAX_GROUPS]) + (", ..." if len(self.kept) > MAX_GROUPS else "")
        share = f"{len(self.kept)} of {self.layers} layers kept in float"
        return f"{self.goal}: {self.figures} with {share}, {self.without} with none: {names}"


@dataclass
class Report:
    """The facts of one compilation. `emit`: the phase that was reached. `kernels`: operators that ONNX Runtime really runs.

    `warnings`: why the compiled model should not be used as it is. `original`: what the compiled model is compared with.
    `predicted`: seconds of one inference, in float and as compiled, by the cost table. `samples`, `held_back`: how many
    calibrated, and how many were compared; `bytes`: size of the original and the compiled model.
    """

    source: str
    path: str | None
    target: str
    emit: str
    pipeline: str
    layers: list[Layer]
    bytes: tuple[int, int]
    original: str = "float"
    samples: int = 0
    held_back: int = 0
    outputs: list[OutputMatch] = field(default_factory=list)
    speed: Speed | None = None
    predicted: tuple[float, float] | None = None
    kernels: dict[str, int] = field(default_factory=dict)
    score: Score | None = None
    reached: Reached | None = None
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    passes: list[PassTime] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**asdict(self), "quantized": sum(layer.quantized for layer in self.layers)}

    def rows(self, verbose: bool = False) -> Iterator[tuple[str, str]]:
        """The summary, as (what, value); `verbose` lists every layer and kernel."""
        yield self.path or "compiled model", f"{self.emit} for {self.target}"
        for warning in self.warnings if verbose else self.warnings[:MAX_GROUPS]:
            yield "WARNING", warning
        if self.layers or self.emit in _UNDECIDED:
            yield from _quantized(self.layers)
        else:
            yield "quantized", "nothing: there is no layer to quantize"
        yield from _in_float(self.layers, verbose)
        if self.outputs:
            held = f"{self.held_back} held-back samples" if self.held_back > 1 else "1 sample"
            nearest = self.outputs if verbose else sorted(self.outputs, key=_badness)[:3]
            worst = ", ".join(f"{_match(o)} {o.name}" for o in nearest)
            basis = f"{held}; {self.samples} calibrated" if self.samples else "random inputs, for there is no data"
            yield "accuracy", f"{worst} (SQNR, {basis})"
        if self.score:
            yield self.score.name, str(self.score)
        if self.reached:
            yield "goal", str(self.reached)
        before, after = self.bytes
        yield "size", f"{_bytes(before)} -> {_bytes(after)} ({_ratio(before, after, 'smaller', 'larger')})"
        if self.speed:
            a, b = self.speed.float_ms, self.speed.int8_ms
            versus = f"than {self.original}"
            if self.predicted and self.original == "float":
                versus += f"; {_ratio(*self.predicted, 'faster', 'slower')} predicted"
            yield "speed", f"{a:.3g} ms -> {b:.3g} ms ({_ratio(a, b, 'faster', 'slower')} {versus})"
        if self.kernels:
            names = [f"{op.removeprefix('com.microsoft.')} {n}" for op, n in self.kernels.items()]
            yield "kernels", ", ".join(names if verbose or len(names) <= MAX_GROUPS else [*names[:MAX_GROUPS], "..."])
        for note in self.notes if verbose else self.notes[:MAX_GROUPS]:
            yield "note", note


def layers_of(state: CompileState, operators: dict[str, str]) -> list[Layer]:
    """The blocks as layers, if it is decided what becomes of them; `operators` gives the types of the roots to report."""
    if state.phase < Phase.ANNOTATED:
        return []
    blocks = [b for b in state.blocks.values() if operators.get(b.root, "") not in ("", *CONVERSIONS)]
    return [Layer(b.root, operators[b.root], b.quantized, b.reason) for b in blocks]


def _quantized(layers: list[Layer]) -> Iterator[tuple[str, str]]:
    total = Counter(layer.op for layer in layers)
    ways = dict.fromkeys(layer.reason for layer in layers if layer.quantized)
    for way in ways:
        done = Counter(layer.op for layer in layers if layer.quantized and layer.reason == way)
        order = sorted(done.most_common(), key=lambda item: item[0] not in HEAVY)
        yield way or "quantized", ", ".join(f"{op} {n}/{total[op]}" for op, n in order)
    if not ways:
        yield "quantized", "nothing: the model stays float" if layers else "nothing yet: the pipeline stops before"


def _in_float(layers: list[Layer], verbose: bool) -> Iterator[tuple[str, str]]:
    left = [layer for layer in layers if not layer.quantized]
    if verbose:
        yield from (("in float", f"{layer.op} {layer.name}: {layer.reason}") for layer in left)
        return
    counts = Counter((layer.op, generic(layer.reason)) for layer in left).most_common()
    groups = sorted(counts, key=lambda group: group[0][0] not in HEAVY)
    for (op, reason), count in groups[:MAX_GROUPS]:
        yield "in float", f"{count} x {op}: {reason}"
    if len(groups) > MAX_GROUPS:
        rest = sum(count for _, count in groups[MAX_GROUPS:])
        yield "in float", f"{rest} more, for {len(groups) - MAX_GROUPS} other reasons (-v lists all)"


def generic(reason: str) -> str:
    """A reason without the names that it quotes and the times that it compares, so that like reasons fall together."""
    reason = re.sub(r": \S+ ms against \S+ ms$", "", reason)
    parts = reason.split("'")
    return "".join(parts[::2]).replace("  ", " ") if len(parts) % 2 else reason


def _badness(output: OutputMatch) -> float:
    return output.sqnr if output.sqnr is not None else 1e3 * output.equal


def _match(output: OutputMatch) -> str:
    if output.sqnr is not None:
        return f"{output.sqnr:.1f} dB"
    return "exact" if output.equal == 1 else f"{output.equal:.1%} equal"


def _ratio(before: float, after: float, better: str, worse: str) -> str:
    factor = before / after if after else 1.0
    return f"{factor:.2f}x {better}" if factor >= 1 else f"{1 / factor:.2f}x {worse}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
