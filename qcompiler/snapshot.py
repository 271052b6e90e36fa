"""Snapshots: a state on disk, from which compilation goes on as if it had never stopped.

`NN-pass.onnx` is the graph, which runs; `NN-pass.json` the side tables and what the rest of the compilation needs; `NN-pass.txt`
the graph with one line per node, for people. Floats are written as the shortest decimals that read back as the same numbers.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler import __version__, emit, ir
from qcompiler.cost import Work
from qcompiler.errors import UserError
from qcompiler.images import Preprocess
from qcompiler.load import read_model
from qcompiler.pipeline import closest
from qcompiler.plugin import Registry
from qcompiler.quant import QuantParams, QuantSpec
from qcompiler.state import Block, CompileState, Counterpart, Phase
from qcompiler.text import format_graph

FORMAT = 1


@dataclass(frozen=True)
class Data:
    """The calibration data of a compilation.

    `path`: absolute, or None for data in memory; `samples`, `preprocess`: how it is read; `digest`: of all that is fed.
    """

    path: str | None
    samples: int | None
    preprocess: Preprocess | None
    digest: Callable[[], str]


@dataclass(frozen=True)
class Recipe:
    """What a compilation needs besides its state. `model`: the name of the float model; `pipeline`: the text of all passes;
    `load`: absolute paths of plug-in files; `data`: None if there is no calibration.
    """

    model: str = ""
    pipeline: str = ""
    load: tuple[str, ...] = ()
    data: Data | None = None


@dataclass(frozen=True)
class Snapshot:
    """What was read. `done`: the number of passes that have run; `digest`: of the calibration data, None if none was read."""

    state: CompileState
    recipe: Recipe
    done: int
    digest: str | None


def write(state: CompileState, recipe: Recipe, done: int, stem: Path) -> None:
    """Write `stem`.onnx, .json and .txt. Raises UserError if they cannot be written."""
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        emit.write(emit.to_model(state, {}), _with_suffix(stem, ".onnx"))
        _with_suffix(stem, ".txt").write_text(format_graph(state.graph), encoding="utf-8")
        _with_suffix(stem, ".json").write_text(_pretty(_to_json(state, recipe, done)), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the dump: {error.strerror}", str(stem)) from error


def read(path: Path, registry: Registry) -> Snapshot:
    """Read the snapshot that a path ending in .onnx or .json, or without ending, names.

    Raises UserError for one that is missing, damaged, of another format, or that needs a target that is not known.
    """
    stem = path.with_suffix("") if path.suffix in (".onnx", ".json") else path
    data = read_json(stem)
    try:
        state = _state(data, ir.from_proto(read_model(_with_suffix(stem, ".onnx"))), registry)
        found = data["calibration"]
        return Snapshot(state, _recipe(data, found), int(data["done"]), None if found is None else found["digest"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the snapshot is damaged: {type(error).__name__}: {error}", str(stem)) from error


def read_json(stem: Path) -> dict[str, Any]:
    """The side tables of a snapshot as plain data. Raises UserError if they are missing, damaged or of another format."""
    path = _with_suffix(stem, ".json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("a snapshot, as --dump writes it, has side tables; there is no such file", str(path)) from None
    except OSError as error:
        raise UserError(f"cannot read it: {error.strerror}", str(path)) from error
    except ValueError as error:
        raise UserError(f"the snapshot is damaged: {error}", str(path)) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"not a snapshot of format {FORMAT}, the one that this version reads", str(path))
    return data


def _with_suffix(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)  # the name of a pass may hold a dot


def _pretty(data: Mapping[str, Any]) -> str:
    """JSON with one line for each entry of a table."""

    def entries(value: Any) -> str:
        if not isinstance(value, dict) or not value:
            return json.dumps(value)
        return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"

    return "{\n" + ",\n".join(f" {json.dumps(key)}: {entries(value)}" for key, value in data.items()) + "\n}\n"


def _to_json(state: CompileState, recipe: Recipe, done: int) -> dict[str, Any]:
    names = [p.strip() for p in recipe.pipeline.split(",")] if recipe.pipeline else []
    return {
        "format": FORMAT,
        "qcompiler": __version__,
        "model": recipe.model,
        "pipeline": recipe.pipeline,
        "done": done,
        "remaining": ",".join(names[done:]),
        "load": list(recipe.load),
        "calibration": _data_to_json(recipe.data, state.phase),
        "phase": state.phase.name.lower(),
        "target": {"name": state.target.name, "per_channel": state.target.per_channel},
        "keep_float": dict(state.keep_float),
        "skip": list(state.skip),
        "float_work": [asdict(work) for work in state.float_work],
        "predicted": state.predicted,
        "attention": asdict(state.attention),
        "metadata": state.metadata,
        "notes": state.notes,
        "corrected": sorted(state.corrected),
        "origin": state.origin,
        "counterparts": {name: _counterpart_to_json(c) for name, c in state.counterparts.items()},
        "blocks": {name: _block_to_json(block) for name, block in state.blocks.items()},
        "specs": {name: asdict(spec) for name, spec in state.specs.items()},
        "ties": state.ties,
        "params": {name: _params_to_json(params) for name, params in state.params.items()},
        "tables": {name: base64.b64encode(table).decode() for name, table in state.tables.items()},
        "integers": {name: _array_to_json(values) for name, values in state.integers.items()},
        "means": {name: _array_to_json(values) for name, values in state.means.items()},
        "imported": {name: _params_to_json(params) for name, params in state.imported.items()},
        "shapes": {t.name: list(t.shape) for t in _untyped(state.graph)},
    }


def _untyped(graph: ir.Graph) -> Iterable[ir.Tensor]:
    """Tensors with a shape but no type: an ONNX file cannot hold them."""
    every = [t for g in ir.all_graphs(graph) for t in ir.tensors(g)]
    return [t for t in every if not ir.is_constant(t) and t.dtype is None and t.shape is not None]


def _data_to_json(data: Data | None, phase: Phase) -> dict[str, Any] | None:
    """The digest is known, at no cost, once the data has been read."""
    if data is None:
        return None
    return {
        "path": data.path,
        "samples": data.samples,
        "preprocess": None if data.preprocess is None else asdict(data.preprocess),
        "digest": data.digest() if phase >= Phase.CALIBRATED else None,
    }


def _block_to_json(block: Block) -> dict[str, Any]:
    bounds = {key: np.asarray(bound).item() for key, bound in (("low", block.low), ("high", block.high))}
    return {**asdict(block), **{key: bound if math.isfinite(bound) else None for key, bound in bounds.items()}}


def _params_to_json(params: QuantParams) -> dict[str, Any]:
    scale = np.asarray(params.scale, np.float32).astype(np.float64).tolist()  # float64 holds every float32
    return {
        "spec": asdict(params.spec),
        "scale": scale,
        "zero_point": int(params.zero_point),
        "exponents": params.exponents,
    }


def _counterpart_to_json(counterpart: Counterpart) -> list[Any]:
    source, factor, offset, reshaped = counterpart
    return [source, factor.tolist(), offset.tolist(), reshaped]


def _array_to_json(values: NDArray[Any]) -> list[Any]:
    return [values.dtype.name, values.shape, base64.b64encode(values.tobytes()).decode()]


def _array(dtype: str, shape: list[int], values: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(values, validate=True), dtype).reshape(shape)


def _state(data: Mapping[str, Any], graph: ir.Graph, registry: Registry) -> CompileState:
    name = data["target"]["name"]
    if name not in registry.targets:
        raise UserError(f"no target is called {name!r}{closest(name, registry.targets)}", "target of the snapshot")
    for tensor in (t for g in ir.all_graphs(graph) for t in ir.tensors(g)):
        if tensor.name in data["shapes"]:
            tensor.shape = data["shapes"][tensor.name]
    return CompileState(
        graph,
        replace(registry.targets[name], per_channel=data["target"]["per_channel"]),
        registry.ops,
        Phase[data["phase"].upper()],
        skip=tuple(data["skip"]),
        float_work=tuple(Work(**work) for work in data["float_work"]),
        predicted=None if data["predicted"] is None else (data["predicted"][0], data["predicted"][1]),
        attention=QuantSpec(**data["attention"]),
        blocks={root: _block(block) for root, block in data["blocks"].items()},
        specs={tensor: QuantSpec(**spec) for tensor, spec in data["specs"].items()},
        ties=data["ties"],
        params={tensor: _params(params) for tensor, params in data["params"].items()},
        tables={node: base64.b64decode(table, validate=True) for node, table in data["tables"].items()},
        origin={node: tuple(layers) for node, layers in data["origin"].items()},
        counterparts={tensor: _counterpart(*entry) for tensor, entry in data["counterparts"].items()},
        integers={tensor: _array(*entry) for tensor, entry in data["integers"].items()},
        means={tensor: _array(*entry) for tensor, entry in data["means"].items()},
        imported={tensor: _params(params) for tensor, params in data["imported"].items()},
        corrected=set(data["corrected"]),
        keep_float=dict(data["keep_float"]),
        collectors=registry.collectors,
        metadata=data["metadata"],
        notes=data["notes"],
    )


def _block(data: Mapping[str, Any]) -> Block:
    low = -math.inf if data["low"] is None else data["low"]
    high = math.inf if data["high"] is None else data["high"]
    lists = {key: tuple(data[key]) for key in ("nodes", "outputs")}
    return Block(**{**data, **lists, "low": low, "high": high})


def _counterpart(source: str, factor: Any, offset: Any, reshaped: bool) -> Counterpart:
    return Counterpart(source, np.asarray(factor, np.float64), np.asarray(offset, np.float64), reshaped)


def _params(data: Mapping[str, Any]) -> QuantParams:
    return QuantParams(
        QuantSpec(**data["spec"]), np.asarray(data["scale"], np.float32), data["zero_point"], tuple(data["exponents"])
    )


def _recipe(data: Mapping[str, Any], found: Mapping[str, Any] | None) -> Recipe:
    known = None
    if found is not None:
        plan, digest = found["preprocess"], found["digest"]
        images = None if plan is None else Preprocess(**{k: _tupled(v) for k, v in plan.items()})
        known = Data(found["path"], found["samples"], images, lambda: str(digest))
    return Recipe(data["model"], data["pipeline"], tuple(data["load"]), known)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
