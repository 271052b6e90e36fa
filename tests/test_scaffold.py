"""new-pass: the package works after the three commands that the document names; what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qcompiler.errors import UserError
from qcompiler.scaffold import FILES, new_pass
from tests.sandbox import Sandbox

DOCUMENT = Path(__file__).parent.parent / "docs" / "write-a-pass.md"


def test_the_commands_of_the_document_work(tmp_path: Path) -> None:
    first = re.search(r"```console\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert first is not None
    commands = [line.removeprefix("$ ") for line in first[1].splitlines()]
    assert commands == ["qcompile new-pass my-pass", "pip install -e 'my-pass[dev]'", "pytest my-pass"]
    box = Sandbox.make(tmp_path / "env")
    written, _, tested = (box.output(command, tmp_path) for command in commands)
    assert all(command in written for command in commands[1:])
    assert re.search(r"\d+ passed", tested)
    assert not re.search(r"failed|skipped|warning", tested)
    explained = box.output("qcompile passes my-pass", tmp_path)
    assert "qcompiler-my-pass 0.1.0" in explained
    assert str(tmp_path / "my-pass/src/qcompiler_my_pass/__init__.py") in explained
    taken = box.run("qcompile new-pass my-pass --dir other", tmp_path)
    assert (taken.returncode, taken.stderr) == (
        2,
        "error: there is a pass 'my-pass' already; choose another name (NAME)\n",
    )


def test_the_files_and_the_names_in_them(tmp_path: Path) -> None:
    files = new_pass("drop-2-abs", tmp_path / "a" / "b", {})
    names = [path.format(module="qcompiler_drop_2_abs") for path in FILES]
    assert [path.relative_to(tmp_path / "a" / "b").as_posix() for path in files] == names
    text = "\n".join(path.read_text() for path in files)
    assert "$" not in text.replace("$ ", "")
    assert "class Drop2Abs:" in text
    assert 'drop-2-abs = "qcompiler_drop_2_abs:PLUGIN"' in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DropAbs", "'DropAbs' is not in kebab-case"),
        ("drop_abs", "'drop_abs' is not in kebab-case"),
        ("../evil", "'../evil' is not in kebab-case"),
        ("-x", "'-x' is not in kebab-case"),
        ("cleanup", "there is a pass 'cleanup' already"),
        ("passes", "there is a module 'qcompiler_passes' already"),
    ],
)
def test_names_that_do_not_do(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        new_pass(name, tmp_path / "new", {"cleanup": object})
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="the folder is not empty"):
        new_pass("drop-abs", tmp_path, {})
    with pytest.raises(UserError, match="cannot write there: Not a directory"):
        new_pass("drop-abs", tmp_path / "mine", {})
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
