"""qcompile resume: compile on from a dump."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcompiler.options import FORMATTING, PATH, data_options, load_option, preprocess, progress_bar

EPILOG = """\b
The calibration data is read from where it was, unless --calib says where it is now.
Plug-in files that the compilation was given are not loaded unasked: give --load again.

\b
Examples:
  qcompile model.onnx --calib samples/ --dump d/          a state for each pass
  qcompile resume d/12-annotate.onnx -o model.int8.onnx   the same bytes as from a straight run
  qcompile resume d/13-calibrate.onnx --until insert-qdq
"""


@click.command("resume", context_settings=FORMATTING, epilog=EPILOG)
@click.argument("snapshot", type=PATH)
@click.option("-o", "--output", type=PATH, help="The file to write.  [default: SNAPSHOT-stem.int8.onnx beside it]")
@data_options
@click.option("--until", metavar="PASS|PHASE", help="Stop after a pass or a phase, and write what there is.")
@load_option
@click.option("--dump", type=PATH, metavar="DIR", help="Write the state after every pass that is left.")
@click.option("--no-verify", is_flag=True, help="Do not check the invariants after every pass.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    snapshot: Path,
    output: Path | None,
    until: str | None,
    load: tuple[Path, ...],
    dump: Path | None,
    no_verify: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Compile on from SNAPSHOT, a NN-pass.onnx that --dump wrote, with the passes that were left."""
    from qcompiler.resume import resume  # noqa: PLC0415  (so that --help is quick)

    output = snapshot.with_name(f"{snapshot.stem}.int8.onnx") if output is None else output
    with progress_bar(not quiet) as progress:
        result = resume(
            snapshot,
            options["calib"],
            output=output,
            until=until,
            samples=options["samples"],
            preprocess=preprocess(options),
            load=load,
            verify=not no_verify,
            dump=dump,
            progress=progress,
        )
    if not quiet:
        state, count = result.state, len(result.passes.passes)
        click.echo(
            f"{output}  {state.phase.name.lower()} for {state.target.name}, {count} passes after {snapshot.name}"
        )
