"""qcompile profile: what operators cost on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from qcompiler.errors import UserError
from qcompiler.options import FORMATTING, PATH, progress_bar


@click.command("profile", context_settings=FORMATTING)
@click.option("-o", "--output", type=PATH, required=True, help="The file to write.")
@click.option("--seconds", type=click.FloatRange(min=1), default=20.0, show_default=True, help="How long to time.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(output: Path, seconds: float, quiet: bool) -> None:
    """Measure what operators cost here, in float and in int8, for `qcompile --profile`.

    It compiles a few hundred small networks and times them on one thread and on two; all in all that takes about a minute. Leave
    the machine alone while it runs.
    """
    from qcompiler import fit_cost  # noqa: PLC0415  (so that --help is quick)
    from qcompiler.networks import networks  # noqa: PLC0415

    if not output.absolute().parent.is_dir():
        raise UserError("there is no such folder", str(output.parent))
    with progress_bar(not quiet) as progress:
        table, error = fit_cost.measure_table(list(networks())[::2], seconds, progress)  # all hardly predict better
    try:
        output.write_text(table.to_json(), encoding="utf-8")
    except OSError as failure:
        raise UserError(f"cannot write there: {failure.strerror or failure}", str(output)) from failure
    if not quiet:
        click.echo(f"{output}  {len(table.kinds)} kinds of work; half of the networks within {100 * error:.0f} %")
