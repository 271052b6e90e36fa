"""The command in two processes: a worker that does the work, and a parent that survives what native code does to the worker.

ONNX Runtime, the ONNX checker and shape inference are native code that reads foreign files. Some files kill them, others never
let them return. The fork comes before anything heavy is imported, so that it costs 0.03 s and hardly any memory. The
worker tells its parent through a pipe what it is about to do; the parent (`watch.py`) makes one line of its death.

In a process that was not forked by `start`, all of this does nothing: `compile_model` runs where it is called.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

from qcompiler.errors import UserError
from qcompiler.watch import SIGNALS, Watch

LOADING_SECONDS = 600.0
"""What native code may take to load a model, before another second for each megabyte; an EfficientNet takes 0.3 s."""

_PDEATHSIG = 1

_COLLECTED = 5000
"""New objects after which garbage is looked for: a graph makes many, and few of them in cycles that are garbage soon."""

_channel: int | None = None


def prepare() -> None:
    """Let this process unwind its stack when it is told to end."""
    signal.signal(signal.SIGTERM, _leave)


def start(debug: bool = False) -> int | None:
    """Fork; return None in the worker, and in the parent, when the worker has ended, the exit code.

    Where there is no fork, or where threads and native libraries make one unsafe, this process goes on as its own worker.
    debug: let through what native libraries print.
    """
    global _channel  # noqa: PLW0603  (a process has one parent)
    if not hasattr(os, "fork") or threading.active_count() > 1 or "numpy" in sys.modules:
        return None
    (news, channel), (noise, muffled) = os.pipe(), os.pipe()
    parent, pid = os.getpid(), os.fork()
    if pid:
        os.close(channel)
        os.close(muffled)
        return Watch(pid, news, noise, debug).run()
    os.close(news)
    os.close(noise)
    _channel = channel
    _become_worker(parent, muffled)
    return None


def _become_worker(parent: int, muffled: int) -> None:
    """Die with the parent, leave no core file, and let only Python write to the standard error."""
    import resource  # noqa: PLC0415  (not on Windows)

    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415  (the parent has no use for it)

        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if sys.stderr is not None:
        sys.stderr = _reopened(sys.stderr)
    os.dup2(muffled, 2)
    os.close(muffled)
    faulthandler.enable(2)
    for number in SIGNALS:
        signal.signal(number, _leave)
    gc.set_threshold(_COLLECTED)


def _reopened(stream: Any) -> IO[str]:
    """The stream on a descriptor of its own, so that 2 can be given to native libraries."""
    return open(  # noqa: PTH123  (a descriptor)
        os.dup(stream.fileno()), "w", buffering=1, encoding=stream.encoding, errors=stream.errors
    )


def end(code: int) -> NoReturn:
    """Exit. A worker does not take its objects apart first, which would take a tenth of a second and more."""
    if _channel is not None:
        with suppress(OSError, ValueError):  # output that cannot be written: a full disk, a closed pipe
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


def _leave(number: int, frame: FrameType | None) -> None:
    """Unwind the stack once; the second time the parent forwards a signal that the terminal sent to both."""
    for other in SIGNALS if _channel is not None else ():
        signal.signal(other, signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _tell(**news: Any) -> None:
    if _channel is not None:
        os.write(_channel, json.dumps(news).encode() + b"\n")


def doing(what: str, where: str = "", *, seconds: float | None = None, ours: bool = False) -> None:
    """Say what comes next, for the message of a crash: `while loading the model`, `in pass calibrate`.

    where: the file. seconds: what it may take, until the next call. ours: whether a crash is a bug of the compiler.
    """
    _tell(doing=what, where=where, seconds=seconds, ours=ours)


def limit(*, seconds: float | None = None, memory: int | None = None) -> None:
    """Bound the seconds or the bytes that the worker may take. Raises UserError where nobody can enforce it."""
    if _channel is None or (memory is not None and not Path("/proc/self/statm").exists()):
        raise UserError("no process watches this one here", "--time-limit" if memory is None else "--memory-limit")
    _tell(limit_seconds=seconds, limit_memory=memory)


@contextmanager
def scratch(beside: Path | None = None) -> Iterator[Path]:
    """A temporary folder, hidden if it is `beside` others, that is gone afterwards even if this process is killed."""
    with tempfile.TemporaryDirectory(dir=beside, prefix="qcompiler-" if beside is None else ".qcompiler-") as name:
        _tell(folder=str(Path(name).absolute()))
        yield Path(name)
