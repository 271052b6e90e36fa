"""Comparison of a compiled model with its float model, layer by layer.

The metadata of a compiled model say which float tensor each integer activation stands for. Between two such tensors lies a
layer. Its *accumulated* error is what differs when both models run as they are; its *local* error what differs when the layer
alone is given the float model's tensors, quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from qcompiler import runtime
from qcompiler.cut import Cut, Local, metadata
from qcompiler.difference import Difference, Error, OutputDifference, OutputError
from qcompiler.errors import UserError
from qcompiler.job import prepare
from qcompiler.load import read_model
from qcompiler.plan import CompileOptions
from qcompiler.profile import Profile, profile
from qcompiler.report import HEAVY
from qcompiler.state import Feeds


@dataclass(frozen=True)
class LayerError:
    """One layer of the compiled model. `layers`: the float layers that became it; `layer`, `op`: the main one of them.

    `tensor`: the float tensor that is compared. `kernels`: the operators that compute it. Milliseconds: None if ONNX Runtime
    fused the layer into another one, whose time then holds that of both.
    """

    layer: str
    op: str
    layers: tuple[str, ...]
    tensor: str
    kernels: tuple[str, ...]
    accumulated: Error
    local: Error
    float_ms: float | None = None
    int8_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """All layers in the order of the compiled model. `skipped`: integer tensors that are not compared, and why.

    `float_ms`, `int8_ms`: milliseconds in the operators of one inference; None if latency was not asked for.
    """

    samples: int
    layers: list[LayerError]
    outputs: list[OutputError]
    skipped: dict[str, str]
    float_ms: float | None = None
    int8_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def ranked(self, by: str) -> list[LayerError]:
        """The layers, worst first, by `accumulated` or `local` error, or by the milliseconds that int8 adds (`latency`)."""
        if by == "latency":
            return sorted(self.layers, key=lambda row: (row.float_ms or 0) - (row.int8_ms or 0))
        return sorted(self.layers, key=lambda row: _rank(getattr(row, by)))


def _rank(error: Error) -> float:
    return float("inf") if error.sqnr is None else error.sqnr


def load_compiled(path: Path) -> onnx.ModelProto:
    """Read a model that qcompiler wrote. Raises UserError if it cannot be read or lacks the metadata."""
    model = read_model(path)
    for key in ("provenance", "tensors", "counterparts"):
        metadata(model, key, str(path))
    return model


def compare(
    float_model: onnx.ModelProto, compiled: onnx.ModelProto, samples: Iterable[Feeds], seconds: float = 0
) -> Comparison:
    """Compare a compiled model with the float model that it was made from, on samples that come by one at a time.

    seconds: for how long to measure latency. All activations of one sample are held at once, of both models.
    Raises UserError if one model was not made from the other, RuntimeError if one does not run.
    """
    if [o.name for o in float_model.graph.output] != [o.name for o in compiled.graph.output]:
        raise UserError("it was not made from this float model: their outputs differ", "model")
    cut = Cut(float_model, compiled)
    float_runner = _with_outputs(float_model, cut.sources)
    runner = _with_outputs(compiled, cut.tensors)
    outputs = [OutputDifference(o.name) for o in float_model.graph.output]
    local: Local | None = None
    accumulated: dict[str, Difference] = {}
    first: Feeds | None = None
    count = 0
    for feeds in samples:
        count += 1
        wanted, given = _run(float_runner, feeds), _run(runner, feeds)
        if local is None:
            first = feeds
            cut.match(wanted, given)
            local = Local(compiled, cut, given)
            accumulated = {name: Difference() for name in cut.rows()}
        for output in outputs:
            output.add(wanted[output.name], given[output.name])
        expected = {name: cut.expected(name, wanted, given) for name in cut.source}
        for name, total in accumulated.items():
            total.add(cut.within(name, expected[name]), local.real(name, given[name]))
        local.add(feeds, expected)
    if local is None or first is None:
        raise UserError("there are no samples", "calibration data")
    profiles = profile([float_model, compiled], first, seconds) if seconds else None
    layers = list(_layers(float_model, cut, accumulated, local, profiles))
    totals = [round(p.total, 4) for p in profiles] if profiles else [None, None]
    return Comparison(count, layers, [o.error() for o in outputs], cut.skipped, *totals)


def _with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> runtime.Session:
    """A session that also returns these tensors."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    present = {v.name for v in (*model.graph.output, *model.graph.input)}
    copy.graph.output.extend(onnx.ValueInfoProto(name=n) for n in dict.fromkeys(names) if n not in present)
    return runtime.session(copy)


def _run(runner: runtime.Session, feeds: Feeds) -> dict[str, Any]:
    """All outputs by name, and the inputs."""
    names = [o.name for o in runner.get_outputs()]
    return {**feeds, **dict(zip(names, runtime.run(runner, feeds), strict=True))}


def _layers(
    float_model: onnx.ModelProto,
    cut: Cut,
    accumulated: dict[str, Difference],
    local: Local,
    profiles: Sequence[Profile] | None,
) -> Iterator[LayerError]:
    names, operators = _names(float_model)
    float_ms: dict[str, float] = {}
    for i, milliseconds in profiles[0].nodes.items() if profiles else ():
        name = names[i]
        float_ms[name] = float_ms.get(name, 0) + milliseconds
    int8_ms = dict(profiles[1].nodes) if profiles else {}
    for tensor, total in accumulated.items():
        nodes = cut.layer(tensor)
        kernels = [i for i in nodes if cut.nodes[i].op_type not in _CONVERSIONS]
        layers = cut.layers(kernels)
        main = next((name for name in layers if operators.get(name) in HEAVY), layers[0] if layers else None)
        yield LayerError(
            layer=main or cut.source[tensor],
            op=operators.get(main, "") if main else "quantize",
            layers=layers,
            tensor=cut.source[tensor],
            kernels=tuple(cut.nodes[i].op_type for i in kernels or nodes),
            accumulated=total.error(),
            local=local.totals[tensor].error(),
            float_ms=_take(float_ms, layers),
            int8_ms=_take(int8_ms, nodes),
        )


_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")


def _take(milliseconds: dict[Any, float], keys: Iterable[Any]) -> float | None:
    """The sum of what the first layer to ask for it gets; None if there is nothing."""
    found = [milliseconds.pop(key) for key in keys if key in milliseconds]
    return round(sum(found), 5) if found else None


def _names(float_model: onnx.ModelProto) -> tuple[list[str], dict[str, str]]:
    """The layer that each node of the float model is called in provenance, and the operators by that name.

    Nodes without a name of their own get one when they are normalized.
    """
    job = prepare(float_model, None, CompileOptions(passes="normalize"))
    job.pipeline.run(job.state)
    maker = {t.name: n for n in job.state.graph.nodes for t in n.outputs}
    named = [next((maker[t].name for t in n.output if t in maker), n.name) for n in float_model.graph.node]
    return named, {n.name: n.op for n in job.state.graph.nodes}
