"""Progress: bars and spinners on standard error, only where somebody looks at it, and off on request."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def progress(items: Sequence[T], description: str, show: bool) -> Iterator[T]:
    """Yield ``items``, with a bar on standard error if ``show`` and standard error is a terminal."""
    if not (show and sys.stderr.isatty()):
        yield from items
        return
    yield from track(items, description=description, console=Console(stderr=True), transient=True)


@contextmanager
def step(description: str, show: bool) -> Iterator[None]:
    """A spinner while one step of unknown length runs."""
    if not (show and sys.stderr.isatty()):
        yield
        return
    with Console(stderr=True).status(description):
        yield
