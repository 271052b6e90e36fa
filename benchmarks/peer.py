"""Quantize a model with onnxruntime.quantization: pre-process, QDQ, uint8 activations, int8 weights per channel, MinMax.

python benchmarks/peer.py MODEL --calib DATA -o OUT
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from qcompiler.data import Source, open_source
from qcompiler.images import PRESETS
from qcompiler.load import input_specs

OLDEST_OPSET = 13
"""Below this its per-channel QDQ is not valid ONNX; the model is raised to opset 17 first."""


class Reader(quantization.CalibrationDataReader):
    """The calibration data, sample by sample."""

    def __init__(self, source: Source) -> None:
        self._samples: Iterator[Any] = iter(source)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._samples, None)


def quantize(model: Path, calib: Path, preset: str | None, out: Path) -> None:
    """Write the quantized model."""
    proto = onnx.load(model)
    source = open_source(calib, input_specs(proto), PRESETS[preset] if preset else None)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # it leaves files in the current folder
        raised, prepared = Path(folder, "raised.onnx"), Path(folder, "prepared.onnx")
        opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
        onnx.save(proto if opset >= OLDEST_OPSET else onnx.version_converter.convert_version(proto, 17), raised)
        try:
            quant_pre_process(raised, prepared)
        except Exception:  # symbolic shape inference does not know all operators
            quant_pre_process(raised, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            out,
            Reader(source),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=False,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--preset", choices=list(PRESETS))
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        quantize(given.model.resolve(), given.calib.resolve(), given.preset, given.output.resolve())


if __name__ == "__main__":
    main()
