"""qcompile reduce: the smallest part of a model that still fails."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompiler.errors import UserError
from qcompiler.options import FORMATTING, PATH, compile_options, data_options, pipeline_options

if TYPE_CHECKING:
    from qcompiler.plan import CompileOptions
    from qcompiler.reduce import Failure, Reduced

EPILOG = """\b
Without --fails and --fails-cmd, a model fails if it makes qcompile crash: an internal error in the same pass.
--fails compares the compiled model with the float model, as `qcompile bisect` does.

\b
Examples:
  qcompile reduce model.onnx --calib samples/
  qcompile reduce model.onnx --calib samples/ --load mypass.py --passes 'normalize,mine'
  qcompile reduce model.onnx --calib samples/ --fails 'sqnr < 10'
  qcompile reduce model.onnx --calib samples/ --fails-cmd 'sh check.sh {model} {calib}'
"""


@click.command("reduce", context_settings=FORMATTING, epilog=EPILOG)
@click.argument("model", type=PATH)
@click.option("--fails", metavar="EXPRESSION", help="When a compiled model fails, such as 'sqnr < 10'.")
@click.option("--fails-cmd", metavar="COMMAND", help="A command that exits non-zero if {model}, a float model, fails.")
@click.option(
    "-o", "--output", type=PATH, help="The file to write.  [default: MODEL-stem.reduced.onnx beside the model]"
)
@data_options
@pipeline_options
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    model: Path, fails: str | None, fails_cmd: str | None, output: Path | None, quiet: bool, **options: Any
) -> None:
    """Shrink MODEL, of which compilation fails, while it fails in the same way."""
    if fails is not None and fails_cmd is not None:
        raise UserError("give one of them", "--fails or --fails-cmd")
    calib = options.pop("calib")
    if calib is None:
        raise UserError("calibration data is missing; give some samples of what the model is fed", "--calib")
    from qcompiler.emit import check_path  # noqa: PLC0415  (so that --help is quick)
    from qcompiler.reduce import reduce  # noqa: PLC0415

    output = model.with_name(f"{model.stem}.reduced.onnx") if output is None else output
    check_path(output, model)
    choices = compile_options(options)
    show = _show_progress()
    found = reduce(model, calib, _predicate(choices, fails, fails_cmd), choices, show)
    show("")
    folder = _write(found, output)
    if not quiet:
        _print(found, output, folder)


def _predicate(options: CompileOptions, fails: str | None, fails_cmd: str | None) -> Failure:
    from qcompiler.predicate import CommandFails, Expression  # noqa: PLC0415
    from qcompiler.reduce import CommandExits, Crashes, IsInaccurate  # noqa: PLC0415

    if fails is not None:
        return IsInaccurate(options, Expression(fails))
    if fails_cmd is not None:
        CommandFails(fails_cmd)  # refuses what it cannot run
        return CommandExits(fails_cmd)
    return Crashes(options)


def _show_progress() -> Callable[[str], None]:
    """A line on stderr that says what is tried, if that is a terminal."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: click.echo(f"\r\x1b[K{text}\r", nl=False, err=True)


def _write(found: Reduced, output: Path) -> Path:
    """Write the model, its samples and the steps; return the folder with the samples."""
    from qcompiler.emit import write  # noqa: PLC0415
    from qcompiler.reduce import write_samples  # noqa: PLC0415

    folder = output.with_name(f"{output.stem}.calib")
    write(found.model, output)
    try:
        write_samples(found.samples, folder)
        output.with_name(f"{output.stem}.txt").write_text(
            "\n".join([found.failure, *found.steps]) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise UserError(f"cannot write the samples: {error.strerror}", str(folder)) from error
    return folder


def _print(found: Reduced, output: Path, folder: Path) -> None:
    for step in found.steps:
        click.echo(f"  {step}")
    nodes = [node.op_type for node in found.model.graph.node if node.op_type != "Constant"]
    click.echo(f"{output}  {len(nodes)} nodes, {len(found.samples)} samples in {folder}")
    click.echo(f"fails     {found.failure}")
    click.echo(f"nodes     {', '.join(nodes[:12])}{' …' if len(nodes) > 12 else ''}")
    click.echo(
        f"try       qcompile {shlex.quote(str(output))} --calib {shlex.quote(str(folder))}, with the same options"
    )
