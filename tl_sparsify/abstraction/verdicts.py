"""Verdicts: whether a causal model's variable is accepted on the evidence, and which controls would be accepted too.

The rule reads the table of evidence by its columns ``role``, ``untrained`` and ``sources_apart``, never by names.

Units that do not carry the variable but the network's *answer* for the source are right on every pair that does not
tell the two apart. Where few pairs do, a high accuracy is no evidence for the variable: the verdict is then "cannot
tell". (A low accuracy still rejects it: such units carry neither.) A variable that is the output, or fixes it alone,
differs from the answer on no pair at all; it is judged as always, and the verdict says what it is.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Literal, cast

import numpy as np
import pandas as pd

Frame = Any
"""A ``pandas.DataFrame``, whose own annotations name every type that a cell may have."""
GOAL, GOAL_CHANGED = 0.95, 0.9
"""A variable is accepted at this interchange accuracy, and this one on the pairs whose answer should change: all that
the first allows may be wrong on the half that should change."""
TOLD_APART = 0.1
"""At least this share of the pairs must tell a variable from the answer. Units that carry the answer are wrong on just
these: at this share they are wrong twice as often as :data:`GOAL` allows, and so never near it."""


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
        accepted: whether both accuracies reach :data:`GOAL` and :data:`GOAL_CHANGED` on pairs of which at least
            :data:`TOLD_APART` tell the variable from the answer, where it is not the answer itself, and of which some
            should change.
        control, control_accuracy, control_units: the best of its controls, with the units that it interchanges; empty
            and NaN where there is none.
        passing: the controls that would be accepted too.
        units, removed: units interchanged, and aligned units that this model no longer has.
        retained: the share of pairs that count.
        tells_apart, is_answer: the share of these that tell the variable from the answer, and whether none can, because
            the variable is the output or fixes it alone.
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
    tells_apart: float = float("nan")
    is_answer: bool = False

    @property
    def verdict(self) -> Literal["accepted", "rejected", "cannot tell"]:
        """The judgement in a word or two."""
        if self.accepted:
            return "accepted"
        return "cannot tell" if accepted(self.accuracy, self.changed) else "rejected"

    @property
    def reservation(self) -> str:
        """What must be said beside the verdict, with the mend: that no answer should change, that the pairs cannot
        tell the variable from the answer, or that the variable is the answer. Empty where there is nothing to say."""
        if self.verdict == "cannot tell" and np.isnan(self.changed) and not self.tells_apart < TOLD_APART:
            return (
                f"{self.variable} changes the expected answer of no pair that counts: units that carry nothing are "
                "right on all of them. Give pairs in which it does."
            )
        if self.is_answer:
            said = f"{self.variable} is the answer or fixes it alone, so that no pair can tell the two apart"
            return f"{said}: accepted means that the answer passes there, and no more." if self.accepted else f"{said}."
        if self.verdict != "cannot tell":
            return ""
        return (
            f"{self.tells_apart:.1%} of the pairs tell {self.variable} from the answer, fewer than {TOLD_APART:.0%}: "
            "units that carry the source's answer would be right on all others. Give pairs whose source has another "
            f"answer than the one expected with its {self.variable} in the base (sources of other words, say)."
        )


def accepted(accuracy: Any, changed: Any) -> bool:
    """The criterion; accuracies over no pairs are NaN: rejected, and no objection where no answer should change (of
    controls; of a variable that changes none nothing can be told)."""
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
        # tables that older versions wrote do not say what their pairs tell apart, and are judged as they were
        apart, is_answer = float(getattr(row, "tells_apart", "nan")), bool(getattr(row, "is_answer", False))
        alike, changes_none = apart < TOLD_APART and not is_answer, getattr(row, "changes", float("nan")) == 0
        found.append(
            Verdict(
                model=row.model,
                variable=row.variable + (" (a source each)" if row.sources_apart else ""),
                accuracy=row.accuracy,
                changed=row.accuracy_changed,
                lower=row.lower,
                accepted=accepted(row.accuracy, row.accuracy_changed) and not (alike or changes_none),
                control="" if best is None else best.intervention,
                control_accuracy=float("nan") if best is None else float(best.accuracy),
                control_units=float("nan") if best is None else float(best.units),
                passing=tuple(c.intervention for c in beside.itertuples() if accepted(c.accuracy, c.accuracy_changed)),
                units=row.units,
                removed=row.removed,
                retained=row.retained,
                tells_apart=apart,
                is_answer=is_answer,
            )
        )
    return found


def verdicts(evidence: Frame) -> Frame:
    """:func:`judged` as a table: a row each, the columns are :class:`Verdict`'s attributes."""
    added = ("verdict", "reservation")
    rows = [
        vars(verdict) | {"passing": list(verdict.passing)} | {name: getattr(verdict, name) for name in added}
        for verdict in judged(evidence)
    ]
    return pd.DataFrame(rows, columns=[*(field.name for field in fields(Verdict)), *added])
