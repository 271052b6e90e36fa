"""Read a model, and refuse with one clear line whatever cannot be compiled.

A model is foreign input: its external data may point anywhere, its functions may call themselves, and a file of 200 bytes may
ask for 40 GB. All of this is checked before anything is run.
"""

from __future__ import annotations

import math
import stat
from pathlib import Path

import numpy as np
import onnx
from onnx import inliner, numpy_helper

from qcompiler import detached, exports, functions, qonnx, runtime, supervise
from qcompiler.errors import UserError
from qcompiler.external import MAX_BYTES, graphs, load_external_data, refuse_unloaded
from qcompiler.samples import InputSpec

FULL_OPSET = 7
"""From here on ONNX Runtime runs all operators; of older opsets those that did not change until 7, and a few more."""

_STANDARD = ("", "ai.onnx")
"""How the domain of the ONNX operators may be spelt."""

MAX_ELEMENTS = 2**31
"""No tensor of a model that runs on a CPU is as large; one that claims to be is a mistake or an attack."""

MAX_NESTING = 64
"""How deeply model-local functions may call each other."""

_MAGIC = {
    b"version https://git-lfs": "a git-lfs pointer (run `git lfs pull`)",
    b"\x1f\x8b": "gzip-compressed (unpack it first)",
    b"PK\x03\x04": "a zip archive",
    b"<": "a web page or XML",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}


