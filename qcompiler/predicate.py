"""Tests that a model passes or fails: an expression over its accuracy, or a command."""

from __future__ import annotations

import ast
import operator
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from qcompiler import emit, runtime, supervise
from qcompiler.difference import OutputDifference
from qcompiler.errors import UserError
from qcompiler.state import Feeds

Fails = Callable[[onnx.ModelProto], str | None]
"""Returns how a model fails, in a few words, or None if it does not."""

METRICS = ("sqnr", "cosine", "max_error", "agreement")

_COMPARISONS: Mapping[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


@dataclass(frozen=True)
class Expression:
    """A test such as `sqnr < 20 or agreement < 0.9`, true for a model that fails.

    Comparisons of numbers with `sqnr` (dB, infinite if exact), `cosine`, `max_error` and `agreement`, joined by and, or, not.
    Of several outputs the worst counts. Raises UserError for anything else.
    """

    text: str

    def __post_init__(self) -> None:
        _evaluate(self._tree(), dict.fromkeys(METRICS, 1.0))

    def _tree(self) -> ast.expr:
        try:
            return ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise UserError(f"cannot read {self.text!r}; write a comparison such as 'sqnr < 20'", "--fails") from None

    def holds(self, metrics: Mapping[str, float]) -> bool:
        """Whether it is true. Raises UserError if it needs a metric that the model's outputs do not give."""
        return bool(_evaluate(self._tree(), metrics))


def _evaluate(tree: ast.expr, metrics: Mapping[str, float]) -> bool:
    """The truth of an expression; all of it is looked at, so that a mistake in any part is found."""
    match tree:
        case ast.BoolOp(op=joint, values=parts):
            truths = [_evaluate(part, metrics) for part in parts]
            return all(truths) if isinstance(joint, ast.And) else any(truths)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _evaluate(operand, metrics)
        case ast.Compare(left=left, ops=signs, comparators=others):
            numbers = [_number(part, metrics) for part in (left, *others)]
            tests = [_COMPARISONS[type(sign)] for sign in signs if type(sign) in _COMPARISONS]
            if len(tests) == len(signs):
                return all(test(x, y) for test, x, y in zip(tests, numbers, numbers[1:], strict=False))
    raise UserError(f"{ast.unparse(tree)!r} is not a comparison such as 'sqnr < 20'", "--fails")


def _number(tree: ast.expr, metrics: Mapping[str, float]) -> float:
    match tree:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return float(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, metrics)
        case ast.Name(id=name) if name in metrics:
            return metrics[name]
        case ast.Name(id="agreement"):
            raise UserError("there is no agreement: no output has the shape [N, C]", "--fails")
    raise UserError(f"{ast.unparse(tree)!r} is neither a number nor one of {', '.join(METRICS)}", "--fails")


class Inaccurate:
    """A model fails if an expression holds on samples, against the float model. Raises UserError if that does not run."""

    def __init__(self, expression: Expression, reference: onnx.ModelProto, samples: Sequence[Feeds]) -> None:
        self._expression = expression
        self._samples = samples
        try:
            runner = runtime.session(reference)
            self._wanted = [runtime.run(runner, feeds) for feeds in samples]
        except RuntimeError as error:
            raise UserError(str(error), "the float model") from error
        self._names = [o.name for o in runner.get_outputs()]

    def __call__(self, model: onnx.ModelProto) -> str | None:
        """The metrics if the expression holds."""
        try:
            runner = runtime.session(model)
            given = [runtime.run(runner, feeds) for feeds in self._samples]
        except (RuntimeError, UserError) as error:
            return str(error)
        metrics = self._metrics(given)
        text = ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())
        return text if self._expression.holds(metrics) else None

    def _metrics(self, given: Sequence[Sequence[Any]]) -> dict[str, float]:
        totals = [OutputDifference(name) for name in self._names]
        for wanted, outputs in zip(self._wanted, given, strict=True):
            for total, x, y in zip(totals, wanted, outputs, strict=True):
                total.add(x, y)
        found = [total.error() for total in totals]
        metrics = {
            "sqnr": min(float("inf") if o.error.sqnr is None else o.error.sqnr for o in found),
            "cosine": min(o.error.cosine for o in found),
            "max_error": max(o.error.max_error for o in found),
        }
        agreement = [o.agreement for o in found if o.agreement is not None]
        return {**metrics, "agreement": min(agreement)} if agreement else metrics


@dataclass(frozen=True)
class CommandFails:
    """A model fails if a command exits non-zero; `{model}` in the command stands for the file. Runs without a shell.

    Raises UserError if the command does not name the model or cannot be started.
    """

    command: str

    def __post_init__(self) -> None:
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise UserError(f"cannot read the command: {error}", "--fails-cmd") from None
        if not any("{model}" in word for word in words[1:]):
            raise UserError("the command does not name the model: write {model} where its path goes", "--fails-cmd")

    def __call__(self, model: onnx.ModelProto) -> str | None:
        """The exit code unless it is 0."""
        with supervise.scratch() as folder:
            path = folder / "model.onnx"
            emit.write(model, path)
            words = [word.replace("{model}", str(path)) for word in shlex.split(self.command)]
            try:
                done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
            except OSError as error:
                raise UserError(f"cannot run {words[0]!r}: {error.strerror}", "--fails-cmd") from error
        return f"the command exits with {done.returncode}" if done.returncode else None
