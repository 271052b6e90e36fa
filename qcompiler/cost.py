"""What inference costs: the work of a model in units, and a table of what a unit takes on a machine.

A table is linear. Each kind of work (`float.pointwise`, `int8.depthwise`, `quantize.map` …) has nanoseconds per node, per
multiply-accumulate, per element read and so on, and the time of a model is the sum over its work. Not all kernels use a second
thread, so a table may hold one for two threads as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path

from qcompiler.errors import UserError

FORMAT = 1
ONE, TWO = "nanoseconds", "nanoseconds on two threads"


@dataclass(frozen=True)
class Work:
    """An amount of one kind of work. `nodes`: operators. `macs`: multiply-accumulates. `columns`: elements of the matrix that a
    convolution is unrolled to. `reads`, `writes`: elements of activations; `far`: those beyond the size of a near cache.
    `weights`: elements of constants. `positions`: places in space, times the size of a kernel.

    Channels count as the kernels process them, rounded up.
    """

    kind: str
    nodes: float = 1.0
    macs: float = 0.0
    columns: float = 0.0
    reads: float = 0.0
    writes: float = 0.0
    weights: float = 0.0
    positions: float = 0.0
    far: float = 0.0


NEAR = 1 << 19
"""Bytes of an activation that its maker leaves in a cache of the core for its readers."""


def far(kind: str, *sizes: float) -> float:
    """The elements of tensors of these sizes that lie beyond a near cache; those of kinds in int8 take a byte, others four."""
    near = NEAR if kind.startswith("int8.") else NEAR / 4
    return sum(max(0.0, size - near) for size in sizes)


UNITS = tuple(f.name for f in fields(Work) if f.name != "kind")


@dataclass(frozen=True)
class CostTable:
    """Nanoseconds per unit, by kind of work, on one thread. `machine`: where it was measured, for people. `two`: the same on two
    threads, if measured.
    """

    kinds: Mapping[str, Mapping[str, float]]
    machine: Mapping[str, str] = field(default_factory=dict)
    two: CostTable | None = None

    def seconds(self, work: Work) -> float:
        """The time of one piece of work; kinds that the table lacks cost what `float.other` or `int8.other` does."""
        rates = self.kinds.get(work.kind)
        if rates is None:
            rates = self.kinds.get(f"{work.kind.partition('.')[0]}.other", {})
        return 1e-9 * sum(rate * float(getattr(work, unit)) for unit, rate in rates.items())

    def total(self, works: Iterable[Work]) -> float:
        """The seconds of all the work."""
        return sum(self.seconds(work) for work in works)

    def to_json(self) -> str:
        """The text of a table file."""
        rates = {ONE: self._lines()} | ({} if self.two is None else {TWO: self.two._lines()})
        tables = ", ".join(f'"{name}": {{\n{lines}\n}}' for name, lines in rates.items())
        return f'{{"format": {FORMAT}, "machine": {json.dumps(dict(self.machine))}, {tables}}}\n'

    def _lines(self) -> str:
        kinds = {
            kind: {unit: float(f"{rate:.4g}") for unit, rate in rates.items() if rate}
            for kind, rates in sorted(self.kinds.items())
        }
        return ",\n".join(f"  {json.dumps(kind)}: {json.dumps(rates)}" for kind, rates in kinds.items())


def read_table(path: Path) -> CostTable:
    """Read a file that `qcompile profile` wrote. Raises UserError if it is none."""
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the profile: {error.strerror or error}", str(path)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("this is no profile; make one with `qcompile profile -o FILE`", str(path)) from error


def shipped_table(name: str) -> CostTable | None:
    """The table of this name that comes with the package; None for no name."""
    if not name:
        return None
    return _parse(resources.files("qcompiler").joinpath("profiles", f"{name}.json").read_text(encoding="utf-8"))


def _parse(text: str) -> CostTable:
    data = json.loads(text)
    if data["format"] != FORMAT:
        raise ValueError("unknown format")
    two = CostTable(_rates(data[TWO])) if TWO in data else None
    return CostTable(_rates(data[ONE]), {str(k): str(v) for k, v in data["machine"].items()}, two)


def _rates(data: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    kinds = {str(kind): {unit: float(rates[unit]) for unit in UNITS if unit in rates} for kind, rates in data.items()}
    if not all(rate >= 0 for rates in kinds.values() for rate in rates.values()):
        raise ValueError("a rate is negative")
    return kinds
