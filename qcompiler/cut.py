"""Where a compiled model is cut into layers: at the tensors that stand for tensors of the float model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from qcompiler import runtime
from qcompiler.difference import Array, Difference
from qcompiler.errors import UserError
from qcompiler.external import graphs
from qcompiler.integer_layers import LARGEST_CODE
from qcompiler.quant import F32, QuantParams, QuantSpec, dequantize, quantize
from qcompiler.state import Feeds

_LOCAL = "qcompiler.local."


def metadata(model: onnx.ModelProto, key: str, where: str = "model") -> dict[str, Any]:
    """The JSON under `qcompiler.KEY`. Raises UserError if it is not there."""
    for entry in model.metadata_props:
        if entry.key == f"qcompiler.{key}":
            table = json.loads(entry.value)
            assert isinstance(table, dict)
            return table
    raise UserError("it does not say what its tensors stand for: compile it with this version of qcompiler", where)


class Cut:
    """Where the compiled model is cut into layers. `source`: tensor of the compiled model -> the float tensor behind it."""

    def __init__(self, float_model: onnx.ModelProto, compiled: onnx.ModelProto) -> None:
        self.nodes = list(compiled.graph.node)
        self.table = metadata(compiled, "tensors")
        self.provenance = metadata(compiled, "provenance")
        self._counterparts = metadata(compiled, "counterparts")
        self.maker = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.inputs = [v.name for v in compiled.graph.input]
        known = {v.name for v in float_model.graph.input} | {name for n in float_model.graph.node for name in n.output}
        found = {name: self._behind(name) for name in self.maker}
        self.source = {name: source for name, source in found.items() if source in known and source is not None}
        self.floats: set[str] = set()
        self.skipped = {t: "no float tensor stands behind it" for t in self.table if t not in self.source}
        ends = {*self.inputs, *(v.name for v in compiled.graph.output)}
        inner = [name for name, entry in self.table.items() if entry[0] not in ends]
        if inner and not any(name in self.source for name in inner):
            raise UserError("it was not made from this float model: no tensor is the same", "model")

    def _float_name(self, name: str) -> str | None:
        """The name that a tensor of the compiled model had before quantization, if any."""
        if name in self.table:
            source = self.table[name][0]
            return None if source is None else str(source)
        maker = self.nodes[self.maker[name]]
        is_copy = maker.op_type == "DequantizeLinear" and maker.input[0] in self.table
        return None if is_copy else name

    def _behind(self, name: str) -> str | None:
        """The tensor of the float model that a tensor of the compiled model stands for, if any."""
        own = self._float_name(name)
        return str(self._counterparts[own][0]) if own in self._counterparts else own

    @property
    def sources(self) -> list[str]:
        """The float tensors to look at."""
        return list(self.source.values())

    @property
    def tensors(self) -> list[str]:
        """The tensors of the compiled model to look at."""
        return list(self.source)

    def match(self, wanted: dict[str, Any], given: dict[str, Any]) -> None:
        """Give up the tensors whose shapes differ from what is expected, or that are not arrays."""
        for name, source in list(self.source.items()):
            x, y = wanted[source], given[name]
            are_arrays = isinstance(x, np.ndarray) and isinstance(y, np.ndarray)
            if not are_arrays or not (x.size == y.size if self._is_reshaped(name) else _same_but_padded(x, y)):
                del self.source[name]
                self.skipped[name] = f"its shape is not that of {source!r} in the float model"
            elif x.dtype.kind == "f":
                self.floats.add(name)

    def _is_reshaped(self, name: str) -> bool:
        entry = self._counterparts.get(self._float_name(name) or "")
        return entry is not None and bool(entry[3])

    def expected(self, name: str, wanted: dict[str, Any], given: dict[str, Any]) -> Array:
        """What a tensor of the compiled model would hold without any error, as floats."""
        found: Array = wanted[self.source[name]]
        entry = self._counterparts.get(self._float_name(name) or "")
        if entry is not None:
            factor, offset = (np.asarray(number, np.float64) for number in entry[1:3])
            found = (found * factor + offset).astype(found.dtype)
        shape = given[name].shape
        if found.size < given[name].size:
            found = found.take(np.arange(shape[1]) % found.shape[1], axis=1)
        return found.reshape(shape)

    def within(self, name: str, values: Array) -> Array:
        """Values of a tensor within the bounds that its readers look at."""
        bounds = self.table[name][3:] if name in self.table else ()
        return np.clip(values, *bounds) if bounds else values

    def layer(self, tensor: str) -> list[int]:
        """The nodes between a tensor and the cuts before it, in order."""
        seen: set[int] = set()
        stack = [self.maker[tensor]]
        while stack:
            i = stack.pop()
            if i not in seen:
                seen.add(i)
                reads = [name for name in _reads(self.nodes[i]) if name in self.maker and name not in self.source]
                stack += [self.maker[name] for name in reads]
        return sorted(seen)

    def rows(self) -> list[str]:
        """The tensors that end a layer with integers in it."""
        found = [t for t in self.source if t in self.floats]
        return [t for t in found if t in self.table or any(self._is_integer(i) for i in self.layer(t))]

    def _is_integer(self, node: int) -> bool:
        return any(name in self.table for name in (*self.nodes[node].input, *self.nodes[node].output))

    def layers(self, nodes: Sequence[int]) -> tuple[str, ...]:
        """The float layers behind nodes."""
        names = [self.nodes[i].name for i in nodes]
        return tuple(dict.fromkeys(layer for name in names for layer in self.provenance.get(name, [name])))


def _same_but_padded(x: Array, y: Array) -> bool:
    """Whether y has the shape of x, or that with more channels, which then are copies of others (`pad-channels`)."""
    if x.shape == y.shape:
        return True
    rest = [(*z.shape[:1], *z.shape[2:]) for z in (x, y)]
    return 1 < x.ndim == y.ndim and x.shape[1] < y.shape[1] and rest[0] == rest[1]


class Local:
    """Every layer on its own, in one model: each tensor at a cut is an input to its readers, fed from the float model."""

    def __init__(self, compiled: onnx.ModelProto, cut: Cut, given: dict[str, Any]) -> None:
        self._cut = cut
        self._params = {name: _params(cut.table[name], given[name]) for name in cut.source if name in cut.table}
        self.totals = {name: Difference() for name in cut.rows()}
        model = onnx.ModelProto()
        model.CopyFrom(compiled)
        self._fed = _sever(model.graph, list(cut.source))
        for name in self._fed:
            kind = helper.np_dtype_to_tensor_dtype(given[name].dtype)
            shape = [None] * given[name].ndim
            model.graph.input.append(helper.make_tensor_value_info(_LOCAL + name, kind, shape))
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.totals)
        self._runner = runtime.session(model) if self.totals else None

    def real(self, name: str, values: Array) -> F32:
        """What a tensor of the compiled model stands for."""
        return dequantize(values, self._params[name]) if name in self._params else values

    def add(self, feeds: Feeds, expected: dict[str, Array]) -> None:
        """Run all layers on what they would get without any error, and take in what differs."""
        if self._runner is None:
            return
        inputs = dict(feeds)
        for name in self._fed:
            value = expected[name]
            inputs[_LOCAL + name] = quantize(value, self._params[name]) if name in self._params else value
        results = runtime.run(self._runner, inputs)
        for (name, total), result in zip(self.totals.items(), results, strict=True):
            total.add(self._cut.within(name, expected[name]), self.real(name, result))


def _params(entry: Sequence[Any], values: Array) -> QuantParams:
    info = np.iinfo(values.dtype)
    if entry[1] == "log2":
        return QuantParams(QuantSpec(values.dtype.name, 0, LARGEST_CODE, log2=True), np.ones((), np.float32))
    spec = QuantSpec(values.dtype.name, int(info.min), int(info.max), axis=-1 if isinstance(entry[1], list) else None)
    return QuantParams(spec, np.asarray(entry[1], np.float32), int(entry[2]))


def _sever(graph: onnx.GraphProto, names: Sequence[str]) -> list[str]:
    """Let the readers of these tensors read graph inputs instead; return those that are read."""
    renamed = {name: _LOCAL + name for name in names}
    read = {name for node in graph.node for name in _reads(node)}
    for level in graphs(graph):
        for node in level.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]
        for value in level.output if level is not graph else ():
            value.name = renamed.get(value.name, value.name)
    return [name for name in names if name in read]


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Every tensor that the node or a subgraph in it may read."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            yield from (name for level in graphs(inner) for n in level.node for name in n.input)
            yield from (value.name for level in graphs(inner) for value in level.output)
