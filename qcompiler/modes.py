"""Modes: named pipelines beside the levels, and which options go with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qcompiler.errors import UserError
from qcompiler.pipeline import Pipeline, closest, parse_pipeline
from qcompiler.plugin import Registry

STATIC = "static"
"""The name of the default: scales of activations are constants, measured on calibration data."""

NEEDED = {
    "--emit integer": "fold-scales",
    "--emit qdq": "insert-qdq",
    "--collector": "calibrate",
    "--optimize": "place",
    "--profile": "place",
    "--bits": "quantize-blocks",
}
"""Options, and the pass without which they do nothing."""


def mode_pipeline(registry: Registry, mode: str, given: Mapping[str, Any]) -> Pipeline:
    """The pipeline of a mode. `given`: options of the command -> their values, None or () if they were not given.

    Raises UserError if there is no such mode, or if an option makes no sense with it.
    """
    names = [name for name in registry.pipelines if not re.fullmatch(r"default|O\d", name)]
    if mode not in names:
        raise UserError(f"no mode is called {mode!r}{closest(mode, [STATIC, *names])}", "--mode")
    for option in ("-O", "--passes"):
        if given.get(option) is not None:
            raise UserError(f"mode {mode} is a pipeline of its own: give one of the two", f"--mode and {option}")
    pipeline = parse_pipeline(registry.pipelines[mode], registry.passes)
    check_options(pipeline, given, f"mode {mode}")
    return pipeline


def check_options(pipeline: Pipeline, given: Mapping[str, Any], what: str) -> None:
    """Raise UserError if an option was given whose pass the pipeline lacks; `what` names the pipeline."""
    passes = {stage.name for stage in pipeline.passes}
    for option, needed in NEEDED.items():
        name, _, value = option.partition(" ")
        if given.get(name) is not None and value in ("", given[name]) and needed not in passes:
            raise UserError(f"{what} has no pass {needed}, so that this would do nothing", option)
