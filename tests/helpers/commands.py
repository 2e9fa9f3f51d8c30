"""The command line, run in this process."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from tl_sparsify import cli


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


class Terminal(io.StringIO):
    """A stream that says that somebody looks at it."""

    def isatty(self) -> bool:
        return True


def command(*arguments: str | Path, terminal: bool = False) -> Outcome:
    """Run the command in this process."""
    out, err = (Terminal() if terminal else io.StringIO() for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["tl-sparsify", *map(str, arguments)])
        patch.setenv("TERM", "xterm-256color")
        patch.setenv("COLUMNS", "300")
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Outcome(code, out.getvalue(), err.getvalue())


QUICK = ("--keep", "1.0", "--rounds", "1")  # nothing is removed, so there are no constants to refit
