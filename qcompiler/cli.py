"""The command line: options, progress, printing and exit codes; nothing else."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompiler import __version__
from qcompiler.errors import UserError

if TYPE_CHECKING:
    from qcompiler.compile import CompileResult, Progress
    from qcompiler.images import Preprocess
    from qcompiler.instrument import PassTime

EXIT_USER, EXIT_INTERNAL, EXIT_INTERRUPT = 2, 70, 130

EPILOG = """\b
Examples:
  qcompile model.onnx --calib samples/                    samples/: images, .npy, .npz or ONNX test data
  qcompile model.onnx --calib photos/ --preset imagenet   photos as torchvision prepares them
  qcompile model.onnx --calib x.npz -o small.onnx --emit qdq
  qcompile model.onnx --calib x.npz --keep-float '/head/*' -v
"""

_FORMATTING = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class DefaultGroup(click.Group):
    """A group that takes `compile` for granted: `qcompile MODEL` is `qcompile compile MODEL`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `compile` before arguments that name no command."""
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["compile", *args]
        return super().parse_args(ctx, args)


@click.group(cls=DefaultGroup, context_settings=_FORMATTING, no_args_is_help=True, epilog=EPILOG)
@click.version_option(__version__, prog_name="qcompile")
def cli() -> None:
    """Compile a float ONNX model into a fast, accurate int8 model for ONNX Runtime.

    `qcompile MODEL --calib DATA` is short for `qcompile compile MODEL --calib DATA`.
    """


def _numbers(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    """Parse `0.485,0.456,0.406`."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 0.485,0.456,0.406") from None


