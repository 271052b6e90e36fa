"""qcompile bisect: which pass, and which single rewrite, breaks a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompiler.errors import UserError
from qcompiler.options import FORMATTING, PATH, compile_options, data_options, json_option, pipeline_options

if TYPE_CHECKING:
    from qcompiler.bisect import Culprit
    from qcompiler.job import Job
    from qcompiler.predicate import Fails

MAX_LINES, MAX_LAYERS = 12, 8

EPILOG = """\b
Metrics on the held-back samples, against the float model; of several outputs the worst counts:
  sqnr (dB)   cosine   max_error   agreement (the same top-1, for outputs [N, C])
Exits with 0 if the compiled model does not fail, with 1 if the culprit was found.

\b
Examples:
  qcompile bisect model.onnx --calib samples/ --fails 'sqnr < 20'
  qcompile bisect model.onnx --calib samples/ --fails 'sqnr < 20 or agreement < 0.95' --load mypass.py --passes mine
  qcompile bisect model.onnx --calib samples/ --fails-cmd 'python check.py {model}'
"""


@click.command("bisect", context_settings=FORMATTING, epilog=EPILOG)
@click.argument("model", type=PATH)
@click.option("--fails", metavar="EXPRESSION", help="When a model fails: comparisons joined by and, or, not.")
@click.option("--fails-cmd", metavar="COMMAND", help="A command that exits non-zero if {model}, a file, fails.")
@click.option("-o", "--output", type=PATH, help="Where to save the text of the shortest pipeline that fails.")
@data_options
@pipeline_options
@json_option
def command(
    model: Path,
    fails: str | None,
    fails_cmd: str | None,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Find the first pass, and in it the first rewrite, that makes the compiled MODEL fail."""
    if (fails is None) == (fails_cmd is None):
        raise UserError("say when a model fails", "--fails or --fails-cmd")
    from qcompiler.bisect import bisect  # noqa: PLC0415  (so that --help is quick)
    from qcompiler.job import prepare  # noqa: PLC0415

    calib = options.pop("calib")
    job = prepare(model, calib, compile_options(options))
    show = _show_progress()
    culprit = bisect(job, _predicate(job, fails, fails_cmd), show)
    show("")
    if output is not None and culprit is not None:
        _save(output, culprit.pipeline)
    if as_json:
        click.echo(json.dumps({"culprit": None if culprit is None else culprit.to_dict()}))
    elif culprit is None:
        click.echo("the compiled model does not fail")
    else:
        _print(culprit, output)
    return 0 if culprit is None else 1


def _predicate(job: Job, fails: str | None, fails_cmd: str | None) -> Fails:
    from qcompiler.predicate import CommandFails, Expression, Inaccurate  # noqa: PLC0415

    if fails is None:
        return CommandFails(fails_cmd or "")
    expression = Expression(fails)
    if job.split is None:
        raise UserError("data is missing; give some samples of what the model is fed", "--calib")
    return Inaccurate(expression, job.float_model, job.split.held_back)


def _show_progress() -> Callable[[str], None]:
    """A line on stderr that says what is tried, if that is a terminal."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: click.echo(f"\r\x1b[K{text}\r", nl=False, err=True)


def _save(path: Path, pipeline: str) -> None:
    try:
        path.write_text(pipeline + "\n")
    except OSError as error:
        raise UserError(f"cannot write it: {error.strerror}", str(path)) from error


def _print(culprit: Culprit, output: Path | None) -> None:
    click.echo(f"pass      {culprit.stage} (number {culprit.position})")
    if culprit.rewrite is None:
        click.echo("rewrite   none alone: the pass works as a whole (`qcompile compare` ranks layers by error)")
    else:
        click.echo(f"rewrite   {culprit.rewrite}" + (f" of {culprit.rewrites}" if culprit.rewrites else ""))
    click.echo(f"fails     {culprit.failure}")
    if culprit.layers:
        more = f" and {len(culprit.layers) - MAX_LAYERS} more" if len(culprit.layers) > MAX_LAYERS else ""
        click.echo(f"layers    {', '.join(culprit.layers[:MAX_LAYERS])}{more}")
    for line in culprit.changes[:MAX_LINES]:
        click.echo(f"  {line}")
    if len(culprit.changes) > MAX_LINES:
        click.echo(f"  … {len(culprit.changes) - MAX_LINES} more lines (--json has all)")
    where = "" if output is None else f" (saved in {output})"
    click.echo(f"pipeline  {culprit.pipeline}{where}")
