"""``run.json`` with the checksums of all that lies beside it, and of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_KEY, _ITSELF = "sha256", "run.json"


def sealed(about: Mapping[str, Any], folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """What ``run.json`` says, with checksums of those files of ``names`` that are there, and of what it says."""
    sums = {name: _sum(folder / name) for name in sorted({*names} - {_ITSELF}) if (folder / name).is_file()}
    return dict(about) | {_KEY: sums | {_ITSELF: _own(about, sums)}}


def check_seal(path: Path, about: dict[str, Any]) -> None:
    """Hold a run's files against the checksums in its ``run.json`` at ``path``; older runs have none.

    Raises:
        ValueError: a file that is damaged, gone, of another run, or outside of the folder.
    """
    folder, sums = path.parent, about.get(_KEY)
    if sums is None:
        return
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise ValueError(f"{path} is damaged ({_KEY} holds no checksums): run the task again")
    others = {name: value for name, value in sums.items() if name != _ITSELF}
    if sums.get(_ITSELF) != _own({name: value for name, value in about.items() if name != _KEY}, others):
        raise ValueError(f"{path} is damaged (its checksum does not match its content): run the task again")
    for name, value in others.items():
        check_inside(folder, name)
        if not (folder / name).is_file() or _sum(folder / name) != value:
            raise ValueError(f"{folder / name} is damaged, or of another run: run the task again")


def check_inside(folder: Path, name: str) -> None:
    """Refuse a file that does not lie in its folder.

    Raises:
        ValueError: a name with a way out, or a link that leads out.
    """
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder / name} leads out of {folder}: it is not read")


def _own(about: Mapping[str, Any], sums: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(about) | {_KEY: dict(sums)}, sort_keys=True).encode()).hexdigest()


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
