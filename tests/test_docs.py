"""The documents are true: their code runs, their tables are complete, their links lead somewhere."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from qcompiler_passes import DEFAULT_PIPELINE, LEVELS, MODES

from qcompiler.cli import cli
from qcompiler.collectors import COLLECTORS
from qcompiler.ops import Lowering, OpRule
from qcompiler.pipeline import parse_pipeline
from qcompiler.plugin import load_registry
from qcompiler.state import Phase
from qcompiler.target import Target

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/README.md",
    ROOT / "CHANGELOG.md",
]
PICTURE = ROOT / "docs/pipeline.svg"


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def table(path: Path, heading: str) -> Iterator[list[str]]:
    """The cells of the table whose first column has this heading."""
    rows = path.read_text().partition(f"| {heading} |")[2].split("\n\n")[0].splitlines()[2:]
    for row in rows:
        yield [cell.strip() for cell in row.strip("|").split(" | ")]


def commands() -> list[click.Command]:
    context = click.Context(cli)
    return [command for name in cli.list_commands(context) if (command := cli.get_command(context, name))]


def documents_with(language: str) -> list[Path]:
    return [path for path in DOCUMENTS if blocks(path, language)]


@pytest.mark.parametrize("path", documents_with("python"), ids=lambda p: str(p.relative_to(ROOT)))
def test_code_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that begin with a file's name are files; the others run in order, in a folder that has these files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    names: dict[str, object] = {}
    for block in blocks(path, "python"):
        file = re.match(r"# (\w+\.py)\n", block)
        if file:
            (tmp_path / file[1]).write_text(block)
        else:
            exec(compile(block, path.name, "exec"), names)


@pytest.mark.parametrize("path", documents_with("pycon"), ids=lambda p: str(p.relative_to(ROOT)))
def test_worked_examples(path: Path) -> None:
    session = "\n".join(blocks(path, "pycon"))
    example = doctest.DocTestParser().get_doctest(session, {}, path.name, str(path), 0)
    result = doctest.DocTestRunner(verbose=False).run(example)
    assert result.attempted > 5
    assert result.failed == 0


def test_the_code_test_finds_the_examples() -> None:
    assert {path.name for path in documents_with("python")} == {
        "README.md",
        "add-a-target.md",
        "add-an-op.md",
        "transformers.md",
        "write-a-pass.md",
    }
    assert [path.name for path in documents_with("pycon")] == ["modes.md", "numerics.md"]


def test_table_of_passes() -> None:
    registry = load_registry()
    pipelines = (LEVELS["O3"], *MODES.values())
    order = dict.fromkeys(stage.name for text in pipelines for stage in parse_pipeline(text, registry.passes).passes)
    rows = list(table(ROOT / "README.md", "pass"))
    assert [cells[0].strip("`") for cells in rows] == list(order)
    assert set(order) == set(registry.passes)
    for name, phases, what in rows:
        kind = registry.passes[name.strip("`")]
        after = [] if kind.establishes is None else [kind.establishes.name]
        assert phases.split(" → ") == [kind.requires.name, *after], name
        assert what


def test_picture_shows_every_pass_and_phase_in_order() -> None:
    text = " ".join(re.findall(r'class="(?:phase|pass|stop)"[^>]*>([^<]*)<', PICTURE.read_text()))
    words = text.replace(",", "").split()
    stages = parse_pipeline(DEFAULT_PIPELINE, load_registry().passes).passes
    assert [w for w in words if w in load_registry().passes] == list(dict.fromkeys(s.name for s in stages))
    assert [w for w in words if w.isupper()] == [phase.name for phase in Phase]
    assert [w for w in words if w in ("qdq", "integer", "kernels")] == ["qdq", "integer", "kernels"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_options_exist(path: Path) -> None:
    known = {
        "--help",
        *(name for command in commands() for p in command.params for name in (*p.opts, *p.secondary_opts)),
    }
    lines = "\n".join(
        line for line in path.read_text().splitlines() if "benchmarks/" not in line and "pip " not in line
    )
    spans = re.findall(r"`(-[^`]+)`|qcompile ([^`\n]+)", lines)
    assert spans or path.name not in ("README.md", "write-a-pass.md")
    used = {word for span in spans for text in span for word in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text)}
    assert used <= known | ({"--test", "--insert", "--level"} if path.parent.name == "benchmarks" else set())


def test_documents_and_help_name_every_collector() -> None:
    words = " ".join(runner_help().split())
    assert f"{', '.join(COLLECTORS)}, or one from a plug-in" in words
    rows = list(table(ROOT / "docs/numerics.md", "collector"))
    assert sorted(row[0].split("`")[1] for row in rows) == sorted(COLLECTORS)
    assert all(f"`{name}`" in (ROOT / "README.md").read_text() for name in COLLECTORS)


def runner_help() -> str:
    return CliRunner().invoke(cli, ["compile", "--help"]).output


def test_readme_names_every_target() -> None:
    text = (ROOT / "README.md").read_text()
    for target in load_registry().targets:
        assert f"`{target}`" in text


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if "://" not in link:
            assert (path.parent / link.partition("#")[0]).exists(), link


def test_tree_names_every_module() -> None:
    tree = (ROOT / "docs/architecture.md").read_text()
    modules = {m.name for f in ("qcompiler", "passes/qcompiler_passes") for m in (ROOT / f).glob("*.py")}
    assert set(re.findall(r"^  (\w+\.py) ", tree, re.MULTILINE)) == {m for m in modules if not m.startswith("__")}


@pytest.mark.parametrize(("document", "kind"), [("add-an-op.md", OpRule), ("add-a-target.md", Target)])
def test_tables_of_fields(document: str, kind: type[OpRule] | type[Target]) -> None:
    cells = [name for row in table(ROOT / "docs" / document, "field") for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(cells) == sorted(field.name for field in fields(kind))


def test_table_of_lowerings() -> None:
    cells = [name for row in table(ROOT / "docs/add-an-op.md", "lowering") for name in re.findall(r"`(\w+)`", row[0])]
    assert set(cells) == {lowering.name for lowering in Lowering}
