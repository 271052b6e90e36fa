"""qcompile passes: what there is to run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from qcompiler.options import FORMATTING, load_option


@click.command("passes", context_settings=FORMATTING)
@load_option
def command(load: Sequence[Path]) -> None:
    """List the passes and the named pipelines."""
    from qcompiler.plugin import load_registry  # noqa: PLC0415  (so that --help is quick)

    registry = load_registry(load)
    for name, kind in sorted(registry.passes.items()):
        sentence = " ".join((kind.__doc__ or "").split()).partition(". ")[0].rstrip(".")
        click.echo(f"{name:20} {sentence}")
    for name, text in sorted(registry.pipelines.items()):
        click.echo(f"\npipeline {name}:\n  {text}")
