"""Results: the files that a run and a benchmark left in a folder, read back and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tl_sparsify.core.reduction import Reduction

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

OPTIONAL = ("baselines.csv", "evidence.csv")
"""Those of them that a run leaves out on request (``left_out`` in ``run.json``)."""

RUN_ENTRIES = (*RUN_FILES, "map.png", "folded", "report.html")
"""All that a run writes, and the report that is made of it."""

TABLE = "table.csv"

SETTINGS = "settings.json"


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
        """Read the files of a complete run; a damaged one is a ``ValueError`` that names it."""
        about = _about(folder)
        names = ("scores", "path", "fold", "baselines", "evidence")
        tables = {
            name: None if f"{name}.csv" in about.get("left_out", ()) else read_table(folder / f"{name}.csv")
            for name in names
        }
        evaluation = read_table(folder / "evaluation.csv").iloc[0].to_dict()
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
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): run the task again") from error


def read_table(path: Path) -> Frame:
    """A table with at least one row.

    Raises:
        ValueError: no table, or an empty one.
    """
    try:
        frame = pd.read_csv(path)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no table ({error}): make it again") from error
    if frame.empty:
        raise ValueError(f"{path} has no rows: make it again")
    return frame
