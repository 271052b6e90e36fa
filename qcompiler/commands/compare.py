"""qcompile compare: where the error comes from, and where the time goes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompiler.errors import UserError
from qcompiler.options import FORMATTING, PATH, data_options, json_option, preprocess

if TYPE_CHECKING:
    from qcompiler.compare import Comparison, LayerError
    from qcompiler.difference import OutputError

DEFAULT_SAMPLES = 16
PROFILE_SECONDS = 2.0
COLUMNS = ("layer", "op", "local", "accumulated", "cosine", "max error", "float ms", "int8 ms", "kernels")

EPILOG = """\b
Errors are SQNR in dB: 6 dB are one bit. `local`: the layer alone is fed with the float model's tensors.
`accumulated`, and with it cosine and max error: both models run as they are, so that a layer has the errors of
those before it, too. A layer without a time was fused into another one.
"""


@click.command("compare", context_settings=FORMATTING, epilog=EPILOG)
@click.argument("float_model", metavar="FLOAT", type=PATH)
@click.argument("compiled", metavar="INT8", type=PATH)
@data_options
@click.option(
    "--sort",
    type=click.Choice(["local", "accumulated", "latency"]),
    default="local",
    show_default=True,
    help="Worst first by this; latency: by the milliseconds that int8 adds.",
)
@click.option("--top", type=click.IntRange(min=1), help="Show only so many layers.")
@click.option("--no-latency", is_flag=True, help="Do not measure latency.")
@json_option
def command(
    float_model: Path,
    compiled: Path,
    calib: Path | None,
    samples: int | None,
    sort: str,
    top: int | None,
    no_latency: bool,
    as_json: bool,
    **images: Any,
) -> None:
    """Compare INT8 with the FLOAT model that it was compiled from, layer by layer.

    16 samples of the data are used unless --samples says otherwise.
    """
    if calib is None:
        raise UserError("data is missing; give some samples of what the model is fed", "--calib")
    from qcompiler.compare import compare, load_compiled  # noqa: PLC0415  (so that --help is quick)
    from qcompiler.data import as_source  # noqa: PLC0415
    from qcompiler.load import input_specs, load_model  # noqa: PLC0415

    reference = load_model(float_model)
    model = load_compiled(compiled)
    source = as_source(calib, input_specs(reference), preprocess(images), samples or DEFAULT_SAMPLES)
    result = compare(reference, model, source, 0 if no_latency else PROFILE_SECONDS)
    rows = result.ranked(sort)[:top]
    if as_json:
        data = result.to_dict()
        click.echo(json.dumps({**data, "layers": [row.to_dict() for row in rows]}))
    else:
        _print(result, rows)


def _print(result: Comparison, rows: Sequence[LayerError]) -> None:
    _print_table([_cells(row) for row in rows])
    hidden = len(result.layers) - len(rows)
    click.echo(
        f"{len(rows)} of {len(result.layers)} layers, {result.samples} samples" if hidden else "", nl=bool(hidden)
    )
    for output in result.outputs:
        click.echo(f"output {output.name}: {_output(output)}")
    if result.float_ms and result.int8_ms:
        click.echo(f"time in operators: {result.float_ms:.3g} ms -> {result.int8_ms:.3g} ms")
    if result.skipped:
        click.echo(
            f"{len(result.skipped)} integer tensors are none of the float model; layers reach across them (--json names them)"
        )


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    from rich import box  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    numeric = range(2, 8)
    console = Console(highlight=False)
    if console.is_terminal:
        table = Table(box=box.SIMPLE_HEAD, header_style="bold")
        for i, title in enumerate(COLUMNS):
            table.add_column(title, justify="right" if i in numeric else "left", no_wrap=i in numeric, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        return
    widths = [max(len(row[i]) for row in (COLUMNS, *rows)) for i in range(len(COLUMNS))]
    for row in (COLUMNS, *rows):
        cells = [c.rjust(w) if i in numeric else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        click.echo("  ".join(cells).rstrip())


def _cells(row: LayerError) -> tuple[str, ...]:
    error = row.accumulated
    return (
        row.layer,
        row.op,
        _db(row.local.sqnr),
        _db(error.sqnr),
        f"{error.cosine:.5f}",
        f"{error.max_error:.3g}",
        _ms(row.float_ms),
        _ms(row.int8_ms),
        " ".join(dict.fromkeys(row.kernels)),
    )


def _db(sqnr: float | None) -> str:
    return "exact" if sqnr is None else f"{sqnr:.1f}"


def _ms(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.3f}"


def _output(output: OutputError) -> str:
    error = output.error
    sqnr = "exact" if error.sqnr is None else f"{error.sqnr:.1f} dB"
    text = f"SQNR {sqnr}, cosine {error.cosine:.5f}, max error {error.max_error:.3g}"
    return text if output.agreement is None else f"{text}, top-1 agreement {output.agreement:.1%}"
