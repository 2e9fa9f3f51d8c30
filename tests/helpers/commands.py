"""The command line, run in this process or in one of its own."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def as_in_a_terminal() -> None:
    """Signals do what they do in a terminal: a suite that runs in the background ignores some, and children inherit
    that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def started(arguments: Sequence[Any], cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """A process of one thread with pipes, whose signals do what they do in a terminal."""
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [*map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=environ, text=True, preexec_fn=as_in_a_terminal, **pipes)
