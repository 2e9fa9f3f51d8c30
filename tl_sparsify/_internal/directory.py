"""A directory that is complete, or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_free(path: Path, mark: str, kind: str) -> None:
    """Refuse a path at which there is something else than an empty folder or a ``kind`` (which has the file ``mark``).

    Raises:
        FileExistsError: it is not free.
    """
    if path.exists() and not (path / mark).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is there and is no {kind}: choose another name, or remove it yourself")


@contextmanager
def directory(path: Path, mark: str, kind: str) -> Iterator[Path]:
    """A folder next to ``path`` to write to, which is renamed to ``path`` at the end, or removed after an exception.
    An older directory of the same ``kind``, which has the file ``mark``, is replaced.

    Raises:
        FileExistsError: ``path`` is there and is of no such kind.
    """
    check_free(path, mark, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        beside.mkdir()
        yield beside
        if path.exists():
            path.replace(old)
        beside.replace(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.replace(path)
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
