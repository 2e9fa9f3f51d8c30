"""Results: the files that a run and a benchmark left in a folder, read back and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tl_sparsify._internal.files import reading
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.presentation.sealed import check_inside, check_seal

Frame = Any
"""A ``pandas.DataFrame``, whose own annotations name every type that a cell may have."""

RUN_FILES = (
    "run.json",
    "scores.csv",
    "path.csv",
    "circuit.reduction",
    "evaluation.csv",
    "fold.csv",
    "baselines.csv",
    "evidence.csv",
    "risk.png",
    "causal.png",
)

OPTIONAL = ("fold.csv", "baselines.csv", "evidence.csv")
"""Those of them that a run leaves out on request, or where units do not fold (``left_out`` in ``run.json``)."""

SEARCH = "search"
"""The folder of a search that is not complete."""

RUN_ENTRIES = (*RUN_FILES, "map.png", "folded", "report.html")
"""All that a run writes, and the report that is made of it."""

TABLE = "table.csv"

SETTINGS = "settings.json"

_PNG = b"\x89PNG\r\n\x1a\n"


_AGAIN = "run the task again"

_ESTIMATE = "predicted predicted_stderr measured measured_stderr"
_COLUMNS = {  # what is text, and what is a number or empty
    "scores": ("unit kind", "layer index score stderr"),
    "path": ("", f"kept fraction {_ESTIMATE}"),
    "fold": ("part", "parameters parameters_kept"),
    "baselines": ("method replacements", "kept risk risk_stderr accuracy"),
    "evidence": (
        "model intervention variable role",
        "accuracy stderr lower upper accuracy_changed risk margin_bound pairs retained units removed",
    ),
    "evaluation": (
        "",
        "risk risk_stderr accuracy original_accuracy agreement faithfulness completeness interchange_risk "
        "interchange_risk_stderr interchange_agreement probability",
    ),
}
_SETTINGS: dict[str, Any] = {
    "task": str,
    "description": str,
    "ablation": str,
    "chance": float,
    "seed": int,
    "examples": {"test": int},
    "score": {"name": str, "measured_in": str},
}


@dataclass(frozen=True, eq=False)
class RunResults:
    """What ``tl-sparsify run`` wrote in a folder.

    Attributes:
        about: the task, the settings and the versions (``run.json``).
        reduction: the circuit.
        scores, path, fold, baselines, evidence: the tables of these names; ``None`` for one that was left out.
        evaluation: the one row of ``evaluation.csv``.
    """

    about: Mapping[str, Any]
    reduction: Reduction
    scores: Frame
    path: Frame
    fold: Frame
    baselines: Frame
    evidence: Frame
    evaluation: Mapping[str, Any]

    @staticmethod
    def load(folder: Path) -> RunResults:
        """Read the files of a complete run; a damaged one, or one that leads out of the folder, is a ``ValueError``
        that names it."""
        for name in RUN_FILES:
            check_inside(folder, name)
        about = _about(folder)
        check_seal(folder / RUN_FILES[0], about)
        for name in ("risk.png", "causal.png"):
            if (folder / name).read_bytes()[:8] != _PNG:
                raise ValueError(f"{folder / name} is no picture: {_AGAIN}")
        names = ("scores", "path", "fold", "baselines", "evidence")
        out = {name for name in OPTIONAL if name in about.get("left_out", ())}
        tables: dict[str, Frame] = {
            name: None if f"{name}.csv" in out else read_table(folder / f"{name}.csv") for name in names
        }
        evaluation = read_table(folder / "evaluation.csv")
        for name, table in (tables | {"evaluation": evaluation}).items():
            if table is not None:
                _check_columns(folder / f"{name}.csv", table, *_COLUMNS[name])
        if tables["fold"] is not None and "whole model" not in set(tables["fold"]["part"]):
            raise ValueError(f"{folder / 'fold.csv'} has no row for the whole model: {_AGAIN}")
        evaluation = evaluation.iloc[0].to_dict()
        return RunResults(about, Reduction.load(folder / "circuit.reduction"), evaluation=evaluation, **tables)


def missing(folder: Path) -> list[str]:
    """The files of a run that should be in a folder and are not."""
    gone = [name for name in RUN_FILES if not (folder / name).is_file()]
    if RUN_FILES[0] in gone or not set(gone) & set(OPTIONAL):
        return gone
    out = _about(folder).get("left_out", ())
    return [name for name in gone if name not in out]


def _about(folder: Path) -> dict[str, Any]:
    path = folder / RUN_FILES[0]
    with reading(path, "description of a run", f"{_AGAIN.capitalize()}."):
        about = json.loads(path.read_text(encoding="utf-8"))
        wanted = dict(_SETTINGS)
        if "baselines.csv" not in about.get("left_out", ()):
            wanted["baseline_refit"] = {"patience": int, "most": int}
        _check_settings(about, wanted, "")
    return about


def _check_settings(found: Any, wanted: Mapping[str, Any], within: str) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{within or 'it'} is a {type(found).__name__}, no object")
    for name, kind in wanted.items():
        value, full = found.get(name), f"{within}{name}"
        if isinstance(kind, dict):
            _check_settings(value, kind, f"{full}.")
        elif isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"{full} is {value!r}")


def _check_columns(path: Path, table: Frame, texts: str, numbers: str) -> None:
    gone = [name for name in (*texts.split(), *numbers.split()) if name not in table]
    if gone:
        raise ValueError(f"{path} has no column {', '.join(gone)}: {_AGAIN}")
    for name in numbers.split():
        if table[name].dtype.kind not in "iuf":
            raise ValueError(f"{path} has something else than numbers in column {name}: {_AGAIN}")
    for name in texts.split():
        if not all(isinstance(cell, str) for cell in table[name]):
            raise ValueError(f"{path} has something else than text in column {name}: {_AGAIN}")


def read_table(path: Path) -> Frame:
    """A table with at least one row.

    Raises:
        ValueError: no table, or an empty one.
    """
    check_inside(path.parent, path.name)
    try:
        frame = pd.read_csv(path, keep_default_na=False, na_values=[""])  # a variable may be named null
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no table ({error}): make it again") from error
    if frame.empty:
        raise ValueError(f"{path} has no rows: make it again")
    return frame
