"""What a report tells of single layers: errors, histograms, weights and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.compare import Comparison, LayerError, compare
from qcompiler.compile import CompileResult
from qcompiler.errors import UserError
from qcompiler.observe import observe
from qcompiler.quant import QuantParams, dequantize
from qcompiler.recorder import Histogram, Recorder, Values
from qcompiler.report import HEAVY, Report
from qcompiler.split import Split
from qcompiler.state import CompileState, Feeds, Phase

PROFILE_SECONDS = 1.5
MAX_SAMPLES = 8
"""Held-back samples that histograms show."""

VALUES_PER_SAMPLE = 1024
MAX_SYMBOL = 3
"""Letters of a symbolic dimension that is worth showing; longer ones are made up by exporters."""


@dataclass(frozen=True)
class LayerRow:
    """One integer layer. `nodes`: what it was fused from; `params`: of its result, None if that is float.

    `bounds`: values beyond them may be clipped at no loss, because the layer or whatever reads it saturates there.
    """

    position: int
    name: str
    op: str
    nodes: tuple[str, ...]
    shape: str
    params: QuantParams | None
    bounds: tuple[float, float]
    histogram: Histogram | None
    error: LayerError | None
    kernels: tuple[str, ...]

    @property
    def clips(self) -> tuple[str, str]:
        """What becomes of values below and above the clip range: "" there are none, "cut" they are lost, "free" at no loss."""
        if self.histogram is None or self.params is None:
            return "", ""
        step = float(self.params.scale)
        (low, high), (least, greatest) = self.params.range, self.bounds
        below = "" if self.histogram.low >= low else "free" if low <= least + step else "cut"
        above = "" if self.histogram.high <= high else "free" if high >= greatest - step else "cut"
        return below, above


@dataclass(frozen=True)
class WeightRow:
    """The weights of one layer, quantized: scales, and the least and greatest real value of each channel."""

    layer: str
    shape: str
    scales: NDArray[np.float32]
    low: NDArray[np.float32]
    high: NDArray[np.float32]

    @property
    def spread(self) -> float:
        """The greatest scale over the least."""
        return float(self.scales.max() / self.scales.min())


@dataclass(frozen=True)
class SizeRow:
    """Bytes of constants of a layer in the float and in the compiled model."""

    layer: str
    before: int
    after: int


@dataclass(frozen=True)
class Facts:
    """What there is to know of the layers; `comparison` is None if nothing could be compared."""

    comparison: Comparison | None
    layers: list[LayerRow]
    weights: list[WeightRow]
    sizes: list[SizeRow]


def gather(result: CompileResult, recorder: Recorder) -> Facts:
    """Gather the facts of a compilation that `recorder` watched.

    Runs both models again, for errors, latency and histograms; adds a note to the report if the layers cannot be compared.
    Raises UserError if there were no passes to watch.
    """
    state, before, report = recorder.state, recorder.float_model, result.report
    if state is None or before is None:
        raise UserError("the pipeline has no passes, so there is nothing to tell", "report")
    samples = state.calibration.held_back if isinstance(state.calibration, Split) else []
    comparison = None
    if samples and state.phase >= Phase.QDQ and any(layer.quantized for layer in report.layers):
        try:
            comparison = compare(before, result.model, samples, PROFILE_SECONDS)
        except UserError as error:  # the rest is worth telling
            report.notes.append(f"the layers are not compared: {error.what}")
    return Facts(
        comparison,
        _layer_rows(report, recorder, state, comparison, _histograms(recorder, state, samples)),
        _weight_rows(state, report),
        _size_rows(before, result.model, state, report),
    )


def _histograms(recorder: Recorder, state: CompileState, samples: Sequence[Feeds]) -> dict[str, Histogram | None]:
    if recorder.calibrated is None or not samples:
        return {}
    outputs = [t for block in state.blocks.values() if block.quantized for t in block.outputs]
    found = observe(recorder.calibrated, outputs, samples[:MAX_SAMPLES], Values, sample_size=VALUES_PER_SAMPLE)
    return {name: values.histogram() for name, values in found.items() if isinstance(values, Values)}


def _layer_rows(
    report: Report,
    recorder: Recorder,
    state: CompileState,
    comparison: Comparison | None,
    histograms: dict[str, Histogram | None],
) -> list[LayerRow]:
    errors = _errors(report, recorder, state, comparison.layers if comparison else [])
    kernels = _kernels(state, report)
    rows: list[LayerRow] = []
    for layer in report.layers:
        if not layer.quantized:
            continue
        block = state.blocks[layer.name]
        error = errors.get(layer.name)
        tensor = error.tensor if error and error.tensor in block.outputs else block.outputs[0]
        rows.append(
            LayerRow(
                position=len(rows) + 1,
                name=layer.name,
                op=" + ".join(recorder.operators.get(n, layer.op) for n in block.nodes),
                nodes=block.nodes,
                shape=_dims(recorder.shapes.get(tensor)),
                params=state.params.get(tensor),
                bounds=(block.low, block.high),
                histogram=histograms.get(tensor),
                error=error,
                kernels=error.kernels if error else kernels.get(layer.name, ()),
            )
        )
    return rows


def _errors(
    report: Report, recorder: Recorder, state: CompileState, compared: Sequence[LayerError]
) -> dict[str, LayerError]:
    """Integer layer -> its error: of its own result, or where that is no tensor of the float model, of what it leads to.

    No error is shown twice: of several layers that lead to one result, the heavy one has it.
    """
    by_tensor = {row.tensor: row for row in reversed(compared)}
    by_layer = {row.layer: row for row in reversed(compared)}
    found: dict[str, LayerError] = {}
    taken: set[str] = set()
    for layer in sorted((x for x in report.layers if x.quantized), key=lambda layer: layer.op not in HEAVY):
        own = [by_tensor.get(t) for t in state.blocks[layer.name].outputs]
        named = [by_layer.get(name) for name in recorder.origin.get(layer.name, ()) if layer.op in HEAVY]
        row = next((row for row in (*own, *named) if row is not None and row.tensor not in taken), None)
        if row is not None:
            found[layer.name] = row
            taken.add(row.tensor)
    return found


def _kernels(state: CompileState, report: Report) -> dict[str, tuple[str, ...]]:
    """Block -> the operators in the final graph that do its work."""
    owner = _owners(state, report)
    found: dict[str, tuple[str, ...]] = {}
    for node in state.graph.nodes:
        root = _owner(owner, state, node.name)
        found[root] = (*found.get(root, ()), node.op)
    return found


def _owners(state: CompileState, report: Report) -> dict[str, str]:
    """Float layer -> the root of the block that it became a part of: the heavy one, if it became several."""
    owners: dict[str, str] = {}
    light = {layer.name for layer in report.layers if layer.op not in HEAVY}
    for block in sorted(state.blocks.values(), key=lambda block: block.root in light):
        for name in block.nodes:
            for layer in (name, *state.origin.get(name, ())):
                owners.setdefault(layer, block.root)
    for node in state.graph.nodes:  # what was folded into a block before there were blocks
        layers = state.origin.get(node.name, ())
        for root in [owners[layer] for layer in layers if layer in owners][:1]:
            for layer in layers:
                owners.setdefault(layer, root)
    return owners


def _owner(owners: dict[str, str], state: CompileState, node: str) -> str:
    layers = state.origin.get(node, (node,))
    return next((owners[layer] for layer in layers if layer in owners), layers[0] if layers else node)


def _weight_rows(state: CompileState, report: Report) -> list[WeightRow]:
    owners = _owners(state, report)
    rows = []
    for node in state.graph.nodes:
        for tensor in node.inputs:
            params = state.params.get(tensor.name) if ir.is_constant(tensor) else None
            if params is not None and params.spec.symmetric and np.ndim(ir.array(tensor)) > 1:
                rows.append(_weight_row(_owner(owners, state, node.name), ir.array(tensor), params))
    return rows


def _weight_row(layer: str, values: NDArray[Any], params: QuantParams) -> WeightRow:
    real = dequantize(values, params) if values.dtype == params.spec.dtype else np.asarray(values, np.float32)
    axis = params.spec.axis
    others = None if axis is None else tuple(i for i in range(real.ndim) if i != axis % real.ndim)
    low, high = (np.atleast_1d(bound) for bound in (real.min(others), real.max(others)))
    return WeightRow(layer, _dims(values.shape), np.atleast_1d(params.scale), low, high)


def _size_rows(before: onnx.ModelProto, after: onnx.ModelProto, state: CompileState, report: Report) -> list[SizeRow]:
    owners = _owners(state, report)
    totals: dict[str, list[int]] = {}
    for column, model in enumerate((before, after)):
        for name, count in _constants_by_reader(model):
            totals.setdefault(_owner(owners, state, name), [0, 0])[column] += count
    rows = [SizeRow(name, *pair) for name, pair in totals.items()]
    return sorted(rows, key=lambda row: -row.before)


def _constants_by_reader(model: onnx.ModelProto) -> list[tuple[str, int]]:
    """(node, bytes) of all constants; the first reader of a constant gets it."""
    left = {c.name: c.ByteSize() for c in model.graph.initializer}
    left |= {n.output[0]: n.ByteSize() for n in model.graph.node if n.op_type == "Constant"}
    return [(n.name, left.pop(name)) for n in model.graph.node for name in n.input if name in left]


def _dims(shape: Sequence[Any] | None) -> str:
    if shape is None:
        return ""
    return (
        " × ".join(str(d) if isinstance(d, int) or 0 < len(d or "") <= MAX_SYMBOL else "?" for d in shape) or "scalar"
    )
