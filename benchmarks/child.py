"""Child processes whose cost is measured from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """Wall-clock seconds and peak memory of a process from start to end, and what it printed."""

    seconds: float
    peak_mb: float
    output: str


def run_python(arguments: Sequence[str | Path]) -> Cost:
    """Run this Python with the arguments. Raises RuntimeError, with the last line of what it said, if it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        output, messages = out.read(), err.read()
    if process.returncode:
        last = (messages.strip() or output.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"exit code {process.returncode}: {last}")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in kilobytes on Linux
    return Cost(seconds, usage.ru_maxrss * unit / 1e6, output)
