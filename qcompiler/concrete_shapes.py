"""The shapes of all tensors as they are on the first calibration sample."""

from __future__ import annotations

import onnx

from qcompiler import ir, runtime
from qcompiler.errors import UserError
from qcompiler.ir import Tensor
from qcompiler.products import Shape
from qcompiler.shapes import infer_shapes
from qcompiler.state import CompileState, Feeds


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
            found = (
                _named(state, unknown, sample)
                or _inferred(state, unknown, sample)
                or _shapes_in(state, unknown, sample)
            )
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


def _inferred(state: CompileState, tensors: list[Tensor], sample: Feeds) -> dict[str, Shape] | None:
    """What follows from the shapes of the sample without running the model; None if that is not all."""
    graph = state.graph.copy()
    for tensor in graph.inputs:
        tensor.shape = list(sample[tensor.name].shape)
    infer_shapes(graph)
    known = {t.name: ir.static_shape(t) for t in ir.tensors(graph)}
    found = {t.name: shape for t in tensors if (shape := known.get(t.name)) is not None}
    return found if len(found) == len(tensors) else None


def _shapes_in(state: CompileState, tensors: list[Tensor], sample: Feeds) -> dict[str, Shape] | None:
    model = ir.submodel(state.graph.inputs, tensors, state.graph.opset)
    _reduce_to_shapes(model)
    try:
        session = runtime.session(model, optimize=False, low_memory=True, consume=True)
        found = runtime.run(session, {t.name: sample[t.name] for t in state.graph.inputs})
    except (UserError, RuntimeError):
        return None
    return {t.name: tuple(int(d) for d in dims) for t, dims in zip(tensors, found, strict=True)}


def _reduce_to_shapes(model: onnx.ModelProto) -> None:
    """Replace the outputs by their shapes, so that no activation outlives its last reader."""
    names = [f"qcompiler.shape.{i}" for i in range(len(model.graph.output))]
    given = zip(model.graph.output, names, strict=True)
    model.graph.node.extend(onnx.helper.make_node("Shape", [value.name], [name]) for value, name in given)
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in names)
