"""What calibration costs against plain inference of the same samples: time per sample and peak memory.

python benchmarks/calibration.py [MODEL --calib DATA] [--samples N]

Each is a process of its own. `plain` reads the samples and runs the float model on as many threads as calibration uses; the
others compile until the ranges are known. Peak memory is that of the whole process, so that of calibration also holds the
compiler itself.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from child import run_python
from rich.console import Console
from rich.table import Table

MODELS = Path(__file__).resolve().parent.parent / "models"
KINDS = ("plain", "minmax", "omse")


def plain(model: Path, calib: Path, samples: int | None) -> float:
    """Milliseconds per sample of plain inference."""
    from qcompiler import runtime  # noqa: PLC0415  (a child imports no more than it measures)
    from qcompiler.data import open_source  # noqa: PLC0415
    from qcompiler.load import input_specs, load_model  # noqa: PLC0415
    from qcompiler.threads import WORKERS  # noqa: PLC0415

    source = open_source(calib, input_specs(load_model(model)), limit=samples)
    session = runtime.session(model, threads=WORKERS)
    start = time.perf_counter()
    for feeds in source:
        runtime.run(session, feeds)
    return 1e3 * (time.perf_counter() - start) / len(source)


def calibrate(model: Path, calib: Path, samples: int | None, collector: str) -> float:
    """Milliseconds per sample of the pass that calibrates."""
    from qcompiler import compile_model  # noqa: PLC0415

    report = compile_model(model, calib, collector=collector, samples=samples, until="calibrate", compare=False).report
    return next(p.milliseconds for p in report.passes if p.name == "calibrate") / report.samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=MODELS / "digits_resnet.onnx")
    parser.add_argument("--calib", type=Path, default=MODELS / "mnist_calib")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.kind is None:
        show(given.model, given.calib, given.samples)
    elif given.kind == "plain":
        print(json.dumps(plain(given.model, given.calib, given.samples)))
    else:
        print(json.dumps(calibrate(given.model, given.calib, given.samples, given.kind)))


def show(model: Path, calib: Path, samples: int | None) -> None:
    """Run the children and print a table."""
    table = Table("", "ms per sample", "peak memory", title=model.stem)
    base = None
    for kind in KINDS:
        limit = [] if samples is None else ["--samples", str(samples)]
        cost = run_python([__file__, model, "--calib", calib, "--kind", kind, *limit])
        milliseconds = json.loads(cost.output)
        base = base or (milliseconds, cost.peak_mb)
        table.add_row(
            kind,
            f"{milliseconds:.2f} ({milliseconds / base[0]:.1f}x)",
            f"{cost.peak_mb:.0f} MB ({cost.peak_mb / base[1]:.1f}x)",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
