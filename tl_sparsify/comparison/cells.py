"""Cells of a comparison as files: a table whose first line has a checksum of the rest and of what the cell is of.

The settings that all cells have in common lie beside them; what a task's cells were made of, the model and the units,
in the task's folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.files import digest, reading, sweep, write_text
from tl_sparsify.core.reduction import fingerprint
from tl_sparsify.core.units import Units

_HEAD = "# sha256 "
_SETTINGS = "settings.json"
_MEASURES = ("risk", "accuracy", "faithfulness")
_COSTS = ("forward", "backward", "seconds", "peak_mb", "settings", "all_forward", "all_backward")


@checked
def cell_file(folder: Path, task: str, method: str, seed: int) -> Path:
    """Where a finished cell lies."""
    return folder / "cells" / task / f"{_slug(method)}-{seed}.csv"


def _slug(method: str) -> str:
    return re.sub("[^a-z0-9]+", "_", method.lower())


def check_names(methods: Iterable[str]) -> None:
    """Refuse methods whose names make the name of one file.

    Raises:
        ValueError: two such methods.
    """
    taken: dict[str, str] = {}
    for name in methods:
        other = taken.setdefault(_slug(name), name)
        if other != name:
            raise ValueError(
                f"methods holds {other!r} and {name!r}, whose cells would both be {_slug(name)}-0.csv: give one of "
                "them a name with other letters or digits"
            )


def prepare(folder: Path, shared: Mapping[str, Any]) -> None:
    """Make the folder, and write down in it the settings that its cells have in common.

    Raises:
        ValueError: other settings than those of the cells that are there, or a file of settings that is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for place in (folder, *(folder / "cells").glob("*/")):
        sweep(place)
    _check_alike(folder / _SETTINGS, shared, "out has cells", folder)


def check_made_of(folder: Path, task: str, model: Any, units: Units) -> None:
    """Refuse a task's cells of another model or of other units; where none are there, write down what they are of.

    Raises:
        ValueError: such cells, cells of which that is not known, or a file that should say it and is damaged.
    """
    here = folder / "cells" / task
    older = any(here.glob("[!.]*.csv"))
    if older and not (here / _SETTINGS).is_file():
        raise ValueError(
            f"out has cells of {task} that do not say of which model and units they are, as those of older versions: "
            f"name another folder than {folder}"
        )
    tensors = {f"{i}.basis": site.basis for i, site in enumerate(units.sites) if site.basis is not None}
    tensors |= {f"{i}.at": site.positions for i, site in enumerate(units.sites) if isinstance(site.positions, Tensor)}
    header = {"names": units.names, "hooks": [site.hook for site in units.sites]}
    made_of = {"model": fingerprint(model), "units": f"{units!r} {digest('units', header, tensors)[:16]}"}
    here.mkdir(parents=True, exist_ok=True)
    _check_alike(here / _SETTINGS, made_of, f"out has cells of {task}", folder)


def _check_alike(file: Path, mine: Mapping[str, Any], has: str, folder: Path) -> None:
    """Write settings down, or refuse them where the file has others."""
    mine = json.loads(json.dumps(mine))
    if not file.is_file():
        write_text(file, json.dumps(mine, indent=1) + "\n")
        return
    with reading(file, "settings of a comparison", "Remove it with the cells beside it, or name another folder."):
        before = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError(f"it is a {type(before).__name__}, no object")
    for name in mine:
        if mine[name] != before.get(name):
            raise ValueError(
                f"{has} made with {name} = {before.get(name)}, and this comparison has {mine[name]}: "
                f"name another folder than {folder}"
            )


def refused(key: Mapping[str, Any], why: str) -> pd.DataFrame:
    """The cell of a method that refuses the units or the model: one row, which says why in place of its numbers."""
    names = ("size", "kept", *(name + end for name in _MEASURES for end in ("", "_low", "_high")))
    row = dict(key) | {"setting": f"refused: {why}", "ablation": key["own_ablation"]}
    return pd.DataFrame([row | dict.fromkeys(names, float("nan")) | dict.fromkeys(_COSTS, 0.0)])


def write(file: Path, key: Mapping[str, Any], frame: pd.DataFrame) -> pd.DataFrame:
    """Write a cell, complete or not at all; returns it as it will be read."""
    text = frame.to_csv(index=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, f"{_HEAD}{_digest(key, text)}\n{text}")
    return pd.read_csv(io.StringIO(text))


def read(file: Path, key: Mapping[str, Any]) -> pd.DataFrame | None:
    """The finished cell of a file; ``None`` where there is none, or one that is damaged or of something else.

    Raises:
        ValueError: the cell of another method with a name that makes the same file.
    """
    if not file.is_file():
        return None
    try:
        found = checked_cell(file)
    except ValueError:
        return None
    its = _key_of(found)
    if its == dict(key) | {"method": its["method"]} != dict(key):
        raise ValueError(
            f"{file} is the cell of method {its['method']!r}, and {key['method']!r} makes the same file: give one of "
            "them a name with other letters or digits, or name another folder"
        )
    return found if its == dict(key) else None


def checked_cell(file: Path) -> pd.DataFrame:
    """The cell of a file.

    Raises:
        ValueError: a file without a checksum, or with another one than its content.
    """
    mend = "run the comparison again with its task, method and seed, or remove the file"
    try:
        head, _, text = file.read_bytes().decode().partition("\n")
        frame = pd.read_csv(io.StringIO(text)) if head.startswith(_HEAD) else None
    except (ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"{file} is damaged ({error}): {mend}") from error
    if frame is None:
        raise ValueError(f"{file} is no cell with a checksum: {mend}")
    if frame.empty or head != f"{_HEAD}{_digest(_key_of(frame), text)}":
        raise ValueError(f"{file} is damaged, its checksum does not match its content: {mend}")
    return frame


def _digest(key: Mapping[str, Any], text: str) -> str:
    return hashlib.sha256(f"{json.dumps(dict(key), sort_keys=True)}\n{text}".encode()).hexdigest()


def _key_of(frame: pd.DataFrame) -> dict[str, Any]:
    first = frame.iloc[0].to_dict() if len(frame) else {}
    seed = first.get("seed", -1)
    return {
        "task": str(first.get("task")),
        "method": str(first.get("method")),
        "seed": int(seed) if isinstance(seed, int | float) and seed == seed else -1,
    }
