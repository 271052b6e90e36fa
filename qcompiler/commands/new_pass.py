"""qcompile new-pass: a package to start from."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from qcompiler.options import FORMATTING, PATH


@click.command("new-pass", context_settings=FORMATTING)
@click.argument("name")
@click.option("--dir", "folder", type=PATH, metavar="DIR", help="Where to write it.  [default: ./NAME]")
def command(name: str, folder: Path | None) -> None:
    """Write a package with the pass NAME, its test and its entry point."""
    from qcompiler.plugin import load_registry  # noqa: PLC0415  (so that --help is quick)
    from qcompiler.scaffold import new_pass  # noqa: PLC0415

    folder = Path(name) if folder is None else folder
    for path in new_pass(name, folder, load_registry().passes):
        click.echo(f"wrote {path}")
    where, with_tests = shlex.quote(str(folder)), shlex.quote(f"{folder}[dev]")
    click.echo(f"next:\n  pip install -e {with_tests}\n  pytest {where}\n  qcompile passes {name}")
