"""An environment of its own for packages that tests install: fast, offline, and with all that this one has."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

OFFLINE = {
    "PIP_NO_INDEX": "1",
    "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as the value of `build isolation`
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}


@dataclass(frozen=True)
class Sandbox:
    """A virtual environment in which commands run as a user types them."""

    root: Path

    @classmethod
    def make(cls, folder: Path) -> Sandbox:
        """Make the environment in a new folder; it also imports what is installed for these tests."""
        venv.create(folder, with_pip=False, symlinks=True)
        box = cls(folder)
        outer = [sysconfig.get_path("purelib"), *(p for p in sys.path if p.endswith("site-packages"))]
        lines = [f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(outer)]
        inner = box.output("python -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))'", folder).strip()
        Path(inner, "outer.pth").write_text("\n".join(lines) + "\n")
        return box

    def run(self, command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command line of qcompile, pip, pytest or python with this environment's Python."""
        program, *arguments = shlex.split(command)
        start = {"python": [], "qcompile": ["-P", "-c", "from qcompiler.cli import main; main()"]}
        argv = [str(self.root / "bin" / "python"), *start.get(program, ["-m", program]), *arguments]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "PYTHON"))}
        return subprocess.run(
            argv, cwd=cwd, env={**inherited, **OFFLINE, **env}, capture_output=True, text=True, check=False
        )

    def output(self, command: str, cwd: Path) -> str:
        """What a command that must succeed prints."""
        done = self.run(command, cwd)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
