"""The parent of the worker: waits, passes signals on, enforces limits, and says in one line how a worker died."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from qcompiler.errors import EXIT_INTERNAL, EXIT_INTERRUPT, EXIT_USER

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""What asks the command to stop."""

MEMORY_SHARE = 0.9
"""The share of the machine's memory that the worker may take if nothing else is said."""

_TICK = 0.1
_GRACE_SECONDS = 5.0
_MOST_NOISE = 1 << 16

_LIBRARIES = {"onnxruntime": "ONNX Runtime", "onnx": "the onnx package", "google": "protobuf", "PIL": "Pillow"}


@dataclass
class Watch:
    """One worker. `news`: a pipe of JSON lines; `noise`: one of what native libraries and the fault handler print."""

    pid: int
    news: int
    noise: int
    debug: bool
    doing: str = "while starting"
    where: str = ""
    ours: bool = False
    folders: list[str] = field(default_factory=list)
    seconds: float | None = None
    memory: int = field(default_factory=lambda: int(MEMORY_SHARE * _machine_memory()))
    verdict: str = ""
    _began: float = field(default_factory=time.monotonic)
    _step_ends: float | None = None
    _asked: int = 0
    _killed_at: float | None = None
    _unread: bytes = b""
    _noises: bytes = b""

    def run(self) -> int:
        """Wait for the worker to end and return the exit code; print a line if it died."""
        for number in SIGNALS:
            signal.signal(number, self._pass_on)
        open_ends, status = [self.news, self.noise], None
        while status is None:
            ready, _, _ = select.select(open_ends, [], [], _TICK)
            for end in ready:
                data = os.read(end, _MOST_NOISE)
                if not data:
                    open_ends.remove(end)
                self._take(end, data)
            self._enforce()
            if self.news not in open_ends:
                status = os.waitpid(self.pid, 0)[1]
            elif not ready:  # the pipe may outlive the worker, in a process that it started
                gone, found = os.waitpid(self.pid, os.WNOHANG)
                status = found if gone else None
        self._drain()
        return self._judge(os.waitstatus_to_exitcode(status))

    def _drain(self) -> None:
        while select.select([self.noise], [], [], 0)[0]:
            data = os.read(self.noise, _MOST_NOISE)
            if not data:
                return
            self._take(self.noise, data)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Give the worker a while to unwind; not so the second time, and not if native code does not return."""
        if self._asked:
            self._kill()
        self._asked = number
        self._killed_at = time.monotonic() + _GRACE_SECONDS
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def _take(self, end: int, data: bytes) -> None:
        if end == self.noise:
            self._noises = (self._noises + data)[-_MOST_NOISE:]
            if self.debug:
                os.write(2, data)
            return
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self._learn(json.loads(line))

    def _learn(self, news: dict[str, object]) -> None:
        match news:
            case {"doing": str(what), "where": str(where), "seconds": seconds, "ours": bool(ours)}:
                self.doing, self.where, self.ours = what, where or self.where, ours
                self._step_ends = time.monotonic() + seconds if isinstance(seconds, float) else None
            case {"folder": str(folder)}:
                self.folders.append(folder)
            case {"limit_seconds": seconds, "limit_memory": memory}:
                self.seconds = seconds if isinstance(seconds, float) else self.seconds
                self.memory = memory if isinstance(memory, int) else self.memory

    def _enforce(self) -> None:
        now = time.monotonic()
        if self._killed_at is not None and now > self._killed_at:
            self._kill()
        elif self.seconds is not None and now - self._began > self.seconds:
            self._stop(f"stopped after {self.seconds:g} s {self.doing}", "--time-limit")
        elif self._step_ends is not None and now > self._step_ends:
            self._stop(f"gave up {self.doing}, which takes unusually long", self.where)
        elif self.memory and _private_bytes(self.pid) > self.memory:
            self._stop(f"stopped at {self.memory / 1e9:.3g} GB of memory {self.doing}", "--memory-limit")

    def _stop(self, what: str, where: str) -> None:
        if not self.verdict:
            self.verdict = f"error: {what}" + (f" ({where})" if where else "")
            self._kill()

    def _judge(self, code: int) -> int:
        if code >= 0:
            return code
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        if self._asked:
            if self._asked != signal.SIGINT:
                return 128 + self._asked
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPT
        if self.verdict:
            print(self.verdict, file=sys.stderr)
            return EXIT_USER
        return self._blame(signal.Signals(-code))

    def _blame(self, number: signal.Signals) -> int:
        where = f" ({self.where})" if self.where else ""
        if number == signal.SIGKILL:
            told = f"the system killed the compiler {self.doing}, probably for want of memory"
            print(f"error: {told}{where}", file=sys.stderr)
            return EXIT_USER
        culprit = self._culprit()
        if culprit and not self.ours:
            print(f"error: {culprit} crashed ({number.name}) {self.doing}{where}", file=sys.stderr)
            return EXIT_USER
        hint = "" if self.debug else "; run again with --debug for the traceback"
        told = f"{culprit or 'the compiler'} crashed ({number.name}) {self.doing}"
        print(f"internal error: {told} ({self.where}{hint})".replace("(; ", "("), file=sys.stderr)
        return EXIT_INTERNAL

    def _culprit(self) -> str:
        """The library whose Python code called what crashed, from the fault handler's traceback; "" for none that is known."""
        frames = re.findall(r'^  File "([^"]*)"', self._noises.decode(errors="replace"), re.MULTILINE)
        folders = Path(frames[0]).parts if frames else ()
        return next((name for folder, name in _LIBRARIES.items() if folder in folders[-6:]), "")


def _machine_memory() -> int:
    """Bytes of memory of the machine or of the container; 0 if nobody knows."""
    try:
        known = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0
    with suppress(OSError, ValueError):
        known = min(known, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return known


def _private_bytes(pid: int) -> int:
    """Memory of a process but for files that it has mapped, which the system can take back; 0 if nobody knows."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
