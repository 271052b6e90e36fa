"""qcompile report: what a compilation gives, as a page to look at."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from qcompiler.options import FORMATTING, PATH, compile_options, data_options, pipeline_options, progress_bar

EPILOG = """\b
Examples:
  qcompile report model.onnx --calib samples/              writes model.report.html
  qcompile model.onnx --calib samples/ --report out.html   compiles and reports in one go
"""


@click.command("report", context_settings=FORMATTING, epilog=EPILOG)
@click.argument("model", type=PATH)
@click.option(
    "-o", "--output", type=PATH, help="The page to write.  [default: MODEL-stem.report.html beside the model]"
)
@data_options
@pipeline_options
def command(model: Path, output: Path | None, **options: Any) -> None:
    """Compile MODEL, keep only a report: one HTML page that needs no network.

    Accuracy, latency and size by layer, ranges, weights, times of passes, and what stays float.
    """
    from qcompiler.compile import compile_model  # noqa: PLC0415  (so that --help is quick)
    from qcompiler.html_report import recorder_for, write_report  # noqa: PLC0415

    output = model.with_name(f"{model.stem}.report.html") if output is None else output
    recorder = recorder_for(output, model)
    with progress_bar() as progress:
        wanted = compile_options(options, progress)
        result = compile_model(model, options["calib"], instruments=[recorder], **vars(wanted))
    write_report(output, result, recorder, shlex.join(["qcompile", *sys.argv[1:]]))
    click.echo(output)
