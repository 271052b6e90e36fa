"""qcompile diff: what differs between two models."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qcompiler.options import FORMATTING, PATH, json_option

EPILOG = """\b
Exits with 0 if the models are the same, with 1 if they differ.

\b
Examples:
  qcompile diff d/06-fold-bias.onnx d/07-fold-batchnorm.onnx    what a pass did
  qcompile diff model.onnx d/10-fold-constants.onnx
"""


@click.command("diff", context_settings=FORMATTING, epilog=EPILOG)
@click.argument("before", metavar="A", type=PATH)
@click.argument("after", metavar="B", type=PATH)
@json_option
def command(before: Path, after: Path, as_json: bool) -> int:
    """Show what differs between the models A and B: nodes, constants, inputs and outputs."""
    from qcompiler.diff import diff  # noqa: PLC0415  (so that --help is quick)
    from qcompiler.load import read_model  # noqa: PLC0415

    found = diff(read_model(before), read_model(after))
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        for line in found.lines():
            click.echo(line)
    return 1 if found else 0
