"""The command line: the group of commands, and exit codes."""

from __future__ import annotations

import importlib
import sys
import traceback
import warnings
from collections.abc import Sequence

import click

from qcompiler import __version__, supervise
from qcompiler.commands import COMMANDS
from qcompiler.errors import EXIT_INTERNAL, EXIT_INTERRUPT, EXIT_USER, UserError
from qcompiler.options import FORMATTING, LIMITS

EPILOG = """\b
Examples:
  qcompile model.onnx --calib samples/                    samples/: images, .npy, .npz or ONNX test data
  qcompile model.onnx --calib photos/ --preset imagenet   photos as torchvision prepares them
"""


DEBUG = click.Option(["--debug"], is_flag=True, expose_value=False, help="Show tracebacks of errors.")
"""An option of every command, as are the limits."""


class LazyGroup(click.Group):
    """A group that loads a command when it is asked for, and takes `compile` for granted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"qcompiler.commands.{cmd_name.replace('-', '_')}")
        command = module.command
        assert isinstance(command, click.Command)
        if not any(parameter.name == DEBUG.name for parameter in command.params):
            command.params += [*LIMITS, DEBUG]
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `compile` before arguments that name no command: `qcompile MODEL` is `qcompile compile MODEL`."""
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        if args and args[0] not in COMMANDS and args[0] not in own:
            args = ["compile", *args]
        return super().parse_args(ctx, args)


@click.group(cls=LazyGroup, context_settings=FORMATTING, no_args_is_help=True, epilog=EPILOG)
@click.version_option(__version__, prog_name="qcompile")
def cli() -> None:
    """Compile a float ONNX model into a fast, accurate int8 model for ONNX Runtime.

    `qcompile MODEL --calib DATA` is short for `qcompile compile MODEL --calib DATA`.
    """


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 done, 2 the user's error, 70 ours, 130 interrupted.

    The command of this process gets a worker process; one that is given here, with `argv`, runs in this one.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if argv is None and "--debug" not in arguments:
        warnings.simplefilter("ignore")  # of libraries, about their own numbers and interfaces
    supervise.prepare()
    code = supervise.start("--debug" in arguments) if argv is None else None
    supervise.end(_run(arguments) if code is None else code)


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
        if isinstance(error, MemoryError):
            click.echo(f"error: not enough memory: {_line(error)}", err=True)
            return EXIT_USER
        notes = [note for e in (error, error.__cause__) for note in getattr(e, "__notes__", ())]
        hint = "; ".join(notes) or "run again with --debug for the traceback"
        click.echo(f"internal error: {_line(error)} ({hint})", err=True)
        return EXIT_INTERNAL


def _line(error: Exception) -> str:
    """The message of an exception in one line."""
    return " ".join(str(error).split())[:500] or type(error).__name__
