"""Cells of a comparison as files: a table whose first line has a checksum of the rest and of what the cell is of."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tl_sparsify._internal.files import write_text

_HEAD = "# sha256 "
_MEASURES = ("risk", "accuracy", "faithfulness")
_COSTS = ("forward", "backward", "seconds", "peak_mb", "settings", "all_forward", "all_backward")


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
    """The finished cell of a file; ``None`` where there is none, or one that is damaged or of something else."""
    if not file.is_file():
        return None
    try:
        found = checked_cell(file)
    except ValueError:
        return None
    return found if _key_of(found) == dict(key) else None


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
