"""Progress on standard error: bars and spinners in a terminal, a bar in a notebook, a line now and then where nobody
looks (a log file), and nothing on request. Of several processes the first one speaks."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track

T = TypeVar("T")

SILENCE = 30.0  # seconds at least between two lines in a log
_FIRST, _OFTEN, _WIDTH = 1.0, 0.2, 30  # of a notebook's bar: seconds before it shows, between two drawings; characters


def progress(items: Sequence[T], description: str, show: bool) -> Iterator[T]:
    """Yield ``items``, and if ``show`` say how many are done: in a log at most every 30 seconds, in a notebook where it
    takes longer than a second."""
    place = _place() if show and _is_first() else "nowhere"
    if place == "terminal":
        yield from track(items, description=escape(description), console=Console(stderr=True), transient=True)
    elif place == "nowhere":
        yield from items
    else:
        yield from _told(items, description, notebook=place == "notebook")


@contextmanager
def step(description: str, show: bool) -> Iterator[None]:
    """Say that one step of unknown length runs: a spinner, or in a log a line after 30 seconds."""
    place = _place() if show and _is_first() else "nowhere"
    if place == "terminal":
        with Console(stderr=True).status(escape(description)):
            yield
    elif place == "nowhere":
        yield
    else:
        notebook = place == "notebook"
        said = f"\r{description} ..." if notebook else f"{description}: not done after {SILENCE:.0f} s\n"
        timer = threading.Timer(_FIRST if notebook else SILENCE, _write, (said,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            shown = timer.finished.is_set()
            timer.cancel()
            if notebook and shown:
                _write("\r" + " " * len(said) + "\r")


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def _place() -> Literal["terminal", "notebook", "log"]:
    """Where standard error goes. A kernel's stream says that it is no terminal, and yet somebody looks at it."""
    if sys.stderr.isatty():
        return "terminal"
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "notebook" if getattr(shell, "kernel", None) is not None else "log"


def _told(items: Sequence[T], description: str, *, notebook: bool) -> Iterator[T]:
    start = time.monotonic()
    due, width = start + (_FIRST if notebook else SILENCE), 0
    for done, item in enumerate(items):
        now = time.monotonic()
        if now >= due and done:
            left = f"about {duration((now - start) / done * (len(items) - done))} left"
            said = f"{description}: {done} of {len(items)}, {left}"
            if notebook:
                filled = _WIDTH * done // len(items)
                said = f"[{'#' * filled}{' ' * (_WIDTH - filled)}] {said}"
                _write(f"\r{said:<{width}}")
                width = len(said)
            else:
                _write(f"{said}\n")
            due = now + (_OFTEN if notebook else SILENCE)
        yield item
    if width:
        _write("\r" + " " * width + "\r")


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _is_first() -> bool:
    from tl_sparsify._internal.ranks import is_main  # imports torch, for which --help does not wait

    return is_main()
