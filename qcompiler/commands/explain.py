"""qcompile explain: the story of one layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qcompiler.options import (
    FORMATTING,
    PATH,
    compile_options,
    data_options,
    json_option,
    pipeline_options,
    progress_bar,
)

EPILOG = """\b
Examples:
  qcompile explain model.onnx conv1 --calib samples/       passes, block, scales, multipliers, kernel
  qcompile explain model.onnx '/head/*'                    without data: up to what stays float, and why
"""


@click.command("explain", context_settings=FORMATTING, epilog=EPILOG)
@click.argument("model", type=PATH)
@click.argument("node")
@data_options
@pipeline_options
@click.option("-v", "--verbose", is_flag=True, help="Show the nodes before and after each pass.")
@json_option
def command(model: Path, node: str, verbose: bool, as_json: bool, **options: Any) -> None:
    """Tell what becomes of the layer NODE of MODEL.

    NODE is the name of a node, a pattern of such names, or the name of a tensor that a node makes.
    """
    from qcompiler.explain import explain  # noqa: PLC0415  (so that --help is quick)
    from qcompiler.modes import STATIC  # noqa: PLC0415

    calib = options["calib"]
    is_static = options["passes"] is None and options["mode"] in (None, STATIC)
    if calib is None and options["until"] is None and is_static:
        options["until"] = "annotate"
    with progress_bar(not as_json) as progress:
        stories = explain(model, node, calib, compile_options(options, progress))
    if as_json:
        click.echo(json.dumps([story.to_dict() for story in stories]))
    else:
        click.echo("\n\n".join("\n".join(story.lines(verbose)) for story in stories))
