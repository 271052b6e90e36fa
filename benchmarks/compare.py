"""Compare qcompiler with onnxruntime.quantization (see peer.py for its settings) in one run.

python benchmarks/compare.py                                          the models in models/
python benchmarks/compare.py MODEL... --calib DATA [--test FILE]      any others that share their data

Compile time and memory are those of one process from start to end. Accuracy and SQNR are measured on the test data, which
neither compiler has seen, if --test is given. Times are medians of CPU time on one thread, with the float model and the int8
model in turns; of five such races the fastest counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from child import run_python
from PIL import Image
from rich.console import Console
from rich.table import Table

from qcompiler import runtime
from qcompiler.data import Preprocess, Source, as_source, open_source
from qcompiler.errors import UserError
from qcompiler.images import PRESETS
from qcompiler.load import input_specs, load_model
from qcompiler.measure import compare
from qcompiler.runtime import Feeds, Session

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent / "models"
COMPILERS = ("qcompiler", "onnxruntime")
WIDTH = 130
ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """One compiled model. Accuracies in percent, SQNR in dB; `error`: why there is none, then the numbers are 0."""

    model: str
    compiler: str
    float_accuracy: float | None = None
    accuracy: float | None = None
    sqnr: float | None = None
    float_ms: float = 0.0
    int8_ms: float = 0.0
    float_bytes: int = 0
    int8_bytes: int = 0
    compile_seconds: float = 0.0
    peak_mb: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class TestData:
    """Samples that the compilers have not seen, with the labels of their classes if known."""

    samples: Source
    labels: np.ndarray | None


@contextlib.contextmanager
def test_data(file: Path, model: onnx.ModelProto, preprocess: Preprocess | None) -> Iterator[TestData]:
    """Open a `.npz` with `x` and perhaps `y`: uint8 images [N, H, W] or [N, H, W, 3], or samples as the model takes them.

    Images go through the same preprocessing as calibration images do. Any other file is calibration data without labels.
    """
    specs = input_specs(model)
    arrays = dict(np.load(file, allow_pickle=False)) if file.suffix == ".npz" else {}
    if "x" not in arrays or specs[0].name == "x":
        yield TestData(open_source(file, specs, preprocess), arrays.get("y"))
    elif arrays["x"].dtype != np.uint8 or specs[0].dtype == np.uint8:
        yield TestData(as_source(arrays["x"], specs), arrays.get("y"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            for i, pixels in enumerate(arrays["x"]):
                Image.fromarray(pixels).save(Path(folder, f"{i:06d}.png"))
            yield TestData(open_source(Path(folder), specs, preprocess), arrays.get("y"))


def compile_command(compiler: str, model: Path, calib: Path, preset: str | None, out: Path) -> list[str | Path]:
    """The arguments for Python that compile a model."""
    program: list[str | Path] = [HERE / "peer.py"] if compiler == "onnxruntime" else ["-m", "qcompiler", "-q"]
    return [*program, model, "--calib", calib, "-o", out, *(["--preset", preset] if preset else [])]


def accuracy(session: Session, data: TestData) -> float | None:
    """The share of samples, in percent, whose greatest output is that of the label."""
    if data.labels is None:
        return None
    hits = [
        int(runtime.run(session, feeds)[0].argmax()) == int(label)
        for feeds, label in zip(data.samples, data.labels, strict=True)
    ]
    return round(100 * float(np.mean(hits)), 2)


def measure(compiler: str, model: Path, given: argparse.Namespace, data: TestData, folder: Path) -> Row:
    """Compile a model in a process of its own, then compare it with the float model."""
    out = folder / f"{model.stem}.{compiler}.onnx"
    try:
        cost = run_python(compile_command(compiler, model, given.calib, given.preset, out))
        before, after = runtime.session(model), runtime.session(out)
        matches = [m.sqnr for m in compare(before, after, list(data.samples)) if m.sqnr is not None]
        seconds = quietest_race(before, after, next(iter(data.samples)), given.seconds)
    except RuntimeError as error:
        return Row(model.stem, compiler, error=str(error))
    return Row(
        model.stem,
        compiler,
        accuracy(before, data),
        accuracy(after, data),
        min(matches, default=None),
        round(1e3 * seconds[0], 4),
        round(1e3 * seconds[1], 4),
        size(model),
        size(out),
        round(cost.seconds, 2),
        round(cost.peak_mb, 1),
    )


def quietest_race(before: Session, after: Session, feeds: Feeds, seconds: float) -> tuple[float, float]:
    """The times of the fastest of a few races: neighbours on the same core slow whole seconds down, both models alike."""
    return min((runtime.race(before, after, feeds, seconds / ROUNDS) for _ in range(ROUNDS)), key=sum)


def size(model: Path) -> int:
    """Bytes of a model with the data beside it."""
    beside = (model, Path(f"{model}.data"), Path(f"{model}_data"))
    return sum(file.stat().st_size for file in beside if file.is_file())


def show(rows: Sequence[Row]) -> None:
    """Print a table, and what failed."""
    table = Table(caption="speed: time of the float model / time of the int8 model")
    console = Console()
    console.width = max(console.width, WIDTH)
    for title in ("model", "compiler", "accuracy", "SQNR", "float ms", "int8 ms", "speed", "size", "compile", "memory"):
        table.add_column(title, justify="left" if title in ("model", "compiler") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row), end_section=row.compiler == COMPILERS[-1])
    console.print(table)
    for row in rows:
        if row.error:
            console.print(f"{row.model}: {row.compiler} failed: {row.error}", markup=False, highlight=False)


def cells(row: Row) -> list[str]:
    """The table's texts of one row."""
    if row.error:
        return [row.model, row.compiler, "failed"]
    scores = "" if row.accuracy is None else f"{row.float_accuracy:.1f} -> {row.accuracy:.1f} %"
    return [
        row.model,
        row.compiler,
        scores,
        "exact" if row.sqnr is None else f"{row.sqnr:.1f} dB",
        f"{row.float_ms:.3f}",
        f"{row.int8_ms:.3f}",
        f"{row.float_ms / row.int8_ms:.2f}x",
        f"{row.float_bytes / 1e3:.0f} -> {row.int8_bytes / 1e3:.0f} kB",
        f"{row.compile_seconds:.1f} s",
        f"{row.peak_mb:.0f} MB",
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--calib", type=Path, help="calibration data, as for qcompile")
    parser.add_argument(
        "--test", type=Path, help=".npz with x and labels y, or data as for --calib  [default: --calib]"
    )
    parser.add_argument("--preset", choices=list(PRESETS), help="preprocessing of images")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each comparison of speed")
    parser.add_argument("--json", action="store_true", help="print a list of objects in place of the table")
    given = parser.parse_args()
    if not given.models:
        given.models = [MODELS / "digits_resnet.onnx", MODELS / "condenser.onnx"]
        given.calib, given.test = given.calib or MODELS / "mnist_calib", given.test or MODELS / "mnist_test.npz"
    elif given.calib is None:
        parser.error("--calib is missing")
    return given


def main() -> None:
    given = arguments()
    preprocess = PRESETS[given.preset] if given.preset else None
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for model in given.models:
                with test_data(given.test or given.calib, load_model(model), preprocess) as data:
                    rows += [measure(compiler, model, given, data, Path(folder)) for compiler in COMPILERS]
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    if given.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        show(rows)


if __name__ == "__main__":
    main()
