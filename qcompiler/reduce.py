"""Reduce: the smallest part of a model, and the fewest samples, that still fail in the same way."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from qcompiler import emit, ir, runtime, supervise
from qcompiler.data import as_source
from qcompiler.errors import UserError
from qcompiler.instrument import Verify
from qcompiler.ir import Node, Tensor
from qcompiler.job import finish, prepare
from qcompiler.load import input_specs, load_model
from qcompiler.pipeline import PassError
from qcompiler.plan import CompileOptions
from qcompiler.predicate import CommandFails, Expression, Inaccurate
from qcompiler.state import Feeds

Failure = Callable[[onnx.ModelProto, Sequence[Feeds]], str | None]
"""Returns how compiling a model with these samples fails, in a few words, or None if it does not."""


@dataclass(frozen=True)
class Reduced:
    """The smallest model found that fails, with the samples for its inputs, how it fails, and the steps that led to it."""

    model: onnx.ModelProto
    samples: tuple[Feeds, ...]
    failure: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Crashes:
    """Compilation fails if it ends with an internal error: a pass breaks, or an invariant, or the result is not valid."""

    options: CompileOptions

    def __call__(self, model: onnx.ModelProto, samples: Sequence[Feeds]) -> str | None:
        """The pass and the type of its error, so that another crash is not taken for this one."""
        try:
            _compiled(model, samples, self.options)
        except UserError:
            return None
        except PassError as error:
            return f"pass {error.stage.name}: {type(error.error).__name__}"
        except Exception as error:
            return type(error).__name__
        return None


@dataclass(frozen=True)
class IsInaccurate:
    """Compilation fails if an expression over the accuracy on the samples holds; see `predicate.Expression`."""

    options: CompileOptions
    expression: Expression

    def __call__(self, model: onnx.ModelProto, samples: Sequence[Feeds]) -> str | None:
        """The expression if it holds."""
        try:
            compiled = _compiled(model, samples, self.options)
            failure = Inaccurate(self.expression, model, samples)(compiled)
        except (UserError, PassError, emit.EmitError, RuntimeError):
            return None
        return None if failure is None else self.expression.text


@dataclass(frozen=True)
class CommandExits:
    """A model fails if a command exits non-zero; `{model}` stands for its file, `{calib}` for a folder with the samples."""

    command: str

    def __call__(self, model: onnx.ModelProto, samples: Sequence[Feeds]) -> str | None:
        """The exit code unless it is 0."""
        with supervise.scratch() as folder:
            write_samples(samples, folder)
            return CommandFails(self.command.replace("{calib}", shlex.quote(str(folder))))(model)


def _compiled(model: onnx.ModelProto, samples: Sequence[Feeds], options: CompileOptions) -> onnx.ModelProto:
    job = prepare(model, [dict(sample) for sample in samples], options)
    job.pipeline.run(job.state, [*job.guards, Verify()])
    return finish(job)


def reduce(
    model: str | Path | onnx.ModelProto,
    calib: object,
    fails: Failure,
    options: CompileOptions,
    progress: Callable[[str], None] = lambda _: None,
) -> Reduced:
    """Shrink a model while it fails in the same way.

    First the samples: 1, 2, 4 … of them, then the nodes, by delta debugging (Zeller and Hildebrandt 2002): halves, quarters
    … down to single ones are cut out in turn. What the rest reads from there becomes an input, fed with what the whole model
    computes. The same arguments give the same result. Raises UserError if the whole model does not fail.
    """
    whole = load_model(model)
    samples: list[Feeds] = list(as_source(calib, input_specs(whole), options.preprocess, options.samples))
    failure = fails(whole, samples)
    if failure is None:
        raise UserError("compiling the model does not fail", "model")
    search = _Search(whole, fails, failure, progress)
    search.choose_samples(samples)
    search.cut_nodes()
    return Reduced(search.model, tuple(search.fed), failure, tuple(search.steps))


def write_samples(samples: Sequence[Feeds], folder: Path) -> None:
    """Write samples as 000.npz, 001.npz …, which --calib reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9][0-9].npz"):
        old.unlink()
    for i, sample in enumerate(samples):
        np.savez(folder / f"{i:03d}.npz", **sample)  # type: ignore[arg-type]


