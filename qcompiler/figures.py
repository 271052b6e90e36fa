"""Figures of the HTML report as inline SVG, in colours of the page's style sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_COLOURS = {"#010101": "var(--muted)", "#020202": "var(--line)", "#030303": "var(--float)", "#040404": "var(--int8)"}
"""Placeholders for matplotlib, and what takes their place, so that figures follow the dark and the light theme."""
_INK, _LINE, _FLOAT, _INT8 = _COLOURS

SIZE = (4.8, 2.5)
"""Inches of a figure; text has 8 points."""

SPARK_WIDTH, SPARK_HEIGHT = 120, 26
MAX_POINTS = 240
"""Channels that a band shows one by one; more are drawn in groups."""


def sparkline(counts: ArrayLike) -> str:
    """The path of a histogram, SPARK_WIDTH x SPARK_HEIGHT; the height is the square root of the count, so that tails show."""
    heights = np.sqrt(np.asarray(counts, np.float64))
    top = float(heights.max(initial=0)) or 1.0
    step = SPARK_WIDTH / max(1, heights.size)
    levels = SPARK_HEIGHT * (1 - heights / top)
    steps = "".join(f"V{y:.3g}h{step:.4g}" for y in levels)
    return f"M0 {SPARK_HEIGHT}{steps}V{SPARK_HEIGHT}z"


def band(low: ArrayLike, high: ArrayLike) -> tuple[str, float]:
    """The path of the ranges [low, high] of channels, SPARK_WIDTH wide, zero in the middle; and what half its height is."""
    lows, highs = (np.asarray(edge, np.float64) for edge in (low, high))
    parts = min(MAX_POINTS, lows.size)
    starts = np.arange(parts) * lows.size // max(1, parts)
    lows, highs = np.minimum.reduceat(lows, starts), np.maximum.reduceat(highs, starts)
    reach = float(max(np.abs(lows).max(), np.abs(highs).max())) or 1.0
    middle, step = SPARK_HEIGHT / 2, SPARK_WIDTH / parts
    upper = "".join(f"V{middle * (1 - y / reach):.3g}h{step:.4g}" for y in highs)
    lower = "".join(f"V{middle * (1 - y / reach):.3g}h{-step:.4g}" for y in lows[::-1])
    return f"M0 {middle:g}{upper}{lower}z", reach


def accuracy(local: Sequence[float | None], accumulated: Sequence[float | None]) -> str:
    """SQNR along the network, layer by layer; None leaves a gap."""
    figure, axes = _figure("accuracy")
    position = np.arange(1, len(local) + 1)
    size = 4 if len(local) <= 200 else 2
    axes.plot(
        position, _gaps(local), "o", color=_FLOAT, markersize=size, markeredgewidth=0, label="local: this layer alone"
    )
    shown = [i for i, value in enumerate(accumulated) if value is not None]
    line = [accumulated[i] for i in shown]
    axes.plot(
        position[shown], line, "-o", color=_INT8, markersize=size - 1, linewidth=1.2, label="accumulated from the input"
    )
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("SQNR, dB")
    _legend(axes)
    return _svg(figure)


def latency(totals: Mapping[str, tuple[float, float]]) -> str:
    """Milliseconds of float and int8 by operator."""
    figure, axes = _figure("latency")
    rows = np.arange(len(totals))
    for offset, which, colour, label in ((-0.19, 0, _FLOAT, "float"), (0.19, 1, _INT8, "int8")):
        axes.barh(rows + offset, [pair[which] for pair in totals.values()], 0.36, color=colour, label=label)
    axes.set_yticks(rows, list(totals))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("milliseconds in layers of this kind")
    _legend(axes)
    return _svg(figure)


def scales(ranges: Sequence[tuple[float, float, float]]) -> str:
    """Least, median and greatest weight scale of each layer, on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator  # noqa: PLC0415  (an extra)

    figure, axes = _figure("scales")
    position = np.arange(1, len(ranges) + 1)
    low, middle, high = np.array(ranges, np.float64).T
    width = float(np.clip(300 / len(ranges), 1, 6))
    axes.vlines(position, low, high, color=_FLOAT, linewidth=width)
    axes.plot(position, middle, "o", color=_INT8, markersize=min(4, width + 1), markeredgewidth=0)
    axes.set_yscale("log")
    few = high.max() < 1000 * low.min()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if few else (1.0,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("layer with weights")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("scale per channel")
    return _svg(figure)


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, labelcolor=_INK, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)


def _figure(name: str) -> tuple[Any, Any]:
    from matplotlib import rc_context  # noqa: PLC0415  (an extra, and slow to import)
    from matplotlib.figure import Figure  # noqa: PLC0415

    style: Any = {
        "axes.edgecolor": _LINE,
        "axes.labelcolor": _INK,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with rc_context({**style, "font.size": 8, "grid.color": _LINE, "axes.grid": True, "axes.axisbelow": True}):
        figure = Figure(SIZE, layout="constrained")
        figure.set_label(name)
        axes = figure.add_subplot()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
    return figure, axes


def _svg(figure: Any) -> str:
    """The figure as an <svg> element that scales with the page; the same figure gives the same text."""
    from matplotlib import rc_context  # noqa: PLC0415

    text = io.StringIO()
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": f"qcompiler {figure.get_label()}", "text.parse_math": False}
    ):
        figure.savefig(text, format="svg", transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg).replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for placeholder, colour in _COLOURS.items():
        svg = svg.replace(placeholder, colour)
    return svg
