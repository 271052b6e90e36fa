"""qcompile compile: the main job."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompiler.errors import UserError
from qcompiler.options import (
    FORMATTING,
    IMAGES,
    PATH,
    data_options,
    json_option,
    pipeline_options,
    preprocess,
    progress_bar,
)

if TYPE_CHECKING:
    from qcompiler.compile import CompileResult
    from qcompiler.instrument import PassTime
    from qcompiler.refusals import Refusals

EPILOG = """\b
Examples:
  qcompile model.onnx --calib samples/                    samples/: images, .npy, .npz or ONNX test data
  qcompile model.onnx --calib photos/ --preset imagenet   photos as torchvision prepares them
  qcompile model.onnx --calib x.npz -o small.onnx --emit qdq
  qcompile model.onnx --calib x.npz --keep-float '/head/*' -v
  qcompile model.onnx --calib x.npz --min-sqnr 20         find out which layers have to stay float for 20 dB
  qcompile model.onnx --calib x.npz --eval labelled.npz   top-1 of both models
"""


@click.command("compile", context_settings=FORMATTING, epilog=EPILOG)
@click.argument("model", type=PATH)
@click.option("-o", "--output", type=PATH, help="The file to write.  [default: MODEL-stem.int8.onnx beside the model]")
@data_options
@pipeline_options
@click.option(
    "--eval",
    metavar="DATA|FILE.py:FUNCTION",
    help="Judge both models: a folder of images by class, an .npz with labels, or a function.",
)
@click.option(
    "--min-sqnr",
    type=float,
    metavar="DB",
    help="Keep the fewest, cheapest layers in float that it takes for so many dB at every output.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    metavar="PCT",
    help="The same to lose at most so much of what --eval measures: points of top-1, else percent.",
)
@click.option(
    "--dump", type=PATH, metavar="DIR", help="Write the state after every pass; see `qcompile resume`, `diff`."
)
@click.option("--dump-changed", is_flag=True, help="Let --dump write only after passes that changed something.")
@click.option(
    "--repro", type=PATH, metavar="DIR", help="Where to write what reproduces the crash of a pass, if one crashes."
)
@click.option("--time", "show_time", is_flag=True, help="Show what each pass took.")
@click.option("--trace", type=PATH, metavar="FILE.json", help="Write a timeline of the passes for Chrome or Perfetto.")
@click.option("--why", multiple=True, metavar="PASS", help="Show what this pass left as it was, and why; repeatable.")
@click.option("--report", type=PATH, metavar="FILE.html", help="Write a page with all there is to know of the result.")
@click.option("--no-verify", is_flag=True, help="Do not check the invariants after every pass.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors, and warnings of outputs below 10 dB.")
@click.option("-v", "--verbose", is_flag=True, help="List every layer that stays float, and the kernels.")
def command(
    model: Path,
    output: Path | None,
    show_time: bool,
    trace: Path | None,
    why: tuple[str, ...],
    report: Path | None,
    no_verify: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    dump: Path | None,
    dump_changed: bool,
    repro: Path | None,
    **options: Any,
) -> None:
    """Compile MODEL and write MODEL-stem.int8.onnx."""
    from qcompiler.compile import compile_model  # noqa: PLC0415  (so that --help is quick)
    from qcompiler.instrument import Trace  # noqa: PLC0415
    from qcompiler.refusals import Refusals  # noqa: PLC0415

    if dump_changed and dump is None:
        raise UserError("say where to write", "--dump-changed needs --dump DIR")
    calib, images = options.pop("calib"), preprocess(options)
    refusals = Refusals(_known_passes(why, options["load"])) if why else None
    output = model.with_name(f"{model.stem}.int8.onnx") if output is None else output
    _check_places(model, calib, output, [path for path in (report, trace) if path is not None])
    recorder = None
    if report is not None:
        from qcompiler.html_report import recorder_for, write_report  # noqa: PLC0415

        recorder = recorder_for(report, model)
    with progress_bar(not quiet) as progress:
        result = compile_model(
            model,
            calib,
            output=output,
            verify=not no_verify,
            timed=as_json or not quiet or report is not None,
            dump=dump,
            dump_changed=dump_changed,
            reproduce=_reproducer(output) if repro is None else repro,
            instruments=[i for i in (Trace(trace) if trace else None, refusals, recorder) if i is not None],
            preprocess=images,
            progress=progress,
            **{key: value for key, value in options.items() if key not in IMAGES},
        )
    if report is not None and recorder is not None:
        write_report(report, result, recorder, shlex.join(["qcompile", *sys.argv[1:]]))
    try:
        _show(result, refusals, as_json=as_json, quiet=quiet, verbose=verbose, show_time=show_time)
    except BrokenPipeError:  # whoever read the summary has gone; the work is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(
    result: CompileResult, refusals: Refusals | None, *, as_json: bool, quiet: bool, verbose: bool, show_time: bool
) -> None:
    """Print what became of the model, and what passes left as it was if that was asked for."""
    if as_json:
        why_not = {"why": refusals.to_dict()} if refusals else {}
        click.echo(json.dumps({**result.report.to_dict(), **why_not}))
    elif not quiet:
        _print_summary(result, verbose, show_time)
    if as_json or quiet:
        for warning in result.report.warnings:
            click.echo(f"warning: {warning}", err=True)
    if refusals and not as_json:
        click.echo("\n".join(refusals.lines(verbose)))


def _check_places(model: Path, calib: Path | None, output: Path, others: list[Path]) -> None:
    """Refuse files besides the output that would overwrite it, each other, or the input."""
    from qcompiler.emit import check_path  # noqa: PLC0415  (so that --help is quick)

    taken = {output.absolute()}
    for path in others:
        if path.absolute() in taken:
            raise UserError("two results would be written to one file", str(path))
        taken.add(path.absolute())
        check_path(path, model, calib)


def _reproducer(output: Path) -> Path:
    """A folder beside the output that does not exist yet."""
    folders = (output.parent / f"qcompiler-repro-{i:02d}" for i in itertools.count(1))
    return next(folder for folder in folders if not folder.exists())


def _known_passes(names: tuple[str, ...], load: tuple[Path, ...]) -> tuple[str, ...]:
    from qcompiler.pipeline import closest  # noqa: PLC0415
    from qcompiler.plugin import load_registry  # noqa: PLC0415

    passes = load_registry(load).passes
    for name in names:
        if name not in passes:
            raise UserError(f"no pass is called {name!r}{closest(name, passes)}", "--why")
    return names


def _print_summary(result: CompileResult, verbose: bool, show_time: bool) -> None:
    (title, subtitle), *rows = result.report.rows(verbose)
    shown = [("" if i and rows[i - 1][0] == what else what, what, value) for i, (what, value) in enumerate(rows)]
    if sys.stdout.isatty():
        _print_in_color(title, subtitle, shown)
    else:
        click.echo(f"{title}  {subtitle}")
        for label, _, value in shown:
            click.echo(f"  {label:<10} {value}")
    if show_time:
        _print_times(result.report.passes)


def _print_in_color(title: str, subtitle: str, rows: list[tuple[str, str, str]]) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    grid = Table.grid(padding=(0, 2))
    for label, what, value in rows:
        alarm = what == "WARNING"
        grid.add_row(Text(f"  {label}", style="bold red" if alarm else "bold"), Text(value, "red" if alarm else ""))
    console = Console(highlight=False)
    console.print(Text(title, style="bold green"), Text(subtitle), Text(""), sep="  ", end="\n")
    console.print(grid)


def _print_times(passes: list[PassTime]) -> None:
    click.echo(f"  {'pass':<24} {'rewrites':>8} {'ms':>9} {'nodes':>6}")
    for p in passes:
        click.echo(f"  {p.name:<24} {p.rewrites:>8} {p.milliseconds:>9.1f} {p.nodes:>6}")
