"""Verdicts: whether a causal model's variable is accepted on the evidence, and which controls would be accepted too."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pandas as pd

Frame = Any
"""A ``pandas.DataFrame``, whose own annotations name every type that a cell may have."""
GOAL, GOAL_CHANGED = 0.95, 0.9
"""A variable is accepted at this interchange accuracy, and this one on the pairs whose answer should change: all that
the first allows may be wrong on the half that should change."""

_CONTROLS = ("do nothing", "random units", "norm-matched random subspace", "arbitrary labels")


def verdicts(evidence: Frame) -> Frame:
    """One row for each model (but untrained ones) and aligned variable or set of them: its accuracies, whether it is
    accepted, the best control beside it, and which controls would be accepted too."""
    rows: list[dict[str, Any]] = []
    aligned = evidence[evidence.intervention.str.startswith("aligned units") & (evidence.model != "random weights")]
    for row in aligned.itertuples():
        same = evidence[evidence.variable == row.variable]
        controls = same[(same.model == row.model) & same.intervention.isin(_CONTROLS)]
        untrained = same[(same.model == "random weights") & (same.intervention == row.intervention)]
        both: Frame = pd.concat([controls, untrained.assign(intervention="random weights")])
        beside = cast(Frame, both.dropna(subset="accuracy"))
        best = beside.loc[beside.accuracy.idxmax()] if len(beside) else None
        rows.append(
            {
                "model": row.model,
                "variable": row.variable + (" (a source each)" if row.intervention.endswith("each") else ""),
                "accuracy": row.accuracy,
                "changed": row.accuracy_changed,
                "lower": row.lower,
                "accepted": accepted(row.accuracy, row.accuracy_changed),
                "control": "" if best is None else best.intervention,
                "control_accuracy": float("nan") if best is None else best.accuracy,
                "passing": [c.intervention for c in beside.itertuples() if accepted(c.accuracy, c.accuracy_changed)],
                "units": row.units,
                "removed": row.removed,
                "retained": row.retained,
            }
        )
    return pd.DataFrame(rows)


def accepted(accuracy: Any, changed: Any) -> bool:
    """The criterion; accuracies over no pairs are NaN: rejected, and no objection where no answer should change."""
    return bool(accuracy >= GOAL and (np.isnan(changed) or changed >= GOAL_CHANGED))
