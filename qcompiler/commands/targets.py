"""qcompile targets: what there is to compile for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from qcompiler.options import FORMATTING, json_option, load_option, print_table


@click.command("targets", context_settings=FORMATTING)
@click.argument("name", required=False)
@load_option
@json_option
def command(name: str | None, load: Sequence[Path], as_json: bool) -> None:
    """List the targets, or show the target NAME: its types, its kernels, what stays float there and why."""
    from qcompiler import catalog  # noqa: PLC0415  (so that --help is quick)
    from qcompiler.plugin import load_registry  # noqa: PLC0415

    registry = load_registry(load)
    known = [registry.targets[key] for key in sorted(registry.targets)]
    chosen = known if name is None else [catalog.named_target(registry, name)]
    facts = [catalog.target_facts(registry, target) for target in chosen]
    if as_json:
        click.echo(json.dumps(facts if name is None else facts[0]))
    elif name is None:
        rows = [(t.name, registry.home("target", t.name), t.description) for t in known]
        print_table(("target", "from", "what it is"), rows)
    else:
        _show(facts[0])


def _show(facts: dict[str, object]) -> None:
    click.echo(f"{facts['name']}: {facts['description']}\n")
    for key in ("package", "opset", "activation", "weight", "lowerings", "kernels", "float_result", "rewrites"):
        value = facts[key]
        text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
        click.echo(f"  {key.replace('_', ' '):<14}{text}")
    reasons = facts["float"]
    assert isinstance(reasons, dict)
    click.echo("\nfloat on this target, wherever they stand:")
    print_table(("operator", "why"), reasons.items())
