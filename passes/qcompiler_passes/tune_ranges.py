"""tune-ranges: move the clip range of a tensor where that makes the layers that read it more exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from qcompiler import ir
from qcompiler.errors import UserError
from qcompiler.ir import Node, Tensor
from qcompiler.ops import Lowering, op_key
from qcompiler.quant import F32, QuantParams, QuantSpec, params_from_range
from qcompiler.runtime import Session, run, session
from qcompiler.state import CompileState, Feeds, Phase
from qcompiler_passes import windows


@dataclass(frozen=True)
class TuneRanges:
    """Choose ranges by the error at the output of the layers that read a tensor, with float weights.

    A collector looks at the tensor alone; what its readers make of the error differs: channels weigh more and less, functions
    flatten. From the calibrated range on, both ends move in steps of an eighth and three eighths of an octave as long as the
    error shrinks. It is the squared error behind the activation, less that of the channel means, which correct-bias takes out,
    relative to the output's variance, summed over the readers. It is measured on windows of about `values` values of each of
    `samples` samples. Windows may miss rare large values, which collectors know: a range moves only if the error shrinks by
    more than the share `margin`. The idea of Wu et al. 2020 (EasyQuant, arXiv 2006.16669), who compare outputs by cosine.
    """

    samples: int = 64
    values: int = 4096
    margin: float = 0.35

    name: ClassVar[str] = "tune-ranges"
    requires: ClassVar[Phase] = Phase.CALIBRATED
    establishes: ClassVar[Phase | None] = None

    def run(self, state: CompileState) -> int:
        """Return the number of ranges moved; none once weights have scales, which fit the ranges."""
        if state.phase >= Phase.QDQ or state.calibration is None or _weights_are_scaled(state):
            return 0
        readers = list(_readers(state))
        tensors = {t.name: t for reader in readers for t in reader.inputs}
        if not tensors:
            return 0
        cuts = windows.cut(state.graph, list(tensors.values()), _axes(readers), self._chosen(state), self.values)
        for reader in readers:
            reader.take(cuts, state.graph.opset)
        members: dict[str, list[str]] = {}
        for name in state.params:
            members.setdefault(state.leader(name), []).append(name)
        limits = _limits(state)
        quantizer, count = _quantizer(state.target.activation), 0
        for leader in dict.fromkeys(leader for reader in readers for leader in reader.reads):
            if state.rewrite_limit is not None and count >= state.rewrite_limit:
                break
            errors = _Errors(leader, [reader for reader in readers if leader in reader.reads], quantizer)
            best = _search(state.params[leader], limits.get(leader, (-np.inf, np.inf)), errors, self.margin)
            if best is not state.params[leader]:
                state.params |= dict.fromkeys(members[leader], best)
                count += 1
        return count

    def _chosen(self, state: CompileState) -> Iterator[Feeds]:
        """The samples to look at, evenly spread where their number is known."""
        assert state.calibration is not None
        size = len(state.calibration) if isinstance(state.calibration, Sized) else 0
        return islice(islice(state.calibration, 0, None, max(1, size // self.samples)), self.samples)


def _weights_are_scaled(state: CompileState) -> bool:
    rules = ((n, state.ops.get(op_key(n.op, n.domain))) for n in state.graph.nodes)
    layers = (n for n, rule in rules if rule is not None and rule.lowering is Lowering.MAC)
    return any(n.inputs[1].name in state.params for n in layers)


@dataclass
class _Reader:
    """A block that reads tensors with tunable params, on windows; without a root, a stand-in for one that is not run.

    `reads`: leader -> the inputs with its params.
    """

    root: Node | None
    inputs: list[Tensor]
    output: Tensor
    reads: dict[str, list[str]]

    def take(self, cuts: Mapping[str, list[F32]], opset: int) -> None:
        """Take over the windows of the inputs, those of one shape as one batch, and compute the exact results."""
        batches: dict[tuple[Any, ...], list[int]] = {}
        for i in range(len(cuts[self.inputs[0].name])):
            batches.setdefault(tuple(cuts[t.name][i].shape for t in self.inputs), []).append(i)
        self._feeds = [
            {t.name: np.concatenate([cuts[t.name][i] for i in batch]) for t in self.inputs}
            for batch in batches.values()
        ]
        if self.root is not None:
            self._runner = session(ir.submodel(self.inputs, [self.output], opset), consume=True)
            try:
                self._exact = [run(self._runner, feeds)[0] for feeds in self._feeds]
            except (UserError, RuntimeError):  # a kernel larger than the window, say
                self.root = None

    def error(self, leader: str, quantize: Callable[[F32], F32]) -> float:
        """The relative error of the output while the tensors of a leader are quantized; without a root, that of the first."""
        names = self.reads[leader]
        if self.root is None:
            exact = [feeds[names[0]] for feeds in self._feeds]
            results = [quantize(x) for x in exact]
        else:
            exact = self._exact
            rounded = [{name: quantize(feeds[name]) for name in names} for feeds in self._feeds]
            results = [run(self._runner, {**f, **r})[0] for f, r in zip(self._feeds, rounded, strict=True)]
        power = _variance([self._by_channel(y) for y in exact])
        errors = [self._by_channel(y - z) for y, z in zip(results, exact, strict=True)]
        return _variance(errors) / power if power > 0 else 0.0

    def _by_channel(self, y: F32) -> F32:
        """The values as (places, channels)."""
        last = y.ndim < 3 or (self.root is not None and self.root.op == "MatMul")
        channels_last = y if last else np.moveaxis(y, 1, -1)
        return channels_last.reshape(-1, channels_last.shape[-1])


def _variance(parts: Sequence[F32]) -> float:
    """The sum over channels of the variance; the parts have shapes (places, channels)."""
    count = sum(len(p) for p in parts)
    means = np.sum([p.sum(axis=0, dtype=np.float64) for p in parts], axis=0) / count
    squares = sum(float(np.einsum("ij,ij->", p, p, dtype=np.float64)) for p in parts) / count
    return float(max(squares - np.square(means).sum(), 0))


_WINDOWED = {Lowering.MAC, Lowering.ADD, Lowering.MUL, Lowering.SUM, Lowering.TABLE, Lowering.CLIP}
"""What runs on windows as on whole tensors; a Concat is a float reader here, for it adds no error of its own."""


def _readers(state: CompileState) -> Iterator[_Reader]:
    """The readers of quantized tensors. Operators that only move values are no readers: theirs are, of tied tensors."""
    nodes = {n.name: n for n in state.graph.nodes}
    tensors = {t.name: t for t in ir.tensors(state.graph)}
    made = {name for block in state.blocks.values() if block.quantized for name in block.outputs}
    for block in state.blocks.values():
        root = nodes[block.root]
        rule = state.ops.get(op_key(root.op, root.domain))
        lowering = Lowering.NONE if rule is None or not block.quantized else rule.lowering
        positions = [] if rule is None or not block.quantized else rule.activations(root)
        inputs = list({id(t): t for t in root.inputs if not (t.is_empty() or ir.is_constant(t))}.values())
        quantized = {id(root.inputs[i]) for i in positions} | {id(t) for t in inputs if t.name in made}
        reads = [t for t in inputs if t.name in state.params and id(t) in quantized and ir.shape(t)]
        if lowering is Lowering.MOVE or not reads:
            continue
        if lowering in _WINDOWED and all(ir.shape(t) for t in inputs):
            groups: dict[str, list[str]] = {}
            for t in reads:
                groups.setdefault(state.leader(t.name), []).append(t.name)
            yield _Reader(root, inputs, tensors[block.outputs[0]], groups)
        else:
            yield from (_Reader(None, [t], t, {state.leader(t.name): [t.name]}) for t in reads)


def _axes(readers: Sequence[_Reader]) -> dict[str, tuple[int, ...]]:
    """The axes of space or time of each tensor: behind the channels where a Conv reads its like, else in front of them."""
    convolved = {
        ir.shape(t) for reader in readers if reader.root is not None and reader.root.op == "Conv" for t in reader.inputs
    }
    axes = {}
    for tensor in (t for reader in readers for t in reader.inputs):
        rank = len(ir.shape(tensor) or ())
        axes[tensor.name] = {4: (2, 3), 3: (2,) if ir.shape(tensor) in convolved else (1,)}.get(rank, ())
    return axes


class _Errors:
    """The summed errors of the readers of a leader, by params; measured once each."""

    def __init__(self, leader: str, readers: list[_Reader], quantizer: Session) -> None:
        self._leader, self._readers, self._quantizer = leader, readers, quantizer
        self._known: dict[tuple[float, int], float] = {}

    def __call__(self, params: QuantParams) -> float:
        scale, zero_point = np.asarray(params.scale, np.float32), np.asarray(params.zero_point, params.spec.dtype)
        key = float(scale), params.zero_point
        if key not in self._known:

            def quantize(x: F32) -> F32:
                return np.asarray(run(self._quantizer, {"x": x, "scale": scale, "zero_point": zero_point})[0])

            self._known[key] = sum(reader.error(self._leader, quantize) for reader in self._readers)
        return self._known[key]


def _quantizer(spec: QuantSpec) -> Session:
    """Quantize and dequantize `x` with `scale` and `zero_point`."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    bounds = [
        numpy_helper.from_array(np.asarray(q, spec.dtype), name)
        for q, name in ((spec.qmin, "qmin"), (spec.qmax, "qmax"))
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"]),
        helper.make_node("Clip", ["q", "qmin", "qmax"], ["c"]),
        helper.make_node("DequantizeLinear", ["c", "scale", "zero_point"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    inputs = [value("x", TensorProto.FLOAT, None), value("scale", TensorProto.FLOAT, []), value("zero_point", kind, [])]
    graph = helper.make_graph(nodes, "quantizer", inputs, [value("y", TensorProto.FLOAT, None)], bounds)
    opset = [helper.make_opsetid("", 17)]
    return session(helper.make_model(graph, opset_imports=opset, ir_version=ir.IR_VERSION))


def _limits(state: CompileState) -> dict[str, tuple[float, float]]:
    """Leader -> bounds of the activations before its tensors: a wider range would cost a clip of its own."""
    limits: dict[str, tuple[float, float]] = {}
    for block in state.blocks.values():
        for leader in (state.leader(name) for name in block.outputs):
            low, high = limits.get(leader, (-np.inf, np.inf))
            limits[leader] = max(low, block.low), min(high, block.high)
    return limits


_Point = tuple[int | None, int | None]


def _search(
    current: QuantParams, limits: tuple[float, float], error: Callable[[QuantParams], float], margin: float
) -> QuantParams:
    """Params at a local minimum of the error, on a grid of bounds `2**(i / 8)`, or the current ones if they are hardly worse.

    The grid does not depend on the current range, so that a second search stays where the first one ended.
    """

    def at(point: _Point) -> QuantParams:
        low, high = (0.0 if i is None else 2.0 ** (i / 8) for i in point)
        return params_from_range(max(-low, limits[0]), min(high, limits[1]), current.spec)

    def nearest(point: _Point, step: int) -> _Point:
        moves = ((0, 0), (-1, 0), (0, -1), (-1, -1), (1, 0), (0, 1), (1, 1))
        points = [
            tuple(None if i is None else i + step * move for i, move in zip(point, pair, strict=True)) for pair in moves
        ]
        return min(dict.fromkeys(points), key=lambda p: error(at(p)))  # type: ignore[arg-type,return-value]

    low, high = current.range
    start: _Point = (round(8 * np.log2(-low)) if low < 0 else None, round(8 * np.log2(high)) if high > 0 else None)
    point = nearest(start, 3)
    if point == start:
        return current
    while (better := nearest(point, 1)) != point or (better := nearest(point, 3)) != point:
        point = better
    return at(point) if error(at(point)) < (1 - margin) * error(current) else current