class _Search:
    """The search for fewer samples and nodes. A candidate is a choice of nodes of the whole model, in their order.

    `model`, `fed`: the smallest model that fails, and what its inputs are fed; `steps`: how it came about.
    """

    def __init__(self, whole: onnx.ModelProto, fails: Failure, failure: str, progress: Callable[[str], None]) -> None:
        self.model = whole
        self.fed: list[Feeds] = []
        self.steps: list[str] = []
        self._graph = ir.from_proto(whole)
        self._nodes: list[Node] = [n for n in self._graph.nodes if n.op != "Constant"]  # these stay with their readers
        self._fails, self._failure, self._progress = fails, failure, progress
        self._samples: list[Feeds] = []
        self._declared = {value.name: value for value in (*whole.graph.input, *whole.graph.output)}

    def choose_samples(self, samples: list[Feeds]) -> None:
        """Keep the first 1, 2, 4 … samples that suffice."""
        count = 1
        while count < len(samples):
            self._progress(f"{count} of {len(samples)} samples")
            if self._fails(self.model, samples[:count]) == self._failure:
                self.steps.append(f"keep {count} of {len(samples)} samples")
                break
            count *= 2
        self._samples = self.fed = samples[:count]
        made = [t for n in self._nodes for t in n.outputs if not t.is_empty()]
        values = self._values(made, samples[0])
        for name, value in values.items():
            if isinstance(value, np.ndarray) and name not in self._declared:
                kind = helper.np_dtype_to_tensor_dtype(value.dtype)
                self._declared[name] = helper.make_tensor_value_info(name, kind, [None] * value.ndim)

    def cut_nodes(self) -> None:
        """Cut out ever smaller runs of nodes, single ones until none of them can go."""
        size = len(self._nodes) // 2
        while size:
            before, start = len(self._nodes), 0
            while start < len(self._nodes):
                start += 0 if self._cut(start, size) else size
            if size > 1 or len(self._nodes) == before:
                size //= 2

    def _cut(self, start: int, size: int) -> bool:
        gone, kept = self._nodes[start : start + size], [*self._nodes[:start], *self._nodes[start + size :]]
        self._progress(f"{len(self._nodes)} nodes: without {len(gone)} of them")
        candidate = self._candidate(kept)
        if candidate is None or self._fails(*candidate) != self._failure:
            return False
        self._nodes, (self.model, self.fed) = kept, candidate
        shown = gone if len(gone) < MAX_SHOWN else [gone[0], gone[-1]]
        names = (", " if shown is gone else " … ").join(n.name or n.outputs[0].name for n in shown)
        self.steps.append(f"cut {names}: {len(kept)} nodes are left")
        return True

    def _candidate(self, kept: Sequence[Node]) -> tuple[onnx.ModelProto, list[Feeds]] | None:
        """The model of the kept nodes, and samples for its inputs; None if there is no such model."""
        inputs, outputs = self._ends(kept)
        if not outputs or any(t.name not in self._declared for t in (*inputs, *outputs)):
            return None
        given = [t for t in inputs if not t.inputs]
        cut = [t for t in inputs if t.inputs]
        fed: list[Feeds] = [{**{t.name: s[t.name] for t in given}, **self._values(cut, s)} for s in self._samples]
        model = ir.submodel(inputs, outputs, self._graph.opset)
        for values in (model.graph.input, model.graph.output):
            for value in values:
                value.CopyFrom(self._declared[value.name])
        for value in model.graph.input:
            if value.name in {t.name for t in cut}:
                value.CopyFrom(_fixed(value, [sample[value.name].shape for sample in fed]))
        return model, fed

    def _ends(self, kept: Sequence[Node]) -> tuple[list[Tensor], list[Tensor]]:
        """What the kept nodes read from elsewhere, and what they write that is an output or that none of them reads."""
        made = {id(t): t for n in kept for t in n.outputs if not t.is_empty()}
        read = {id(t): t for n in kept for t in (*n.inputs, *ir.captures(n)) if not t.is_empty()}
        inputs = [t for key, t in read.items() if key not in made and not _is_constant(t)]
        outputs = [t for key, t in made.items() if key not in read or ir.is_output(self._graph, t)]
        return inputs, outputs

    def _values(self, wanted: Sequence[Tensor], sample: Feeds) -> dict[str, Any]:
        """What the whole model computes for these tensors."""
        if not wanted:
            return {}
        runner = runtime.session(ir.submodel(self._graph.inputs, wanted, self._graph.opset))
        return {t.name: value for t, value in zip(wanted, runtime.run(runner, sample), strict=True)}


MAX_SHOWN = 4
"""Longer runs of nodes are shown by their ends."""


def _is_constant(tensor: Tensor) -> bool:
    maker = ir.producer(tensor)
    return ir.is_constant(tensor) or (maker is not None and maker.op == "Constant")


def _fixed(value: onnx.ValueInfoProto, shapes: Sequence[tuple[int, ...]]) -> onnx.ValueInfoProto:
    """The declaration of a tensor with the axes that are the same in all samples."""
    dims = [sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True)]
    return helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, dims)
