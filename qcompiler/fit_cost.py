"""Measures a cost table on this machine: times small networks, and finds the rates that explain their times best.

Rates are fitted to whole networks, each in float and in int8, so that they account for what ONNX Runtime does between operators
as well: conversions, layouts, fusions.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir, runtime
from qcompiler.concrete_shapes import concrete_shapes
from qcompiler.cost import UNITS, CostTable, Work
from qcompiler.job import prepare
from qcompiler.microbench import Net
from qcompiler.pipeline import Pipeline
from qcompiler.plan import CompileOptions
from qcompiler.runtime import Session
from qcompiler.work import Accountant

Matrix = NDArray[np.float64]

SLICE = 0.005
"""Seconds of one network in each round: short, so that each is timed at many moments, of which the quietest counts."""

_OTHER_DATA = np.zeros(3 << 20, np.uint8)
"""What is touched before each run, so that weights come from where those of a large model do, not from the nearest cache."""

EXPECTED: Mapping[str, float] = {
    "nodes": 500.0,
    "float.macs": 0.008,
    "int8.macs": 0.002,
    "columns": 0.05,
    "reads": 0.04,
    "writes": 0.04,
    "weights": 0.02,
    "positions": 0.5,
    "far": 0.02,
}
"""Nanoseconds per unit, roughly, on any machine: what rates are drawn to that the times do not tell apart."""

PRIOR = 0.02
"""How strongly."""

FLOOR: Mapping[str, float] = {"nodes": 0.8}
"""The least rate, as a share of the expected one, by unit: no operator is free."""

FLOOR_OF_OTHERS = 0.1

LEAST: Mapping[tuple[str, str], float] = {
    ("quantize.map", "far"): 0.08,
    ("dequantize.map", "far"): 0.08,
    ("float.reorder", "far"): 0.03,
}
"""The least nanoseconds of some units: several copies of what is converted pass through memory. Few of the networks are so
large, and to rate this too low scatters float layers over large models."""

SERIAL = ("quantize.map", "quantize.flat", "dequantize.map", "dequantize.flat", "int8.table")
"""Kinds that a second thread does not speed up: on two threads they cost at least what they do on one."""

OUTLIER = 0.1
"""Relative errors beyond which a time counts less."""


@dataclass
class Timed:
    """A network in one precision: its work, a session on one thread and one on two, and the least seconds of a run of each."""

    work: list[Work]
    runners: tuple[Session, Session]
    sample: NDArray[np.float32]
    seconds: tuple[float, float] = (float("inf"), float("inf"))

    def run(self) -> None:
        """Run for a slice of time on one thread, and for one on two."""
        one, two = self.runners
        self.seconds = (
            min(self.seconds[0], self._least(one, time.thread_time)),
            min(self.seconds[1], self._least(two, time.perf_counter)),
        )

    def _least(self, runner: Session, clock: Callable[[], float]) -> float:
        feeds, end, least = {"x": self.sample}, time.perf_counter() + SLICE, float("inf")
        while time.perf_counter() < end:
            _OTHER_DATA[:] += 1
            start = clock()
            runner.run(None, feeds)
            least = min(least, clock() - start)
        return least


def measure_table(
    networks: Sequence[Net], seconds: float = 20.0, progress: Callable[[int, int | None], None] | None = None
) -> tuple[CostTable, float]:
    """Time the networks in turns for about so many seconds, after compiling them, and fit the rates, on one thread and on two.

    Returns the table and the median of its relative errors on one thread.
    """
    timed: list[Timed] = []
    for i, net in enumerate(networks):
        timed += compiled(net)
        if progress is not None:
            progress(i + 1, len(networks))
    end = time.perf_counter() + seconds
    while True:
        for network in timed:
            network.run()
        if time.perf_counter() > end:
            break
    machine = {"cpu": _cpu(), "system": platform.system(), "onnxruntime": version("onnxruntime")}
    works, times = [t.work for t in timed], np.array([t.seconds for t in timed])
    table = fit_table(works, times, machine)
    return table, float(np.median([abs(table.total(t.work) / t.seconds[0] - 1) for t in timed]))


def compiled(net: Net) -> list[Timed]:
    """The network in float, and with all quantized that can be."""
    model, sample = net.model(), net.sample()
    job = prepare(model, [{"x": sample}], CompileOptions(passes="O0", keep_float=net.keep))
    passes = [p for p in job.pipeline.passes if p.name != "place"]
    chosen = next(i for i, p in enumerate(passes) if p.name == "annotate") + 1
    Pipeline(tuple(passes[:chosen])).run(job.state, [])
    shapes = concrete_shapes(job.state)
    assert shapes is not None
    accountant = Accountant(job.state, shapes)
    quantized = {root for root, block in job.state.blocks.items() if block.quantized}
    works = list(job.state.float_work), accountant.total(quantized)
    Pipeline(tuple(passes[chosen:])).run(job.state, [])
    models = model, ir.to_proto(job.state.graph)
    return [
        Timed(work, (runtime.session(model), runtime.session(model, threads=2, idle=True)), sample)
        for work, model in zip(works, models, strict=True)
    ]


def fit_table(works: Sequence[Sequence[Work]], seconds: Matrix, machine: Mapping[str, str]) -> CostTable:
    """The rates that explain the seconds, shape (networks, 2), on one thread and on two."""
    one = fit(works, seconds[:, 0])
    serial = {(kind, unit): rate for kind in SERIAL for unit, rate in one.get(kind, {}).items()}
    return CostTable(one, machine, CostTable(fit(works, seconds[:, 1], serial)))


def fit(
    works: Sequence[Sequence[Work]], seconds: Matrix, least: Mapping[tuple[str, str], float] = MappingProxyType({})
) -> dict[str, dict[str, float]]:
    """Nanoseconds per unit, by kind, that make the relative errors of the sums small; outliers count less, nothing is free.

    `least`: more bounds beside LEAST.
    """
    columns: dict[tuple[str, str], int] = {}
    entries = [
        (row, columns.setdefault((work.kind, unit), len(columns)), amount)
        for row, network in enumerate(works)
        for work in network
        for unit in UNITS
        if (amount := float(getattr(work, unit)))
    ]
    matrix = np.zeros((len(works), len(columns)))
    for row, column, amount in entries:
        matrix[row, column] += amount / (1e9 * seconds[row])
    scale = matrix.max(axis=0)
    matrix /= scale
    expected = scale * np.array([_expected(kind, unit) for kind, unit in columns])
    bounds = {**LEAST, **least}
    floor = expected * np.array([FLOOR.get(unit, FLOOR_OF_OTHERS) for _, unit in columns])
    floor = np.maximum(floor, scale * np.array([bounds.get(column, 0.0) for column in columns]))
    prior, weight = PRIOR * np.eye(len(columns)), np.ones(len(works))
    for _ in range(3):
        target = np.concatenate([weight * (1 - matrix @ floor), PRIOR * np.maximum(expected - floor, 0)])
        rates = floor + nonnegative_least_squares(np.vstack([matrix * weight[:, None], prior]), target)
        error = np.abs(matrix @ rates - 1)
        weight = np.minimum(1, np.sqrt(OUTLIER / np.maximum(error, 1e-9)))
    kinds: dict[str, dict[str, float]] = {kind: {} for kind, _ in columns}
    for (kind, unit), column in columns.items():
        kinds[kind][unit] = float(rates[column] / scale[column])
    for (kind, unit), bound in bounds.items():
        if kind in kinds:
            kinds[kind][unit] = max(bound, kinds[kind].get(unit, 0.0))
    return kinds | _others(kinds)


def _expected(kind: str, unit: str) -> float:
    prefix, _, operator = kind.partition(".")
    if operator.endswith("view"):
        return 0.0
    return EXPECTED[unit] if unit in EXPECTED else EXPECTED[f"{prefix}.{unit}"]


_ELEMENTWISE = frozenset({"nodes", "reads", "writes"})


def _others(kinds: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """What operators cost that no network has: the median of those that only read and write."""
    found = {}
    for prefix in ("float", "int8"):
        simple = [
            r
            for kind, r in kinds.items()
            if kind.startswith(f"{prefix}.") and _ELEMENTWISE <= set(r) <= {*_ELEMENTWISE, "far"}
        ]
        if simple:
            found[f"{prefix}.other"] = {unit: median(r[unit] for r in simple) for unit in sorted(_ELEMENTWISE)}
    return found


def nonnegative_least_squares(matrix: Matrix, target: Matrix) -> Matrix:
    """The x >= 0 with the least |matrix @ x - target|, for columns that are independent (Lawson and Hanson 1974, chapter 23)."""
    gram, moment = matrix.T @ matrix, matrix.T @ target
    size = len(moment)
    x, free = np.zeros(size), np.zeros(size, bool)
    for _ in range(10 * size):
        gradient = np.where(free, 0.0, moment - gram @ x)
        if gradient.max() < 1e-10:
            break
        free[int(gradient.argmax())] = True
        while True:
            trial = np.zeros(size)
            trial[free] = np.linalg.solve(gram[np.ix_(free, free)], moment[free])
            negative = free & (trial <= 0)
            if not negative.any():
                x = trial
                break
            x = x + float((x[negative] / (x[negative] - trial[negative])).min()) * (trial - x)
            free &= x > 1e-14
    return x


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123  (no regular file)
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
