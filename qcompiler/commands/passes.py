"""qcompile passes: what there is to run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from qcompiler.options import FORMATTING, json_option, load_option, print_table


@click.command("passes", context_settings=FORMATTING)
@click.argument("name", required=False)
@load_option
@json_option
def command(name: str | None, load: Sequence[Path], as_json: bool) -> None:
    """List the passes and the named pipelines, or explain the pass NAME."""
    from qcompiler import catalog  # noqa: PLC0415  (so that --help is quick)
    from qcompiler.plugin import load_registry  # noqa: PLC0415

    registry = load_registry(load)
    if name is not None:
        facts = catalog.named_pass(registry, name)
        click.echo(json.dumps(asdict(facts)) if as_json else "\n".join(facts.lines(catalog.default_order(registry))))
        return
    known = catalog.passes(registry)
    if as_json:
        click.echo(json.dumps({"passes": [asdict(p) for p in known], "pipelines": registry.pipelines}))
        return
    rows = [(p.name, p.phases, p.signature, p.package, p.summary) for p in known]
    print_table(("pass", "phases", "options", "from", "what it does"), rows)
    for text in dict.fromkeys(text for _, text in sorted(registry.pipelines.items())):
        titles = sorted(title for title, other in registry.pipelines.items() if other == text)
        click.echo(f"\npipeline {', '.join(titles)}:\n  {text}")
