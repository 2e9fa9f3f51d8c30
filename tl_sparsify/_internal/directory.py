"""A directory that is complete, or not there; and results in a folder, of one run only."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tl_sparsify._internal.files import beside, left_over, remove, sweep, write_text
from tl_sparsify._internal.ranks import agreed, is_main, own_files

_NEW = ".complete"
"""In a folder of new results that are complete: their names. From then on they replace the older ones."""


def check_free(path: Path, mark: str, kind: str) -> None:
    """Refuse a path at which there is something else than an empty folder or a ``kind`` (which has the file ``mark``).

    Raises:
        FileExistsError: it is not free.
    """
    if path.exists() and not (path / mark).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is there and is no {kind}: choose another name, or remove it yourself")


@contextmanager
def _of_main(where: AbstractContextManager[Path], what: str) -> Iterator[Path]:
    """``where`` in the first of several processes, a folder that goes again in the others: all write alike."""
    with agreed(what), own_files():
        if is_main():
            with where as into:
                yield into
        else:
            with TemporaryDirectory() as into:
                yield Path(into)


def directory(path: Path, mark: str, kind: str) -> AbstractContextManager[Path]:
    """A folder next to ``path`` to write to, which is renamed to ``path`` at the end, or removed after an exception.
    An older directory of the same ``kind``, which has the file ``mark``, is replaced. Of several processes that of the
    first one is kept.

    Raises:
        FileExistsError: ``path`` is there and is of no such kind.
    """
    return _of_main(_directory(path, mark, kind), f"writing {path.name}")


@contextmanager
def _directory(path: Path, mark: str, kind: str) -> Iterator[Path]:
    settle_directory(path)
    check_free(path, mark, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = beside(path), beside(path, "old")
    try:
        part.mkdir()
        yield part
        if path.exists():
            path.replace(old)
        part.replace(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.replace(path)
        remove(part)
        raise
    remove(old)


def settle_directory(path: Path) -> None:
    """Bring back a directory whose replacement was killed between its two renamings, and remove what else such
    processes left next to it."""
    if not path.parent.is_dir():
        return
    for old in left_over(path.parent, "old", path.name):
        if path.exists():
            remove(old)
        else:
            old.replace(path)
    sweep(path.parent, path.name)


def results(folder: Path, names: Collection[str], mark: str) -> AbstractContextManager[Path]:
    """Where to write ``names``, of which ``mark`` says that they are complete: in ``folder`` itself where it has none
    of them; else aside, and at the end they take the place of all the older ones. After an exception these are as
    they were. Other things in the folder are left alone.

    Old and new are never side by side: in between, ``mark`` is not there. One process at a time writes: the folder is
    locked. Of several processes launched together that is the first one.

    Raises:
        ValueError: another process is writing results into the folder.
    """
    return _of_main(_results(folder, names, mark), f"results in {folder.name}")


@contextmanager
def _results(folder: Path, names: Collection[str], mark: str) -> Iterator[Path]:
    with _locked(folder):
        settle(folder, names, mark)
        if any((folder / name).exists() for name in names):
            with _aside(folder, names, mark) as into:
                yield into
        else:
            yield folder


@contextmanager
def _aside(folder: Path, names: Collection[str], mark: str) -> Iterator[Path]:
    aside, old = beside(folder / "new"), beside(folder / "new", "old")
    order = _order(names, mark)
    new: list[str] = []
    try:
        aside.mkdir()
        yield aside
        new = [name for name in order if (aside / name).exists()]
        write_text(aside / _NEW, json.dumps(new))
        old.mkdir()
        for name in order:  # the mark goes first and comes last
            if (folder / name).exists():
                (folder / name).replace(old / name)
        for name in reversed(order):
            if name in new:
                (aside / name).replace(folder / name)
    except BaseException:  # the disk says what has moved: a signal may come between a renaming and a note of it
        for name in new:
            if not (aside / name).exists():
                (folder / name).replace(aside / name)
        for name in reversed(order):
            if (old / name).exists():
                (old / name).replace(folder / name)
        raise
    finally:
        remove(aside)
        remove(old)


def settle(folder: Path, names: Collection[str], mark: str) -> None:
    """What a process left that was killed while it wrote results: new ones that were complete take their places, others
    go, and so do files that were half written."""
    if not folder.is_dir():
        return
    for aside in left_over(folder, "part", "new"):
        if (aside / _NEW).is_file():
            _finish(folder, aside, _order(names, mark))
        remove(aside)
    for old in left_over(folder, "old", "new"):
        remove(old)
    sweep(folder)
    for name in names:
        if not (folder / name).exists():
            settle_directory(folder / name)


def _finish(folder: Path, aside: Path, order: Sequence[str]) -> None:
    """Go on where the exchange stopped. What is new and no longer aside is in its place."""
    new = json.loads((aside / _NEW).read_text())
    for name in order:
        if name not in new or (aside / name).exists():
            remove(folder / name)
    for name in reversed(order):
        if name in new and (aside / name).exists():
            (aside / name).replace(folder / name)


def _order(names: Collection[str], mark: str) -> list[str]:
    return [mark, *sorted(set(names) - {mark})]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else may hold this lock; it ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another run is writing into {folder}: wait until it ends, or name another folder"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)
