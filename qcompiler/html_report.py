"""The report of a compilation as one HTML page that needs nothing else: no network, no file beside it."""

from __future__ import annotations

import importlib.util
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler import __version__, emit, figures
from qcompiler.compile import CompileResult
from qcompiler.errors import UserError
from qcompiler.facts import Facts, LayerRow, gather
from qcompiler.instrument import PassTime
from qcompiler.quant import QuantParams
from qcompiler.recorder import Histogram, Recorder
from qcompiler.report import Report, generic

LIBRARIES = ("onnx", "onnxruntime", "onnx-graphsurgeon", "numpy")
MAX_OPERATORS = 8
"""Operators in the figure of latency."""


def recorder_for(path: Path, model: Path) -> Recorder:
    """What watches the compilation of `model`, once it is sure that the page can be made, and be written to `path`.

    Raises UserError if a package that only the page needs is missing, or nothing can be written there.
    """
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the HTML report needs {' and '.join(missing)}: pip install 'qcompiler[report]'")
    emit.check_path(path, model)
    return Recorder()


def write_report(path: Path, result: CompileResult, recorder: Recorder, command: str = "") -> None:
    """Write the page. `recorder` watched the compilation; `command`: the command line to show.

    Runs both models again; see `gather`. Raises UserError if the file cannot be written.
    """
    page = render(result.report, gather(result, recorder), command)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report: {error.strerror}", str(path)) from error


def _versions() -> list[tuple[str, str]]:
    found = [("qcompiler", __version__), ("python", platform.python_version())]
    for name in LIBRARIES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:  # a variant under another name, such as onnxruntime-gpu
            continue
    return found


def render(report: Report, facts: Facts, command: str = "") -> str:
    """The page as text; all that comes from the model is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415  (an extra)

    environment = Environment(
        loader=PackageLoader("qcompiler"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": _size, "number": _number, "spark": _spark, "band": figures.band, "short": _short}
    return environment.get_template("report.html").render(
        report=report,
        command=command,
        versions=_versions(),
        comparison=facts.comparison,
        layers=sorted(facts.layers, key=_badness),
        weights=sorted(facts.weights, key=lambda row: -row.spread),
        sizes=facts.sizes,
        charts=_charts(facts),
        timeline=_timeline(report.passes),
        in_float=_in_float(report),
        worst=min((o.sqnr for o in report.outputs if o.sqnr is not None), default=None),
        spark=(figures.SPARK_WIDTH, figures.SPARK_HEIGHT),
    )


def _badness(row: LayerRow) -> float:
    return np.inf if row.error is None or row.error.local.sqnr is None else row.error.local.sqnr


def _charts(facts: Facts) -> dict[str, str]:
    """Title -> SVG of the figures that there is something to show in."""
    charts = {}
    errors = [row.error for row in facts.layers]
    if any(errors):
        local = [e.local.sqnr if e else None for e in errors]
        charts["Accuracy along the network"] = figures.accuracy(
            local, [e.accumulated.sqnr if e else None for e in errors]
        )
    operators = _latency_by_operator(facts.layers)
    if operators:
        charts["Latency by operator"] = figures.latency(operators)
    if facts.weights:
        scales = [row.scales for row in facts.weights]
        charts["Weight scales"] = figures.scales(
            [(float(s.min()), float(np.median(s)), float(s.max())) for s in scales]
        )
    return charts


def _latency_by_operator(layers: Iterable[LayerRow]) -> dict[str, tuple[float, float]]:
    """Operator -> (float, int8) milliseconds in integer layers, slowest first."""
    totals: dict[str, tuple[float, float]] = {}
    for row in layers:
        if row.error is not None and (row.error.float_ms or row.error.int8_ms):
            op = row.op.partition(" + ")[0]
            a, b = totals.get(op, (0.0, 0.0))
            totals[op] = (a + (row.error.float_ms or 0.0), b + (row.error.int8_ms or 0.0))
    return dict(sorted(totals.items(), key=lambda item: -max(item[1]))[:MAX_OPERATORS])


def _timeline(passes: list[PassTime]) -> list[tuple[PassTime, float, float]]:
    """Each pass with the start and the width of its bar, in percent of the whole time."""
    total = sum(p.milliseconds for p in passes) or 1.0
    starts = accumulate((p.milliseconds for p in passes), initial=0.0)
    return [(p, 100 * start / total, 100 * p.milliseconds / total) for p, start in zip(passes, starts, strict=False)]


def _in_float(report: Report) -> list[tuple[str, str, list[str]]]:
    """(operator, reason less names and numbers, layers) of what stays float, the most frequent first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in report.layers:
        if not layer.quantized:
            groups.setdefault((layer.op, generic(layer.reason)), []).append(layer.name)
    return sorted(((op, why, names) for (op, why), names in groups.items()), key=lambda group: -len(group[2]))


def _spark(histogram: Histogram, params: QuantParams | None) -> dict[str, Any]:
    """The path of a histogram, and where in it (0 to SPARK_WIDTH) the clip range begins and ends."""
    span = histogram.high - histogram.low or 1.0
    low, high = params.range if params is not None else (histogram.low, histogram.high)
    ends = [figures.SPARK_WIDTH * min(max((edge - histogram.low) / span, 0.0), 1.0) for edge in (low, high)]
    return {"path": figures.sparkline(histogram.counts), "low": round(ends[0], 1), "high": round(ends[1], 1)}


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _short(names: Sequence[str]) -> str:
    """Names with how often each occurs: `QLinearConv, 2 × Mul`."""
    counts = Counter(names)
    return ", ".join(name if n == 1 else f"{n} × {name}" for name, n in counts.items())