def load_model(source: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    """Return a checked model that holds all of its data, with its functions inlined; `source` itself is not changed.

    Raises UserError if it is missing, damaged, compiled already, too old or new, or does not load in ONNX Runtime.
    """
    if isinstance(source, onnx.ModelProto):
        where, model = "model", onnx.ModelProto()
        supervise.doing("while loading the model")
        _copy(source, model)
        refuse_unloaded(model)
    else:
        where = str(source)
        model = read_model(Path(source))
    qonnx.expand(model)
    _check_versions(model, where)
    _refuse_compiled(model, where)
    if model.functions:
        _check_functions(model, where)
    _make_initializers_constant(model)
    exports.make_scalars(model)
    try:
        check_structure(model)
    except Exception as error:
        raise UserError(f"not a valid model: {brief(error)}", where) from error
    _make_dense(model, where)
    if model.functions:
        model = inliner.inline_local_functions(model)
    _refuse_types(model)
    _refuse_huge_tensors(model, where)
    try:
        runtime.session(model)
    except Exception as error:
        old = min(_opsets(model)) < FULL_OPSET
        hint = f"; export with opset {FULL_OPSET} or newer" if old else ""
        raise UserError(brief(error) + hint, where) from error
    supervise.doing("after loading the model")
    return model


def _copy(source: onnx.ModelProto, target: onnx.ModelProto) -> None:
    try:
        target.CopyFrom(source)
    except Exception as error:
        raise UserError("larger than 2 GB; save it with external data and give its path", "model") from error


_SUMS = ("Conv", "ConvTranspose", "Gemm", "GRU", "LSTM", "MatMul", "RNN")


def input_specs(model: onnx.ModelProto) -> list[InputSpec]:
    """The inputs to feed: graph inputs that are not initializers. Raises UserError for one that is not a tensor.

    Those that no multiply-accumulate operator reads as they are may hold infinity, as attention masks do: `calibrate` tells where
    something that is quantized does.
    """
    summed = {name for graph in graphs(model.graph) for n in graph.node if n.op_type in _SUMS for name in n.input}
    constants = {t.name for t in model.graph.initializer} | {t.values.name for t in model.graph.sparse_initializer}
    specs = []
    for value in model.graph.input:
        if value.name in constants:
            continue
        if not value.type.HasField("tensor_type"):
            raise UserError("the input is not a tensor", f"input '{value.name}'")
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        shape = tuple(_dimension(d) for d in kind.shape.dim) if kind.HasField("shape") else None
        specs.append(InputSpec(value.name, dtype, shape, value.name in summed))
    return specs


def _dimension(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return int(dim.dim_value)
    return dim.dim_param or None


def brief(error: Exception) -> str:
    """The message of a foreign exception in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    for mark in ("[ONNXRuntimeError] : ", "==> Context: "):
        if mark in text:
            text = text.partition(mark)[2] or text
    return text if len(text) <= 300 else text[:297] + "..."


def read_model(path: Path) -> onnx.ModelProto:
    """The model in a file with all of its data; nothing else is checked. Raises UserError if it is missing or damaged."""
    data = _read(path)
    supervise.doing("while loading the model", str(path), seconds=supervise.LOADING_SECONDS + len(data) / 1e6)
    model = _parse(data, path)
    load_external_data(model, path)
    return model


def _parse(data: bytes, path: Path) -> onnx.ModelProto:
    if not data:
        raise UserError("the file is empty", str(path))
    for magic, kind in _MAGIC.items():
        if data.startswith(magic):
            raise UserError(f"not an ONNX model: the file is {kind}", str(path))
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's DecodeError, but also plain ValueErrors
        raise UserError("not an ONNX model, or cut short", str(path)) from error
    if not model.graph.output:
        raise UserError("not an ONNX model: there is no graph with outputs in it", str(path))
    return model


def _read(path: Path) -> bytes:
    """The bytes of a regular file. A pipe would block for ever, a device may never end."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UserError("the model is a folder; expected an .onnx file", str(path))
        if not stat.S_ISREG(status.st_mode):
            raise UserError("the model is not a regular file", str(path))
        if status.st_size > MAX_BYTES:
            raise UserError("the file is larger than 2 GB, the limit of ONNX files without external data", str(path))
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError("no such model file", str(path)) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the model: {getattr(error, 'strerror', None) or error}", str(path)) from error


def _check_versions(model: onnx.ModelProto, where: str) -> None:
    if model.ir_version > onnx.IR_VERSION:
        raise UserError(f"IR version {model.ir_version} is newer than the newest known, {onnx.IR_VERSION}", where)
    if not any(n.domain in _STANDARD for owner in (*graphs(model.graph), *model.functions) for n in owner.node):
        _import_standard(model)
    versions = _opsets(model)
    opset = max(versions, default=0)
    if not versions:
        raise UserError("the model does not import the ONNX operators (no opset)", where)
    if opset < 1:
        raise UserError(f"there is no opset {opset}: export with opset {FULL_OPSET} or newer", where)
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise UserError(f"opset {opset} is newer than the newest known, {newest}", where)


def _opsets(model: onnx.ModelProto) -> list[int]:
    return [d.version for d in model.opset_import if d.domain in _STANDARD]


def _import_standard(model: onnx.ModelProto) -> None:
    """Let a model with operators of other domains only import the standard ones, which passes may need."""
    if model.opset_import and not any(d.domain in _STANDARD for d in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("", FULL_OPSET))


def _refuse_compiled(model: onnx.ModelProto, where: str) -> None:
    if any(n.domain == functions.DOMAIN for owner in (*graphs(model.graph), *model.functions) for n in owner.node):
        raise UserError("the model is compiled already, to integers without scales; give the float model", where)


def is_quantized(model: onnx.ModelProto) -> bool:
    """Whether a model quantizes activations, so that it comes with their scales."""
    constants = {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type.startswith(("QLinear", "QGemm")):
            return True
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            return True
    return False


def _check_functions(model: onnx.ModelProto, where: str) -> None:
    """Refuse functions that call themselves, that nest deeply, or that inline to too many nodes."""
    pending = {(f.domain, f.name): [(n.domain, n.op_type) for n in f.node] for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}
    for _ in range(MAX_NESTING):
        ready = [key for key, calls in pending.items() if not any(call in pending for call in calls)]
        for key in ready:
            sizes[key] = sum(sizes.get(call, 1) for call in pending[key])
        for key in ready:
            del pending[key]
    if pending:
        raise UserError(f"function {next(iter(pending))[1]!r} calls itself, or calls nest too deeply", where)
    if sum(sizes.get((n.domain, n.op_type), 1) for g in graphs(model.graph) for n in g.node) > 1_000_000:
        raise UserError("the model's functions inline to more than a million nodes", where)


def _make_initializers_constant(model: onnx.ModelProto) -> None:
    """Before IR 4 every initializer was listed as a graph input; since then one that is listed may be overridden."""
    constants = {t.name for t in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 4)


USER_DEFINED = 2
"""`numpy.dtype.isbuiltin` of types that another package (ml_dtypes) adds to NumPy."""


def _refuse_types(model: onnx.ModelProto) -> None:
    """Refuse element types that ONNX Runtime neither takes nor gives as NumPy arrays."""
    for role, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            code = value.type.tensor_type.elem_type
            if code and onnx.helper.tensor_dtype_to_np_dtype(code).isbuiltin == USER_DEFINED:
                name = onnx.TensorProto.DataType.Name(code).lower()
                raise UserError(f"the {role} is of type {name}, which NumPy lacks", f"{role} '{value.name}'")


def _make_dense(model: onnx.ModelProto, where: str) -> None:
    """Turn sparse initializers, which save space in files only, into ordinary ones."""
    for graph in graphs(model.graph):
        for sparse in graph.sparse_initializer:
            if math.prod(sparse.dims) > MAX_BYTES // 8:
                raise UserError(f"sparse initializer {sparse.values.name!r} is too large", where)
            values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
            dense = np.zeros(tuple(sparse.dims), values.dtype)
            if indices.ndim == 1:
                dense.reshape(-1)[indices] = values
            else:
                dense[tuple(indices.T)] = values
            graph.initializer.append(numpy_helper.from_array(dense, sparse.values.name))
        del graph.sparse_initializer[:]


def check_structure(model: onnx.ModelProto) -> None:
    """Run the ONNX checker; unlike it, let inputs and outputs be of unknown rank, as ONNX Runtime does."""
    model = detached.without_weights(model)
    values = (*model.graph.input, *model.graph.output)
    kinds = [v.type.tensor_type for v in values if v.type.HasField("tensor_type")]
    unranked = [kind for kind in kinds if not kind.HasField("shape")]
    for kind in unranked:
        kind.shape.SetInParent()
    try:
        onnx.checker.check_model(model)
    finally:
        for kind in unranked:
            kind.ClearField("shape")


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large initializers as inputs: inference copies what it is given twice."""
    skeleton = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    source, graph = model.graph, skeleton.graph
    for field in ("node", "input", "output", "value_info"):
        getattr(graph, field).extend(getattr(source, field))
    for tensor in source.initializer:
        if tensor.ByteSize() < detached.LARGE and not detached.is_detached(tensor):
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return skeleton


def _refuse_huge_tensors(model: onnx.ModelProto, where: str) -> None:
    try:
        inferred = onnx.shape_inference.infer_shapes(_skeleton(model), data_prop=True)
    except Exception:  # it only foresees trouble; ONNX Runtime has the last word
        return
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        elements = 1
        for dim in value.type.tensor_type.shape.dim:
            elements *= max(dim.dim_value, 1)
        if elements > MAX_ELEMENTS:
            raise UserError(f"tensor {value.name!r} would hold {elements:.1e} elements", where)
