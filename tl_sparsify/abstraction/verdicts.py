"""Verdicts: whether a causal model's variable is accepted on the evidence, and which controls would be accepted too.

The rule reads the table of evidence by its columns ``role``, ``untrained`` and ``sources_apart``, never by names.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, cast

import numpy as np
import pandas as pd

Frame = Any
"""A ``pandas.DataFrame``, whose own annotations name every type that a cell may have."""
GOAL, GOAL_CHANGED = 0.95, 0.9
"""A variable is accepted at this interchange accuracy, and this one on the pairs whose answer should change: all that
the first allows may be wrong on the half that should change."""


class Role(StrEnum):
    """What a line of evidence is for.

    Attributes:
        ALIGNED: it decides on a variable (in an untrained model it is a control).
        CONTROL: it need not be good; where it is, the aligned units' accuracy shows nothing.
        CEILING: the whole residual stream at the alignment's positions, at the layer where that is best: everything
            there is interchanged, other variables with this one, so that it bounds the variable's accuracy only where
            it is the only one.
        UNALIGNED: every unit that no variable is aligned with; the answer should stay.
        CHECK: other interchanges under which the answer should stay.
    """

    ALIGNED = "aligned"
    CONTROL = "control"
    CEILING = "ceiling"
    UNALIGNED = "unaligned"
    CHECK = "check"


@dataclass(frozen=True)
class Verdict:
    """The judgement on one variable, or set of them, in one model.

    Attributes:
        model, variable: what is judged; `` (a source each)`` is added to a set whose variables have separate sources.
        accuracy, changed, lower: interchange accuracy, the same where the answer should change, and its lower bound.
        accepted: whether both accuracies reach :data:`GOAL` and :data:`GOAL_CHANGED`.
        control, control_accuracy, control_units: the best of its controls, with the units that it interchanges; empty
            and NaN where there is none.
        passing: the controls that would be accepted too.
        units, removed: units interchanged, and aligned units that this model no longer has.
        retained: the share of pairs that count.
    """

    model: str
    variable: str
    accuracy: float
    changed: float
    lower: float
    accepted: bool
    control: str
    control_accuracy: float
    control_units: float
    passing: tuple[str, ...]
    units: float
    removed: int
    retained: float


def accepted(accuracy: Any, changed: Any) -> bool:
    """The criterion; accuracies over no pairs are NaN: rejected, and no objection where no answer should change."""
    return bool(accuracy >= GOAL and (np.isnan(changed) or changed >= GOAL_CHANGED))


def judged(evidence: Frame) -> list[Verdict]:
    """A verdict for each model (but untrained ones) and aligned variable or set of them, in the table's order."""
    found: list[Verdict] = []
    if evidence.empty:
        return found
    aligned = evidence.role == Role.ALIGNED
    for row in evidence[aligned & ~evidence.untrained].itertuples():
        same = evidence.variable == row.variable
        controls = evidence[same & (evidence.model == row.model) & (evidence.role == Role.CONTROL)]
        untrained = evidence[same & aligned & evidence.untrained & (evidence.sources_apart == row.sources_apart)]
        both: Frame = pd.concat([controls, untrained.assign(intervention=untrained.model)])
        beside = cast(Frame, both.dropna(subset="accuracy"))
        best = beside.loc[beside.accuracy.idxmax()] if len(beside) else None
        found.append(
            Verdict(
                model=row.model,
                variable=row.variable + (" (a source each)" if row.sources_apart else ""),
                accuracy=row.accuracy,
                changed=row.accuracy_changed,
                lower=row.lower,
                accepted=accepted(row.accuracy, row.accuracy_changed),
                control="" if best is None else best.intervention,
                control_accuracy=float("nan") if best is None else float(best.accuracy),
                control_units=float("nan") if best is None else float(best.units),
                passing=tuple(c.intervention for c in beside.itertuples() if accepted(c.accuracy, c.accuracy_changed)),
                units=row.units,
                removed=row.removed,
                retained=row.retained,
            )
        )
    return found


def verdicts(evidence: Frame) -> Frame:
    """:func:`judged` as a table: a row each, the columns are :class:`Verdict`'s attributes."""
    rows = [vars(verdict) | {"passing": list(verdict.passing)} for verdict in judged(evidence)]
    return pd.DataFrame(rows, columns=[field.name for field in fields(Verdict)])
