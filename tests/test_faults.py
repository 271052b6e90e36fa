"""The n-th open, write, rename, session or run fails: one clear line, nothing left behind, and an older output as it was."""

from __future__ import annotations

import builtins
import errno
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qcompiler import measure
from tests.support import model_from_text
from tests.test_cli import Run, folder, qcompile

__all__ = ["folder", "qcompile"]

FULL = OSError(errno.ENOSPC, "No space left on device")
INSTALLED = tuple({sys.prefix, sys.base_prefix})


class Fuse:
    """Raises an error at its n-th call, and says whether it came to that."""

    def __init__(self, n: int, error: Exception) -> None:
        self.left, self.error = n, error

    @property
    def blown(self) -> bool:
        return self.left <= 0

    def burn(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.burn()
            return function(*arguments, **options)

        return call


class Written:
    """A file whose writes burn a fuse."""

    def __init__(self, file: Any, fuse: Fuse) -> None:
        self._file, self.write = file, fuse.before(file.write)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


Patch = pytest.MonkeyPatch


def opening(patch: Patch, fuse: Fuse) -> None:
    """Any file but those of Python and of installed packages."""
    real = io.open

    def call(file: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(file, int) and not str(file).startswith(INSTALLED):
            fuse.burn()
        return real(file, *arguments, **options)

    patch.setattr(io, "open", call)
    patch.setattr(builtins, "open", call)


def writing(patch: Patch, fuse: Fuse) -> None:
    real = io.open

    def call(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        opened = real(file, mode, *arguments, **options)
        return Written(opened, fuse) if set(mode) & set("wax+") else opened

    patch.setattr(io, "open", call)
    patch.setattr(builtins, "open", call)


def renaming(patch: Patch, fuse: Fuse) -> None:
    for name in ("replace", "rename", "mkdir"):
        patch.setattr(os, name, fuse.before(getattr(os, name)))


def parsing(patch: Patch, fuse: Fuse) -> None:
    for name in ("load", "load_model_from_string"):
        patch.setattr(onnx, name, fuse.before(getattr(onnx, name)))


def loading(patch: Patch, fuse: Fuse) -> None:
    patch.setattr(ort, "InferenceSession", fuse.before(ort.InferenceSession))


def running(patch: Patch, fuse: Fuse) -> None:
    class Session(ort.InferenceSession):  # type: ignore[misc]
        def run(self, *arguments: Any, **options: Any) -> Any:
            fuse.burn()
            return super().run(*arguments, **options)

    patch.setattr(ort, "InferenceSession", Session)


NATIVE = RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : broken\nin two lines")

FAULTS: dict[str, tuple[Callable[[Patch, Fuse], None], Exception, int]] = {
    "open": (opening, OSError(errno.EMFILE, "Too many open files"), 1),
    "write": (writing, FULL, 1),
    "rename": (renaming, FULL, 1),
    "parse": (parsing, ValueError("broken"), 1),
    "load": (loading, NATIVE, 1),
    "load-memory": (loading, MemoryError("bad allocation"), 4),
    "run": (running, NATIVE, 7),
}
"""What fails -> how, the error, and by how much n grows."""


@contextmanager
def patched() -> Iterator[Patch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def tiny() -> onnx.ModelProto:
    weight = np.random.default_rng(0).normal(0, 0.3, (4, 3, 3, 3)).astype(np.float32)
    return model_from_text("g (float[1,3,8,8] x) => (float[1,4,6,6] y) { t = Conv(x, w) y = Relu(t) }", {"w": weight})


@pytest.mark.parametrize("option", ["-q", "--json"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(
    qcompile: Run, folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: Patch, fault: str, option: str
) -> None:
    inject, error, step = FAULTS[fault]
    monkeypatch.setattr(measure, "RACE_SECONDS", 0)
    (folder / "net.onnx").write_bytes(tiny().SerializeToString())
    np.savez(folder / "calib.npz", x=np.random.default_rng(1).normal(size=(6, 3, 8, 8)).astype(np.float32))
    scratch, out = tmp_path_factory.mktemp("scratch"), folder / "out.onnx"
    command = ("net.onnx", "--calib", "calib.npz", "-o", "out.onnx", option, "-O1")
    assert qcompile(*command)[0] == 0
    wanted, names = out.read_bytes(), sorted(p.name for p in folder.iterdir())
    failures, n, fuse = 0, 1, None
    while fuse is None or fuse.blown:
        fuse = Fuse(n, error)
        out.write_bytes(b"OLD")
        with patched() as patch:
            patch.setattr(tempfile, "tempdir", str(scratch))
            inject(patch, fuse)
            code, printed, told = qcompile(*command)
        case = f"{fault} {n}: {code} {told}"
        left = [p.name for p in folder.iterdir() if not p.name.startswith("qcompiler-repro-")]
        assert bool(printed) == (code == 0 and option == "--json"), case
        assert sorted(left) == names, case
        assert not list(scratch.iterdir()), case
        if code:
            failures += 1
            assert code in (2, 70), case
            assert len(told.splitlines()) == 1, case
            assert told.startswith("error: " if code == 2 else "internal error: "), case
            assert out.read_bytes() == b"OLD", case
        else:
            assert told == "", case
            assert out.read_bytes() == wanted, case
        n += step
    assert failures, "nothing was hit"
