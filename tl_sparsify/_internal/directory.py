"""A directory that is complete, or not there; and results in a folder, of one run only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
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


@contextmanager
def results(folder: Path, names: Collection[str], mark: str) -> Iterator[Path]:
    """Where to write ``names``, of which ``mark`` says that they are complete: in ``folder`` itself where it has none
    of them; else aside, and at the end they take the place of all the older ones. After an exception these are as
    they were. Other things in the folder are left alone.

    Old and new are never side by side: in between, ``mark`` is not there.
    """
    if not any((folder / name).exists() for name in names):
        yield folder
        return
    aside, old = (folder / f".{kind}.{os.getpid()}.part" for kind in ("new", "old"))
    order = [mark, *sorted(set(names) - {mark})]
    out: list[str] = []
    back: list[str] = []
    try:
        aside.mkdir()
        old.mkdir()
        yield aside
        for name in order:  # the mark goes first and comes last
            if (folder / name).exists():
                (folder / name).replace(old / name)
                out.append(name)
        for name in reversed(order):
            if (aside / name).exists():
                (aside / name).replace(folder / name)
                back.append(name)
    except BaseException:
        for name in back:
            (folder / name).replace(aside / name)
        for name in reversed(out):
            (old / name).replace(folder / name)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