def _size(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """Parse `224` or `240x320`."""
    try:
        parts = [] if text is None else [int(part) for part in text.lower().split("x")]
    except ValueError:
        parts = [0, 0, 0]
    if len(parts) > 2:
        raise click.BadParameter(f"{text!r} is not a size such as 224 or 240x320 (height x width)")
    return (parts[0], parts[-1]) if parts else None


_PATH = click.Path(path_type=Path)


@cli.command("compile", context_settings=_FORMATTING, epilog=EPILOG)
@click.argument("model", type=_PATH)
@click.option("--calib", type=_PATH, help="Calibration data: a folder or a file of samples of what the model is fed.")
@click.option("-o", "--output", type=_PATH, help="The file to write.  [default: MODEL-stem.int8.onnx beside the model]")
@click.option(
    "--emit",
    type=click.Choice(["kernels", "integer", "qdq"]),
    default="kernels",
    show_default=True,
    help="Fast kernels, plain integer operators, or quantize/dequantize pairs; all compute the same.",
)
@click.option("--target", default="ort-cpu", show_default=True, help="The hardware (see `qcompile targets`).")
@click.option("--collector", help="How activation ranges are measured: minmax, omse, or one from a plug-in.")
@click.option("--samples", type=click.IntRange(min=1), help="Use at most so many calibration samples.")
@click.option("--per-tensor", is_flag=True, help="One weight scale per tensor instead of one per output channel.")
@click.option(
    "--keep-float", multiple=True, metavar="PATTERN", help="Keep nodes or outputs of such names in float; repeatable."
)
@click.option("--passes", metavar="TEXT", help="A pipeline in text form, or the name of one (see `qcompile passes`).")
@click.option("--until", metavar="PASS|PHASE", help="Stop after a pass or a phase, and write what there is.")
@click.option("--load", multiple=True, type=_PATH, metavar="FILE.py", help="A plug-in file for this run; repeatable.")
@click.option("--preset", help="Image preprocessing: unit, raw, inception, imagenet or imagenet-tf.")
@click.option("--resize", type=click.IntRange(min=1), help="Scale images so that the short side has this length.")
@click.option("--crop", callback=_size, metavar="SIZE", help="Cut this size from the centre.  [default: the model's]")
@click.option("--mean", callback=_numbers, metavar="NUMBERS", help="Subtract this, for all channels or each.")
@click.option("--std", callback=_numbers, metavar="NUMBERS", help="Divide by this, after the mean.")
@click.option("--scale", type=float, help="Multiply pixels 0..255 by this, before the mean.")
@click.option("--bgr/--rgb", default=None, help="The order of the channels.")
@click.option("--layout", type=click.Choice(["auto", "NCHW", "NHWC"]), help="The order of the axes.  [default: auto]")
@click.option("--dump", type=_PATH, metavar="DIR", help="Write the model after every pass.")
@click.option("--time", "show_time", is_flag=True, help="Show what each pass took.")
@click.option("--no-verify", is_flag=True, help="Do not check the invariants after every pass.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("-v", "--verbose", is_flag=True, help="List every layer that stays float, and the kernels.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def compile_command(
    model: Path,
    output: Path | None,
    show_time: bool,
    no_verify: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Compile MODEL and write MODEL-stem.int8.onnx."""
    from qcompiler.compile import compile_model  # noqa: PLC0415  (so that --help is quick)

    images = {key: options.pop(key) for key in ("preset", "resize", "crop", "mean", "std", "scale", "bgr", "layout")}
    output = model.with_name(f"{model.stem}.int8.onnx") if output is None else output
    with _progress(sys.stderr.isatty() and not quiet) as progress:
        result = compile_model(
            model,
            options.pop("calib"),
            output=output,
            preprocess=_preprocess(images),
            verify=not no_verify,
            compare=as_json or not quiet,
            progress=progress,
            **options,
        )
    try:
        if as_json:
            click.echo(json.dumps(result.report.to_dict()))
        elif not quiet:
            _print_summary(result, verbose, show_time)
    except BrokenPipeError:  # whoever read the summary has gone; the work is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@cli.command("passes", context_settings=_FORMATTING)
@click.option("--load", multiple=True, type=_PATH, metavar="FILE.py", help="A plug-in file; repeatable.")
def passes_command(load: Sequence[Path]) -> None:
    """List the passes and the named pipelines."""
    from qcompiler.plugin import load_registry  # noqa: PLC0415

    registry = load_registry(load)
    for name, kind in sorted(registry.passes.items()):
        sentence = " ".join((kind.__doc__ or "").split()).partition(". ")[0].rstrip(".")
        click.echo(f"{name:20} {sentence}")
    for name, text in sorted(registry.pipelines.items()):
        click.echo(f"\npipeline {name}:\n  {text}")


@cli.command("targets", context_settings=_FORMATTING)
@click.option("--load", multiple=True, type=_PATH, metavar="FILE.py", help="A plug-in file; repeatable.")
def targets_command(load: Sequence[Path]) -> None:
    """List the targets."""
    from qcompiler.plugin import load_registry  # noqa: PLC0415

    for name, target in sorted(load_registry(load).targets.items()):
        click.echo(f"{name:16} {target.description}")


def _preprocess(options: dict[str, Any]) -> Preprocess | None:
    """The image preprocessing that the options ask for, or None if they say nothing."""
    given = {key: value for key, value in options.items() if value is not None}
    if not given:
        return None
    from dataclasses import replace  # noqa: PLC0415

    from qcompiler.images import PRESETS, Preprocess  # noqa: PLC0415

    preset = given.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise UserError(f"no preset is called {preset!r}; known: {', '.join(PRESETS)}", "--preset")
    return replace(PRESETS[preset] if preset else Preprocess(), **given)


@contextmanager
def _progress(wanted: bool) -> Iterator[Progress | None]:
    """A bar on stderr, for terminals."""
    if not wanted:
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


def _print_summary(result: CompileResult, verbose: bool, show_time: bool) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    (title, subtitle), *rows = result.report.rows(verbose)
    labels = [what if i == 0 or rows[i - 1][0] != what else "" for i, (what, _) in enumerate(rows)]
    console = Console(highlight=False)
    if console.is_terminal:
        grid = Table.grid(padding=(0, 2))
        for label, (_, value) in zip(labels, rows, strict=True):
            grid.add_row(Text(f"  {label}", style="bold"), Text(value))
        console.print(Text(title, style="bold green"), Text(subtitle), Text(""), sep="  ", end="\n")
        console.print(grid)
    else:
        click.echo(f"{title}  {subtitle}")
        for label, (_, value) in zip(labels, rows, strict=True):
            click.echo(f"  {label:<10} {value}")
    if show_time:
        _print_times(result.report.passes)


def _print_times(passes: list[PassTime]) -> None:
    click.echo(f"  {'pass':<24} {'rewrites':>8} {'ms':>9} {'nodes':>6}")
    for p in passes:
        click.echo(f"  {p.name:<24} {p.rewrites:>8} {p.milliseconds:>9.1f} {p.nodes:>6}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 done, 2 the user's error, 70 ours, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(_run(arguments))


def _run(arguments: list[str]) -> int:
    try:
        result = cli.main(arguments, prog_name="qcompile", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return EXIT_USER
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPT
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        if isinstance(error, UserError):
            click.echo(f"error: {error}", err=True)
            return EXIT_USER
        text = " ".join(str(error).split())[:500] or type(error).__name__
        click.echo(f"internal error: {text} (run again with --debug for the traceback)", err=True)
        return EXIT_INTERNAL
