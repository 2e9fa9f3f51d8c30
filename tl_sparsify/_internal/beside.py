"""Names to write to next to what is written, and what is left of processes that were killed while they wrote.

A name says which process writes, on which machine: what belongs to none that is alive is of nobody any more.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
from pathlib import Path

_NAME = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]*)\.(?P<pid>\d+)\.(?P<token>[0-9a-f]{8})\.(?P<kind>part|old)")
_MINE: set[str] = set()
"""Of the names with this process's number those that it gave: an earlier process may have had its number."""


def beside(path: Path, kind: str = "part") -> Path:
    """A new hidden name in the folder of ``path``, of this process alone."""
    token = secrets.token_hex(4)
    _MINE.add(token)
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{token}.{kind}")


def left_over(folder: Path, kind: str = "part", name: str | None = None) -> list[Path]:
    """What processes that are gone left in a folder of the names that :func:`beside` gives (for ``name`` alone, where
    it is given)."""
    found: list[Path] = []
    for path in folder.glob(f".*.{kind}"):
        match = _NAME.fullmatch(path.name)
        if match is not None and (name is None or match["name"] == name) and _gone(match):
            found.append(path)
    return sorted(found)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what :func:`left_over` finds of things that were never complete."""
    for path in left_over(folder, "part", name):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and may be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", platform.node())


def _gone(match: re.Match[str]) -> bool:
    if match["host"] != _host():
        return False  # nothing is known of another machine's processes
    pid = int(match["pid"])
    if pid == os.getpid():
        return match["token"] not in _MINE
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
