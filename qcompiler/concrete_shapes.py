"""The shapes of all tensors as they are on the first calibration sample."""

from __future__ import annotations

import onnx

from qcompiler import ir, runtime
from qcompiler.errors import UserError
from qcompiler.ir import Graph, Tensor
from qcompiler.products import Shape
from qcompiler.shapes import infer_shapes
from qcompiler.state import CompileState, Feeds

_RUNS = 2
"""So often the model runs up to tensors where inference does not get on, before it runs as a whole."""


def concrete_shapes(state: CompileState) -> dict[str, Shape] | None:
    """The shapes of all tensors, dynamic axes as in the first calibration sample; sequences and optionals have none.

    None if some stay unknown, or if the model does not run: calibration says why.
    """
    tensors = [t for t in ir.tensors(state.graph) if getattr(t, "type", "tensor_type") == "tensor_type"]
    shapes = {t.name: shape for t in tensors if (shape := ir.static_shape(t)) is not None}
    unknown = [t for t in tensors if t.name not in shapes]
    if unknown:
        sample = None if state.calibration is None else next(iter(state.calibration), None)
        found = None
        if sample is not None:
            found = _named(state, unknown, sample) or _found(state, unknown, sample)
        if found is None:
            return None
        shapes |= found
    return shapes


def _named(state: CompileState, tensors: list[Tensor], sample: Feeds) -> dict[str, Shape] | None:
    """The shapes if all axes that are not static have the name of one of an input; else None."""
    sizes: dict[object, int] = {}
    for tensor in state.graph.inputs:
        sizes |= zip(ir.shape(tensor) or (), sample[tensor.name].shape, strict=False)
    found = {}
    for tensor in tensors:
        dims = ir.shape(tensor)
        if dims is None or not all(isinstance(d, int) or (d is not None and d in sizes) for d in dims):
            return None
        found[tensor.name] = tuple(d if isinstance(d, int) else sizes[d] for d in dims)
    return found


def _found(state: CompileState, tensors: list[Tensor], sample: Feeds) -> dict[str, Shape] | None:
    """What follows from the shapes of the sample; where inference does not get on, the model runs as far as it has to."""
    graph = state.graph.copy()
    for tensor in graph.inputs:
        tensor.shape = list(sample[tensor.name].shape)
    names = {t.name for t in tensors}
    known: dict[str, Shape] = {}
    seen: set[str] = set()
    for runs in range(_RUNS + 1):
        infer_shapes(graph, facts=seen)
        copies = [t for t in ir.tensors(graph) if t.name in names]
        known = {t.name: shape for t in copies if (shape := ir.static_shape(t)) is not None}
        unknown = [t for t in copies if t.name not in known]
        if not unknown:
            return known
        open_ones = {id(t) for t in unknown}
        first = unknown if runs == _RUNS else [t for t in unknown if not any(id(r) in open_ones for r in _reads(t))]
        found = _shapes_of(graph, first, sample)
        if found is None:
            return None
        for tensor, shape in zip(first, found, strict=True):
            tensor.shape = list(shape)
            known[tensor.name] = shape
        seen |= {t.name for t in first}
    return known


def _reads(tensor: Tensor) -> list[Tensor]:
    maker = ir.producer(tensor)
    return [] if maker is None else [*maker.inputs, *ir.captures(maker)]


def _shapes_of(graph: Graph, tensors: list[Tensor], sample: Feeds) -> list[Shape] | None:
    model = ir.submodel(graph.inputs, tensors, graph.opset)
    _reduce_to_shapes(model)
    try:
        session = runtime.session(model, optimize=False, low_memory=True, consume=True)
        found = runtime.run(session, {t.name: sample[t.name] for t in graph.inputs})
    except (UserError, RuntimeError):
        return None
    return [tuple(int(d) for d in dims) for dims in found]


def _reduce_to_shapes(model: onnx.ModelProto) -> None:
    """Replace the outputs by their shapes, so that no activation outlives its last reader."""
    names = [f"qcompiler.shape.{i}" for i in range(len(model.graph.output))]
    given = zip(model.graph.output, names, strict=True)
    model.graph.node.extend(onnx.helper.make_node("Shape", [value.name], [name]) for value, name in given)
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in names)
