"""A package with a pass, its test and its entry point, ready to install."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from qcompiler.errors import UserError

TEMPLATES = Path(__file__).parent / "templates" / "new_pass"

FILES = {
    "pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    "src/{module}/__init__.py": "pass.py.txt",
    "tests/test_{module}.py": "test.py.txt",
}
"""The files of the package and their templates."""


def new_pass(name: str, folder: Path, known: Mapping[str, Any]) -> list[Path]:
    """Write a package with a pass of that name into a folder that is new or empty; return the files.

    known: the passes that there are. Raises UserError if the name is taken or not in kebab-case, or the folder in use.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise UserError(f"{name!r} is not in kebab-case; a pass has a name such as fold-pad", "NAME")
    if name in known:
        raise UserError(f"there is a pass {name!r} already; choose another name", "NAME")
    package = f"qcompiler-{name}"
    module = package.replace("-", "_")
    if find_spec(module) is not None:
        raise UserError(f"there is a module {module!r} already; choose another name", "NAME")
    words = {
        "name": name,
        "package": package,
        "module": module,
        "cls": "".join(w.capitalize() for w in name.split("-")),
    }
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError("the folder is not empty", str(folder))
        return [_write(folder / path.format(module=module), template, words) for path, template in FILES.items()]
    except OSError as error:
        raise UserError(f"cannot write there: {error.strerror}", str(folder)) from error


def _write(path: Path, template: str, words: Mapping[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Template((TEMPLATES / template).read_text()).substitute(words))
    return path
