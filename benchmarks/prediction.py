"""Compare the speed-up that `place` predicts with the one that is measured.

python benchmarks/prediction.py                                  the models in models/
python benchmarks/prediction.py MODEL=DATA... [--profile FILE]   others, each with its calibration data

Both the compiled model and the same with all quantized that can be are raced against the float model, on one thread, in turns.
Models that take less than 0.1 ms are shown, but do not count: nothing is placed there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from compare import MODELS, quietest_race
from rich.console import Console
from rich.table import Table

from qcompiler import runtime
from qcompiler.compile import compile_model
from qcompiler.data import open_source
from qcompiler.images import PRESETS
from qcompiler.load import input_specs, load_model
from qcompiler.plan import CompileOptions

TOLERANCE = 0.15
SMALL = 1e-4


def speedups(model: Path, calib: Path, given: argparse.Namespace, objective: str) -> tuple[float, float, float]:
    """Predicted and measured speed-up over float, and the seconds of the float model."""
    preprocess = PRESETS[given.preset] if given.preset else None
    options = {"optimize": objective, "profile": given.profile, "samples": given.samples, "preprocess": preprocess}
    result = compile_model(model, calib, compare=False, **options)
    before = load_model(model)
    feeds = next(iter(open_source(calib, input_specs(before), preprocess)))
    seconds = quietest_race(runtime.session(before), runtime.session(result.model), feeds, given.seconds)
    predicted = result.report.predicted
    return (predicted[0] / predicted[1] if predicted else float("nan")), seconds[0] / seconds[1], seconds[0]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL=DATA")
    parser.add_argument("--profile", type=Path, default=CompileOptions.profile, help="a file of `qcompile profile`")
    parser.add_argument("--preset", choices=list(PRESETS), help="preprocessing of images")
    parser.add_argument("--samples", type=int, default=8, help="calibration samples; they do not change the speed")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each race")
    given = parser.parse_args()
    if not given.models:
        given.models = [f"{MODELS / name}.onnx={MODELS / 'mnist_calib'}" for name in ("digits_resnet", "condenser")]
    return given


def main() -> None:
    given = arguments()
    table, console = Table(caption="speed-up over float, predicted and measured"), Console(width=110)
    for title in ("model", "float ms", "all int8: predicted", "measured", "placed: predicted", "measured", "error"):
        table.add_column(title, justify="left" if title == "model" else "right")
    errors = []
    for entry in given.models:
        model, _, calib = entry.partition("=")
        whole = speedups(Path(model), Path(calib), given, "size")
        predicted, measured, seconds = speedups(Path(model), Path(calib), given, "latency")
        error = predicted / measured - 1
        errors += [error] if seconds >= SMALL else []
        cells = (f"{whole[0]:.2f}x", f"{whole[1]:.2f}x", f"{predicted:.2f}x", f"{measured:.2f}x", f"{error:+.0%}")
        table.add_row(Path(model).stem, f"{1e3 * seconds:.3f}", *cells)
    console.print(table)
    within = np.mean([abs(error) <= TOLERANCE for error in errors]) if errors else float("nan")
    console.print(f"within {TOLERANCE:.0%}: {within:.0%} of {len(errors)} models")


if __name__ == "__main__":
    main()
