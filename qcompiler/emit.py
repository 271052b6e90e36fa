"""From a state to a file: metadata, checks, and a write that leaves either the whole model or nothing."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qcompiler import __version__, detached, ir, runtime, supervise
from qcompiler.data import is_sample
from qcompiler.errors import UserError
from qcompiler.external import data_files
from qcompiler.load import check_structure
from qcompiler.quant import QuantParams
from qcompiler.state import CompileState


class EmitError(Exception):
    """The compiled model is not valid: a bug in a pass."""


def to_model(state: CompileState, made_by: dict[str, str]) -> onnx.ModelProto:
    """Export the state with the metadata of the float model and, under `qcompiler.`, what made this one.

    `qcompiler.provenance` maps the nodes to the float layers that they came from; nodes that kept a layer's name are left out.
    `qcompiler.tensors` maps the integer activations to the float tensor that they stand for (null if there is none), scale,
    zero point and bounds; `qcompiler.counterparts` maps float tensors to what they are to one of the float model: its name,
    factor, offset, and whether the shape is another one. One that is not there is that of the float model of its name.
    """
    nodes = [n.name for n in state.graph.nodes]
    origin = {name: list(state.origin[name]) for name in nodes if state.origin.get(name, (name,)) != (name,)}
    tensors = _activations(state)
    made_by = {
        "version": __version__,
        "target": state.target.name,
        "emit": state.phase.name.lower(),
        **made_by,
        "provenance": json.dumps(origin, separators=(",", ":")),
        "tensors": json.dumps(tensors, separators=(",", ":")),
        "counterparts": json.dumps(_counterparts(state, tensors), separators=(",", ":")),
    }
    metadata = {**state.metadata, **{f"qcompiler.{key}": value for key, value in made_by.items()}}
    model = ir.to_proto(state.graph, metadata)
    model.producer_name, model.producer_version = "qcompiler", __version__
    return model


def _activations(state: CompileState) -> dict[str, list[Any]]:
    """What the integer activations stand for: float tensor, scale, zero point and, where readers ignore what lies beyond some
    bounds, those (null: none). A scale is the shortest decimal that reads back as the same float32; it is a list where channels
    on the last axis have their own, and "log2" for integers that stand for powers of two.
    """
    bounds = {name: (block.low, block.high) for block in state.blocks.values() for name in block.outputs}
    table: dict[str, list[Any]] = {}
    for tensor in ir.tensors(state.graph):
        params = state.params.get(tensor.name)
        if params is not None and not ir.is_constant(tensor) and tensor.dtype == np.dtype(params.spec.dtype):
            source = state.ties.get(tensor.name)
            limits = [bound if math.isfinite(bound) else None for bound in bounds.get(source or "", ())]
            beyond = any(bound not in (None, 0) for bound in limits)
            table[tensor.name] = [source, _scale(params), params.zero_point, *(limits if beyond else ())]
    return table


def _scale(params: QuantParams) -> Any:
    if params.spec.log2:
        return "log2"
    numbers = [float(str(scale)) for scale in params.scales.reshape(-1)]
    return numbers if params.exponents else numbers[0]


def _counterparts(state: CompileState, tensors: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The counterparts of the tensors that are there, or that integers stand for."""
    names = {t.name for t in ir.tensors(state.graph)} | {entry[0] for entry in tensors.values()}
    found = {name: c for name, c in state.counterparts.items() if name in names}
    return {name: [c.source, c.factor.tolist(), c.offset.tolist(), c.reshaped] for name, c in found.items()}


def check(model: onnx.ModelProto, source: onnx.ModelProto) -> None:
    """Raise EmitError unless the model is valid, loads in ONNX Runtime, and has the inputs and outputs of `source`."""
    supervise.doing("while checking the compiled model", ours=True)
    if [_signature(v) for v in model.graph.input] != [_signature(v) for v in source.graph.input]:
        raise EmitError("the inputs of the compiled model differ from those of the float model")
    if [_signature(v) for v in model.graph.output] != [_signature(v) for v in source.graph.output]:
        raise EmitError("the outputs of the compiled model differ from those of the float model")
    try:
        check_structure(model)
        runtime.session(model)
    except Exception as error:
        raise EmitError(f"the compiled model is not valid: {error}") from error


def _signature(value: onnx.ValueInfoProto) -> tuple[str, int]:
    return value.name, value.type.tensor_type.elem_type


def check_path(path: Path, source: Path | None, samples: Path | None = None) -> None:
    """Refuse, before the work begins, a path that cannot be written, that is a device, which the model would replace, or that
    is the input: a model, its data, `samples`.
    """
    where = str(path)
    try:
        if path.is_dir():
            raise UserError("the output is a folder; give a file name", where)
        if path.exists() and not path.is_file():
            raise UserError("the output is a device or a pipe; give a file name", where)
        if source is not None:
            _refuse_overwriting(path, source)
        if samples is not None and path.exists() and is_sample(path, samples):
            raise UserError("the output would overwrite calibration data", where)
        folder = next(p for p in path.absolute().parents if p.exists())
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder", where)
        if not os.access(folder, os.W_OK):
            raise UserError(f"no permission to write in {folder}", where)
    except OSError as error:
        raise UserError(f"cannot write there: {error.strerror}", where) from error


def _refuse_overwriting(path: Path, source: Path) -> None:
    if path.exists() and source.exists() and path.samefile(source):
        raise UserError("the output would overwrite the input model", str(path))
    folder = source.parent.resolve()
    for place in (path, path.with_name(f"{path.name}.data")):
        is_beside = place.exists() and place.resolve().is_relative_to(folder)  # as all data of a model is
        if is_beside and any(place.samefile(file) for file in data_files(source) if file.exists()):
            raise UserError("the output would overwrite the data of the input model", str(place))


def write(model: onnx.ModelProto, path: Path, limit: int | None = None) -> None:
    """Write the model; above `limit` bytes, by default what fits one file, its data goes to `path` + `.data`.

    The same model gives the same bytes. Both files are complete before they get their names, so that a failure leaves an older
    output as it was. Weights that were detached from the model are then those of the file. Raises UserError if the disk refuses.
    """
    supervise.doing("while writing the model", str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with supervise.scratch(path.parent) as folder:
            draft, data = folder / path.name, folder / f"{path.name}.data"
            written = model
            if detached.of(model) or model.ByteSize() > (detached.MODEL_LIMIT if limit is None else limit):
                written = detached.write(model, data)
            draft.write_bytes(written.SerializeToString(deterministic=True))
            _install([file for file in (data, draft) if file.exists()], path.parent)
        if written is not model:
            detached.settle(model, written, path.parent)
    except OSError as error:
        raise UserError(f"cannot write the model: {error.strerror or error}", str(path)) from error


def _install(drafts: list[Path], folder: Path) -> None:
    """Give complete files their names, in order; if one cannot get its name, the others get back what they replaced."""
    kept: list[tuple[Path, Path]] = []
    try:
        for draft in drafts:
            place, old = folder / draft.name, draft.with_name(f"{draft.name}.old")
            if draft is not drafts[-1] and place.exists():
                place.replace(old)
                kept.append((old, place))
            draft.replace(place)
    except BaseException:
        for old, place in kept:
            old.replace(place)
        raise
