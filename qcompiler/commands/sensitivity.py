"""qcompile sensitivity: which layers quantization hurts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompiler.errors import UserError
from qcompiler.options import (
    FORMATTING,
    PATH,
    compile_options,
    data_options,
    json_option,
    pipeline_options,
    print_table,
    progress_bar,
)

if TYPE_CHECKING:
    from qcompiler.sensitivity import Row

DEFAULT_PROBES = 4

EPILOG = """\b
SQNR in dB at the output that suffers most, if only this layer is quantized; 6 dB are one bit. `weights`, `activations`:
only those of the layer. `noise`: the layer's share of all noise. `cost`: its share of what int8 saves, about.

\b
Examples:
  qcompile sensitivity model.onnx --calib samples/ --top 10
  qcompile model.onnx --calib samples/ --min-sqnr 20        keeps the layers in float that it takes
"""


@click.command("sensitivity", context_settings=FORMATTING, epilog=EPILOG)
@click.argument("model", type=PATH)
@data_options
@pipeline_options
@click.option(
    "--probes",
    type=click.IntRange(min=1),
    default=DEFAULT_PROBES,
    show_default=True,
    help="Measure on so many of the calibration samples.",
)
@click.option("--top", type=click.IntRange(min=1), help="Show only so many layers.")
@json_option
def command(model: Path, probes: int, top: int | None, as_json: bool, **options: Any) -> None:
    """Rank the layers of MODEL by the damage that quantizing each of them alone does to the outputs."""
    from qcompiler.job import prepare  # noqa: PLC0415  (so that --help is quick)
    from qcompiler.sensitivity import sensitivity  # noqa: PLC0415

    if options["calib"] is None:
        raise UserError("data is missing; give some samples of what the model is fed", "--calib")
    with progress_bar(not as_json) as progress:
        job = prepare(model, options["calib"], compile_options(options, progress))
        assert job.split is not None
        found = sensitivity(job.state, job.pipeline, job.split.spread(probes), job.guards)
    rows = found.ranking()
    shown = rows[:top]
    if as_json:
        facts = {"outputs": found.outputs, "predicted": found.sqnr(), "probes": probes}
        click.echo(json.dumps({**facts, "layers": [asdict(row) for row in shown]}))
        return
    print_table(("layer", "op", "SQNR", "weights", "activations", "noise", "cost"), map(_cells, shown))
    hidden = f"{len(shown)} of {len(rows)} layers. " if len(shown) < len(rows) else ""
    predicted = found.sqnr()
    click.echo(f"{hidden}All of them quantized: {'exact' if predicted is None else f'about {predicted:.1f} dB'}")


def _cells(row: Row) -> tuple[str, ...]:
    figures = ("" if sqnr is None else f"{sqnr:.1f}" for sqnr in (row.sqnr, row.weights, row.activations))
    return (row.layer, row.op, *figures, f"{row.share:.1%}", f"{row.cost:.1%}")
