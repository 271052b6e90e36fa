"""The subcommands of `qcompile`: one module each, whose `command` is loaded when it is asked for."""

from __future__ import annotations

COMMANDS = (
    "compile",
    "resume",
    "sensitivity",
    "compare",
    "diff",
    "bisect",
    "reduce",
    "explain",
    "report",
    "profile",
    "new-pass",
    "ops",
    "passes",
    "targets",
)
"""Names of commands; the module has the same name, with `_` for `-`."""
