"""Comparison of a compiled model with the float model: how near, how fast, which kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from qcompiler import runtime
from qcompiler.difference import arrays
from qcompiler.errors import UserError
from qcompiler.evaluate import Judge
from qcompiler.quant import QuantParams
from qcompiler.report import OutputMatch, Report, Score, Speed
from qcompiler.runtime import Session
from qcompiler.samples import InputSpec
from qcompiler.state import Feeds
from qcompiler.threads import WORKERS
from qcompiler.traps import find_traps

SQNR_FLOOR = 10.0
"""dB below which an output is called wrong: the error is then a third of the signal."""

EQUAL_FLOOR = 0.5
"""The same for outputs that are no floats: the share of equal elements."""

WORST_SQNR = -999.0
"""dB of an output with values that are not finite, or that should be zero: what JSON can hold."""

RACE_SECONDS = 0.1
RANDOM_SAMPLES = 4


def measure(
    report: Report, before: onnx.ModelProto, after: onnx.ModelProto, samples: Sequence[Feeds], timed: bool = True
) -> None:
    """Fill in the outputs and the warnings of a report, and if `timed` the speed and the kernels.

    `samples` were held back from calibration.
    """
    a, (b, running) = runtime.session(before), _opened(after, timed)
    report.outputs = compare(a, b, samples)
    report.warnings += warnings_of(report.outputs)
    if not timed:
        return
    seconds = runtime.race(a, b, dict(samples[0]), RACE_SECONDS)
    report.speed = Speed(*(round(1e3 * s, 4) for s in seconds))
    if running is None:
        report.notes.append("the kernels are not counted: the temporary folder cannot be written")
        return
    report.kernels = dict(runtime.count_ops(running).most_common())
    report.notes += find_traps(after, running) if report.emit == "kernels" else []


def _opened(model: onnx.ModelProto, explained: bool) -> tuple[Session, onnx.ModelProto | None]:
    """A session, and if it is to be explained, the graph that it runs, unless that cannot be had."""
    if explained:
        try:
            return runtime.session_and_graph(model)
        except (OSError, RuntimeError):
            pass
    return runtime.session(model), None


def warnings_of(outputs: Sequence[OutputMatch]) -> list[str]:
    """One line for each output that is too far from the float model's to be of use."""
    return [f"output '{o.name}' {fault}" for o in outputs if (fault := _fault(o)) is not None]


def _fault(output: OutputMatch) -> str | None:
    if output.not_finite:
        return f"has {output.not_finite} values that are inf or NaN, unlike the float model's"
    if output.sqnr is not None and output.sqnr < SQNR_FLOOR:
        return f"is far from the float model's: {output.sqnr:.1f} dB, below {SQNR_FLOOR:.0f} dB"
    if output.sqnr is None and output.equal < EQUAL_FLOOR:
        return f"is far from the float model's: {output.equal:.0%} of its elements are equal"
    return None


def random_samples(specs: Sequence[InputSpec], params: Mapping[str, QuantParams]) -> list[Feeds]:
    """Seeded inputs over the whole range of each, for a model that came quantized and without data.

    Empty if an input is neither of 8 bits nor float32, or has dynamic axes besides the first.
    """
    rng = np.random.default_rng(0)
    samples: list[Feeds] = []
    for _ in range(RANDOM_SAMPLES):
        feeds: dict[str, Any] = {}
        for spec in specs:
            shape = [1 if i == 0 and not isinstance(d, int) else d for i, d in enumerate(spec.shape or (None, None))]
            sizes = [d for d in shape if isinstance(d, int)]
            if len(sizes) < len(shape) or spec.dtype not in (np.float32, np.int8, np.uint8):
                return []
            if spec.dtype == np.float32:
                low, high = params[spec.name].range if spec.name in params else (-1.0, 1.0)
                feeds[spec.name] = rng.uniform(low, high, sizes).astype(np.float32)
            else:
                limits = np.iinfo(spec.dtype)
                feeds[spec.name] = rng.integers(limits.min, limits.max + 1, sizes).astype(spec.dtype)
        samples.append(feeds)
    return samples


def evaluate(judge: Judge, before: onnx.ModelProto, after: onnx.ModelProto) -> Score:
    """What the judge says of both models."""
    scores = (judge.score(runtime.session(model, threads=0)) for model in (before, after))
    return Score(judge.name, judge.unit, judge.samples, *scores)


def compare(before: Session, after: Session, samples: Sequence[Feeds]) -> list[OutputMatch]:
    """Compare every output on the samples: `SQNR = 10 log10(sum x**2 / sum (x - y)**2)` over all of them.

    Raises UserError if the model `before` does not run.
    """
    names = [output.name for output in before.get_outputs()]
    totals = [_Total() for _ in names]
    for start in range(0, len(samples), WORKERS):  # not all at once, because outputs may be large
        some = samples[start : start + WORKERS]
        try:
            expected = runtime.run_all(before, some)
        except RuntimeError as error:
            raise UserError(str(error), "calibration data") from error
        for wanted, given in zip(expected, runtime.run_all(after, some), strict=True):
            for total, x, y in zip(totals, wanted, given, strict=True):
                total.add(x, y)
    return [total.match(name) for name, total in zip(names, totals, strict=True)]


class _Total:
    """Sums over samples; positions where the float model itself is not finite do not count."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self.equal = self.count = self.not_finite = 0

    def add(self, x: Any, y: Any) -> None:
        """Take in an output; where shapes depend on the data and differ, no element is equal."""
        wanted, given = arrays(x), arrays(y)
        if len(wanted) != len(given):
            self.count += max(sum(a.size for a in wanted), 1)
            return
        for a, b in zip(wanted, given, strict=True):
            if a.shape == b.shape:
                self._add_array(a, b)
            else:
                self.count += max(a.size, 1)

    def _add_array(self, x: Any, y: Any) -> None:
        same = x == y
        if x.dtype.kind == "f":
            same |= np.isnan(x) & np.isnan(y)
            compared = np.isfinite(x) & np.isfinite(y)
            self.not_finite += int(np.count_nonzero(np.isfinite(x) & ~compared))
            wide = x[compared].astype(np.float64)
            self.signal += float(np.sum(wide**2))
            self.noise += float(np.sum((wide - y[compared]) ** 2))
        self.count += x.size
        self.equal += int(np.count_nonzero(same))

    def match(self, name: str) -> OutputMatch:
        share = round(self.equal / self.count, 6) if self.count else 1.0
        return OutputMatch(name, self._sqnr(), share, self.not_finite)

    def _sqnr(self) -> float | None:
        if self.not_finite:
            return WORST_SQNR
        if not self.noise:
            return None
        return max(round(10 * float(np.log10((self.signal + 1e-300) / self.noise)), 2), WORST_SQNR)
