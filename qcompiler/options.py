"""Options that several commands share, and what becomes of them."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qcompiler import supervise
from qcompiler.errors import UserError

if TYPE_CHECKING:
    from qcompiler.images import Preprocess
    from qcompiler.plan import CompileOptions, Progress

FORMATTING = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
PATH = click.Path(path_type=Path)

Command = TypeVar("Command", bound=Callable[..., Any])


def numbers(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    """Parse `0.485,0.456,0.406`."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 0.485,0.456,0.406") from None


def size(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """Parse `224` or `240x320`."""
    try:
        parts = [] if text is None else [int(part) for part in text.lower().split("x")]
    except ValueError:
        parts = [0, 0, 0]
    if len(parts) > 2:
        raise click.BadParameter(f"{text!r} is not a size such as 224 or 240x320 (height x width)")
    return (parts[0], parts[-1]) if parts else None


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def _limit_memory(ctx: click.Context, param: click.Parameter, text: str | None) -> None:
    """Parse `8GB`, `500M` or a number of bytes, and tell the process that watches."""
    if text is None:
        return
    match = re.fullmatch(r"([\d.]+) *([kmgt]?)b?", text.strip().lower())
    try:
        memory = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    except ValueError:
        memory = 0
    if not memory:
        raise click.BadParameter(f"{text!r} is not an amount of memory such as 8GB or 500MB")
    supervise.limit(memory=memory)


def _limit_time(ctx: click.Context, param: click.Parameter, seconds: float | None) -> None:
    if seconds is not None:
        if not math.isfinite(seconds):
            raise click.BadParameter(f"{seconds} is not a number of seconds")
        supervise.limit(seconds=seconds)


LIMITS = (
    click.Option(
        ["--time-limit"],
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        callback=_limit_time,
        expose_value=False,
        help="Give up after so long.",
    ),
    click.Option(
        ["--memory-limit"],
        metavar="SIZE",
        callback=_limit_memory,
        expose_value=False,
        help="Give up rather than take more memory, such as 8GB.  [default: 90 % of the machine's]",
    ),
)
"""Options of every command, which bound its process."""


def _integer(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    return None if text is None else int(text)


def _all(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator that adds several options, in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


load_option = click.option(
    "--load", multiple=True, type=PATH, metavar="FILE.py", help="A plug-in file for this run; repeatable."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")

data_options = _all(
    click.option(
        "--calib", type=PATH, help="Calibration data: a folder or a file of samples of what the model is fed."
    ),
    click.option("--samples", type=click.IntRange(min=1), help="Use at most so many calibration samples."),
    click.option("--preset", help="Image preprocessing: unit, raw, inception, imagenet or imagenet-tf."),
    click.option("--resize", type=click.IntRange(min=1), help="Scale images so that the short side has this length."),
    click.option(
        "--crop", callback=size, metavar="SIZE", help="Cut this size from the centre.  [default: the model's]"
    ),
    click.option("--mean", callback=numbers, metavar="NUMBERS", help="Subtract this, for all channels or each."),
    click.option("--std", callback=numbers, metavar="NUMBERS", help="Divide by this, after the mean."),
    click.option("--scale", type=float, help="Multiply pixels 0..255 by this, before the mean."),
    click.option("--bgr/--rgb", default=None, help="The order of the channels."),
    click.option(
        "--layout", type=click.Choice(["auto", "NCHW", "NHWC"]), help="The order of the axes.  [default: auto]"
    ),
)


class _CollectorOption(click.Option):
    """Names the collectors that there are when help is asked for, so that nothing is imported before."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        from qcompiler.collectors import COLLECTORS  # noqa: PLC0415

        record = super().get_help_record(ctx)
        return record and (record[0], f"{record[1]}: {', '.join(COLLECTORS)}, or one from a plug-in.")


pipeline_options = _all(
    click.option(
        "--emit",
        type=click.Choice(["kernels", "integer", "qdq"]),
        default="kernels",
        show_default=True,
        help="Fast kernels, plain integer operators, or quantize/dequantize pairs; all compute the same.",
    ),
    click.option(
        "-O",
        "level",
        type=click.IntRange(0, 3),
        help="Time for accuracy, from 0, min-max ranges only, to 3, all there is.  [default: 2]",
    ),
    click.option(
        "--mode",
        metavar="NAME",
        help="static, dynamic, weight-only, float16, or a pipeline of a plug-in; all but static need no data.  [default: static]",
    ),
    click.option("--bits", type=click.Choice(["4", "8"]), callback=_integer, help="Of weights, in mode weight-only."),
    click.option("--target", default="ort-cpu", show_default=True, help="The hardware (see `qcompile targets`)."),
    click.option("--collector", cls=_CollectorOption, help="How activation ranges are measured"),
    click.option(
        "--optimize",
        type=click.Choice(["latency", "size", "integer"]),
        help="Quantize what makes inference faster, all that can be, or that and emit integers.  [default: latency]",
    ),
    click.option("--profile", type=PATH, help="A file of `qcompile profile`: what operators cost on your machine."),
    click.option("--per-tensor", is_flag=True, help="One weight scale per tensor instead of one per output channel."),
    click.option(
        "--keep-float",
        multiple=True,
        metavar="PATTERN",
        help="Keep nodes or outputs of such names in float; repeatable.",
    ),
    click.option(
        "--passes", metavar="TEXT", help="A pipeline in text form, or the name of one (see `qcompile passes`)."
    ),
    click.option("--until", metavar="PASS|PHASE", help="Stop after a pass or a phase, and write what there is."),
    load_option,
)


IMAGES = ("preset", "resize", "crop", "mean", "std", "scale", "bgr", "layout")


def compile_options(given: dict[str, Any], progress: Progress | None = None) -> CompileOptions:
    """The compile options in the values of `data_options` and `pipeline_options`, less `calib`."""
    from qcompiler.plan import CompileOptions  # noqa: PLC0415  (so that --help is quick)

    rest = {key: value for key, value in given.items() if key not in IMAGES and key != "calib"}
    return CompileOptions(**rest, preprocess=preprocess(given), progress=progress)


def preprocess(given: dict[str, Any]) -> Preprocess | None:
    """The image preprocessing that the values of `data_options` ask for, or None if they say nothing."""
    wanted = {key: given[key] for key in IMAGES if given.get(key) is not None}
    if not wanted:
        return None
    from dataclasses import replace  # noqa: PLC0415

    from qcompiler.images import PRESETS, Preprocess  # noqa: PLC0415

    preset = wanted.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise UserError(f"no preset is called {preset!r}; known: {', '.join(PRESETS)}", "--preset")
    return replace(PRESETS[preset] if preset else Preprocess(), **wanted)


MIN_WIDTH = 32
"""Characters below which the last column of a table is hard to read."""


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns, aligned. On a terminal the last one wraps; where it has no room, it goes below the others."""
    from rich.console import Console  # noqa: PLC0415
    from rich.padding import Padding  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    console = Console(highlight=False)
    if not console.is_terminal:
        for row in ([*head], *cells):
            click.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    elif console.width - sum(width + 2 for width in widths[:-1]) >= min(widths[-1], MIN_WIDTH):
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for index, title in enumerate(head):
            table.add_column(title, no_wrap=index < len(head) - 1)
        for row in cells:
            table.add_row(*map(Text, row))
        console.print(table)
    else:
        for first, *others, last in cells:
            console.print(Text.assemble((first, "bold"), "  ", "  ".join(filter(None, others))))
            console.print(Padding(Text(last), (0, 0, 0, 4)))


@contextmanager
def progress_bar(wanted: bool = True) -> Iterator[Progress | None]:
    """A bar on stderr while samples are read, if that is a terminal."""
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress as Bar  # noqa: PLC0415

    bar = Bar(console=Console(stderr=True), transient=True)
    task = bar.add_task("calibrating", total=None)

    def advance(done: int, total: int | None) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)
        if done == total:
            bar.stop()

    try:
        yield advance
    finally:
        bar.stop()
