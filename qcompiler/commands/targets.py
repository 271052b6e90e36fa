"""qcompile targets: what there is to compile for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from qcompiler.options import FORMATTING, load_option


@click.command("targets", context_settings=FORMATTING)
@load_option
def command(load: Sequence[Path]) -> None:
    """List the targets."""
    from qcompiler.plugin import load_registry  # noqa: PLC0415  (so that --help is quick)

    for name, target in sorted(load_registry(load).targets.items()):
        click.echo(f"{name:16} {target.description}")
