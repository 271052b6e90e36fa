"""The command and its worker: crashes, hangs, limits, signals, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest

from qcompiler import supervise
from qcompiler.errors import UserError
from tests.test_cli import broken
from tests.test_compile import net

SCRATCH = """from qcompiler import supervise; import ctypes, pathlib, sys, time
        with supervise.scratch(pathlib.Path()) as folder:
            (folder / "draft").write_text("half")
            sys.stdout.write("ready"); sys.stdout.flush()
            """
DEADLOCK = "lock = ctypes.create_string_buffer(64); take = ctypes.CDLL(None).pthread_mutex_lock; take(lock), take(lock)"
SEGFAULT = "import ctypes; ctypes.string_at(1)"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with net.onnx and an older output."""
    onnx.save(net(), tmp_path / "net.onnx")
    (tmp_path / "net.int8.onnx").write_bytes(b"OLD")
    return tmp_path


def start(folder: Path, body: str, *options: str) -> subprocess.Popen[str]:
    """The command with a pass that does `body`."""
    words = [sys.executable, "-m", "qcompiler", *map(str, broken(folder, body)), *options]
    return subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str], folder: Path) -> tuple[int, str]:
    """Exit code and messages of a command that failed; it left nothing behind."""
    _, err = process.communicate(timeout=60)
    assert sorted(p.name for p in folder.iterdir()) == ["broken.py", "net.int8.onnx", "net.onnx"]
    assert (folder / "net.int8.onnx").read_bytes() == b"OLD"
    return process.returncode, err


@pytest.mark.parametrize(("body", "name"), [("import os; os.abort()", "SIGABRT"), (SEGFAULT, "SIGSEGV")])
def test_a_crash_is_one_line(folder: Path, body: str, name: str) -> None:
    hint = "run again with --debug for the traceback"
    told = f"internal error: the compiler crashed ({name}) in pass broken (net.onnx; {hint})\n"
    assert end(start(folder, body), folder) == (70, told)


def test_debug_shows_where_native_code_crashed(folder: Path) -> None:
    code, err = end(start(folder, f"{SEGFAULT}", "--debug"), folder)
    assert code == 70
    assert "Fatal Python error: Segmentation fault" in err and 'broken.py", line' in err


def test_a_crash_inside_onnxruntime_is_not_ours(folder: Path) -> None:
    package = folder / "lib" / "onnxruntime"
    package.mkdir(parents=True)
    (package / "native.py").write_text("import os; os.abort()")
    body = f"import runpy; runpy.run_path({str(package / 'native.py')!r})"
    process = start(folder, body)
    assert process.communicate()[1] == "error: ONNX Runtime crashed (SIGABRT) in pass broken (net.onnx)\n"
    assert process.returncode == 2


def test_what_native_libraries_print_stays_out(folder: Path) -> None:
    for options, told in (((), "error: no good\n"), (("--debug",), "noise\n")):
        body = "import os; os.write(2, b'noise\\n'); from qcompiler import UserError; raise UserError('no good')"
        code, err = end(start(folder, body, *options), folder)
        assert code == 2
        assert (err == told) if not options else (told in err)


@pytest.mark.parametrize(
    ("body", "options", "told"),
    [
        ("import time; time.sleep(60)", ["--time-limit", "1.5"], "stopped after 1.5 s "),
        (
            "import numpy as np; a = [np.ones(10**6) for _ in range(10**5)]",
            ["--memory-limit", "0.4GB"],
            "stopped at 0.4 GB of memory in pass broken (--memory-limit)",
        ),
        (
            "import time; from qcompiler import supervise; supervise.doing('while x', 'f', seconds=0.2); time.sleep(60)",
            [],
            "gave up while x, which takes unusually long (f)",
        ),
        ("import numpy as np; np.ones(10**13)", [], "not enough memory: Unable to allocate 72.8 TiB"),
    ],
)
def test_limits(folder: Path, body: str, options: list[str], told: str) -> None:
    code, err = end(start(folder, body, *options), folder)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {told}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_nothing_behind(folder: Path, number: signal.Signals) -> None:
    process = start(folder, f"{SCRATCH}time.sleep(60)")
    assert process.stdout and process.stdout.read(5) == "ready"
    process.send_signal(number)
    expected = (130, "\ninterrupted\n") if number == signal.SIGINT else (128 + number, "")
    code, err = end(process, folder)
    assert (code, err.strip()) == (expected[0], expected[1].strip())


def test_a_second_ctrl_c_does_not_wait_for_native_code(folder: Path) -> None:
    process = start(folder, f"{SCRATCH}{DEADLOCK}")
    assert process.stdout and process.stdout.read(5) == "ready"
    time.sleep(1)  # until it hangs
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert end(process, folder) == (130, "interrupted\n")


def test_a_killed_worker_leaves_nothing_behind(folder: Path) -> None:
    process = start(folder, f"{SCRATCH}import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    told = "error: the system killed the compiler in pass broken, probably for want of memory (net.onnx)\n"
    assert end(process, folder) == (2, told)


def test_the_worker_dies_with_its_parent(folder: Path) -> None:
    process = start(folder, "import os, sys, time; print(os.getpid()); sys.stdout.flush(); time.sleep(60)")
    assert process.stdout
    worker = int(process.stdout.readline())
    process.kill()
    process.communicate(timeout=10)  # ends when the last holder of the pipes does
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(worker, 0)
            if Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
                raise ProcessLookupError
            time.sleep(0.05)


def test_no_limits_without_a_parent() -> None:
    with pytest.raises(UserError, match=r"no process watches this one here \(--time-limit\)"):
        supervise.limit(seconds=1.0)


def test_scratch_is_gone_afterwards(tmp_path: Path) -> None:
    with supervise.scratch(tmp_path) as folder:
        (folder / "x").write_text("x")
        assert folder.parent == tmp_path and folder.name.startswith(".qcompiler-")
    assert not list(tmp_path.iterdir())
