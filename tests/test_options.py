"""What subcommands share: tables."""

from __future__ import annotations

import re

import pytest

from qcompiler.options import print_table

HEAD = ("pass", "options", "what it does")
ROWS = [("fold", "", "Fold constants into the weights next to them"), ("calibrate", "collector=omse", "Measure")]


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    return [line.rstrip() for line in text.splitlines()]


def test_a_table_for_programs_is_aligned_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(HEAD, ROWS)
    assert shown(capsys) == [
        "pass       options         what it does",
        "fold                       Fold constants into the weights next to them",
        "calibrate  collector=omse  Measure",
    ]


@pytest.mark.parametrize(
    ("columns", "lines"),
    [
        (
            60,
            [
                "pass       options         what it does",
                "fold                       Fold constants into the weights",
                "                           next to them",
                "calibrate  collector=omse  Measure",
            ],
        ),
        (
            40,
            [
                "fold",
                "    Fold constants into the weights next",
                "    to them",
                "calibrate  collector=omse",
                "    Measure",
            ],
        ),
    ],
)
def test_a_table_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int, lines: list[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    print_table(HEAD, ROWS)
    assert shown(capsys) == lines
