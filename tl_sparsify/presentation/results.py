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

TABLE = "table.csv"

SETTINGS = "settings.json"


@dataclass(frozen=True, eq=False)
class RunResults:
    """What ``tl-sparsify run`` wrote in a folder.

    Attributes:
        about: the task, the settings and the versions (``run.json``).
        reduction: the circuit.
        scores, path, fold, baselines, evidence: the tables of these names.
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
        names = ("scores", "path", "fold", "baselines", "evidence")
        tables = {name: read_table(folder / f"{name}.csv") for name in names}
        try:
            about = json.loads((folder / "run.json").read_text())
        except ValueError as error:
            raise ValueError(f"{folder / 'run.json'} is damaged ({error}): run the task again") from error
        evaluation = read_table(folder / "evaluation.csv").iloc[0].to_dict()
        return RunResults(about, Reduction.load(folder / "circuit.reduction"), evaluation=evaluation, **tables)


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
