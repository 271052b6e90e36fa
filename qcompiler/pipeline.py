"""Passes, pipelines of passes, and their text form.

`fold-batchnorm,insert-qdq{per_channel=false}` parses to pass objects and prints back to the same text.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, get_type_hints

from qcompiler import supervise
from qcompiler.bodies import run_everywhere
from qcompiler.errors import UserError
from qcompiler.state import CompileState, Phase


class Pass(Protocol):
    """A frozen dataclass whose fields are its options.

    `name`: kebab-case. `requires`: the least phase that it needs. `establishes`: the phase that holds after it, or None if it
    keeps the phase. `run` edits the state in place and returns how many rewrites it made; a second run returns 0.
    A pass with `in_bodies: ClassVar[bool] = True` also runs on the bodies of If, Loop and Scan.
    """

    name: ClassVar[str]
    requires: ClassVar[Phase]
    establishes: ClassVar[Phase | None]

    def run(self, state: CompileState) -> int:
        """Edit the state; return the number of rewrites."""
        ...


class Instrument(Protocol):
    """Watches a pipeline. Each method may do nothing."""

    def before(self, stage: Pass, state: CompileState) -> None:
        """Called before a pass."""

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        """Called after a pass that made `count` rewrites."""

    def failed(self, stage: Pass, state: CompileState, error: Exception) -> None:
        """Called when a pass raised."""


class PassError(Exception):
    """A pass broke: a bug in the pass, not in the user's input. The message names the package, or the file, of the pass."""

    def __init__(self, stage: Pass, error: Exception) -> None:
        self.stage, self.error = stage, error
        super().__init__(f"pass {stage.name} of {home(type(stage))}: {type(error).__name__}: {error}")


def home(kind: type[Any]) -> str:
    """The package that defines a class, or the path of its file if that belongs to no package."""
    module = sys.modules.get(kind.__module__)
    alone = module is not None and not module.__package__ and getattr(module, "__file__", None)
    return str(alone) if alone else kind.__module__.partition(".")[0]


@dataclass(frozen=True)
class Pipeline:
    """Passes that run once, in order."""

    passes: tuple[Pass, ...]

    def run(self, state: CompileState, instruments: Sequence[Instrument] = ()) -> None:
        """Run all passes on the state. Raises PassError if a pass breaks, UserError for bad input."""
        for stage in self.passes:
            if state.phase < stage.requires:
                raise UserError(
                    f"pass {stage.name} needs phase {stage.requires.name.lower()}, "
                    f"but the model is in phase {state.phase.name.lower()}",
                    "pipeline",
                )
            self._run_one(stage, state, instruments)

    @staticmethod
    def _run_one(stage: Pass, state: CompileState, instruments: Sequence[Instrument]) -> None:
        for instrument in instruments:
            instrument.before(stage, state)
        state.refusals = {}
        supervise.doing(f"in pass {stage.name}")
        try:
            count = run_everywhere(stage.run, state) if getattr(stage, "in_bodies", False) else stage.run(state)
            if stage.establishes is not None:
                state.phase = max(state.phase, stage.establishes)
            for instrument in instruments:
                instrument.after(stage, state, count)
        except MemoryError as error:
            raise UserError(f"not enough memory: {error}", f"pass {stage.name}") from error
        except Exception as error:
            for instrument in instruments:
                instrument.failed(stage, state, error)
            if isinstance(error, UserError):
                raise
            raise PassError(stage, error) from error

    def until(self, stop: str) -> Pipeline:
        """The passes up to the one of that name, or up to the last that establishes the phase of that name.

        Raises UserError if `stop` names neither.
        """
        names = [p.name for p in self.passes]
        phases = {phase.name.lower(): phase for phase in Phase}
        if stop in names:
            return Pipeline(self.passes[: names.index(stop) + 1])
        if stop.lower() in phases:
            last = [i for i, p in enumerate(self.passes) if (p.establishes or 0) == phases[stop.lower()]]
            if last:
                return Pipeline(self.passes[: last[-1] + 1])
        raise UserError(f"no pass or phase {stop!r} in the pipeline; passes: {', '.join(names)}", "--until")

    def __str__(self) -> str:
        return ",".join(format_pass(p) for p in self.passes)


def format_pass(stage: Pass) -> str:
    """The text of one pass: its name, and the options that differ from their defaults."""
    options = [
        f"{f.name}={format_value(getattr(stage, f.name))}"
        for f in fields(stage)  # type: ignore[arg-type]
        if getattr(stage, f.name) != f.default
    ]
    return stage.name + ("{" + " ".join(options) + "}" if options else "")


def format_value(value: Any) -> str:
    """The text of an option's value."""
    return str(value).lower() if isinstance(value, bool) else str(value)


_ITEM = re.compile(r"\s*([a-z0-9][a-z0-9_.-]*)\s*(?:\{([^{}]*)\})?\s*")


def parse_pipeline(text: str, passes: Mapping[str, type[Pass]]) -> Pipeline:
    """Parse the text form. Raises UserError that names what is unknown or misspelt."""
    stages, position = [], 0
    text = text.strip().rstrip(",")
    while position < len(text):
        match = _ITEM.match(text, position)
        if not match:
            raise UserError(f"cannot read {text[position : position + 20]!r} in the pipeline text", "--passes")
        stages.append(_make_pass(match[1], match[2] or "", passes))
        position = match.end()
        if position < len(text):
            if text[position] != ",":
                raise UserError(f"expected ',' before {text[position : position + 20]!r}", "--passes")
            position += 1
    return Pipeline(tuple(stages))


def _make_pass(name: str, options: str, passes: Mapping[str, type[Pass]]) -> Pass:
    if name not in passes:
        raise UserError(f"no pass is called {name!r}{closest(name, passes)}", "--passes")
    kind = passes[name]
    hints = get_type_hints(kind)
    known = {f.name: hints[f.name] for f in fields(kind)}  # type: ignore[arg-type]
    values = {}
    for item in re.split(r"[\s,]+", options.strip()) if options.strip() else []:
        key, _, value = item.partition("=")
        if key not in known or not value:
            raise UserError(f"{name} has no option {item!r}; options: {', '.join(known) or 'none'}", "--passes")
        values[key] = _parse_value(name, key, value, known[key])
    return kind(**values)


def _parse_value(name: str, key: str, text: str, kind: Any) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        raise UserError(f"{name}: {key}={text} is not a {kind.__name__}", "--passes") from None


def closest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name nearest to a misspelt one, else the list of all."""
    import difflib  # noqa: PLC0415  (only on errors)

    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
