"""qcompile ops: what the compiler knows about operators."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from qcompiler.options import FORMATTING, json_option, load_option, print_table


@click.command("ops", context_settings=FORMATTING)
@click.option("--target", default="ort-cpu", show_default=True, help="The hardware (see `qcompile targets`).")
@load_option
@json_option
def command(target: str, load: Sequence[Path], as_json: bool) -> None:
    """List the operators: their operands, where the result's scale comes from, and what happens on the target."""
    from qcompiler import catalog  # noqa: PLC0415  (so that --help is quick)
    from qcompiler.plugin import load_registry  # noqa: PLC0415

    registry = load_registry(load)
    rows = catalog.operators(registry, catalog.named_target(registry, target))
    if as_json:
        click.echo(json.dumps([{**asdict(row), "fate": row.fate} for row in rows]))
        return
    cells = [(r.op, " ".join(r.operands), r.result, r.lowering, r.package, r.fate) for r in rows]
    print_table(("operator", "operands", "result", "lowering", "from", f"on {target}"), cells)
