"""The table of stress tests: lines, each a claim with an interval, a control that can fail, and a verdict.

A verdict never follows from a number alone. ``holds`` and ``fails`` need an interval that lies on one side of what is
claimed *and* a control that behaved as it should; everything else is ``cannot tell``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import pandas as pd

from tl_sparsify._internal.files import write_text


class Stand(StrEnum):
    """Whether a claim stands.

    Attributes:
        HOLDS: the interval lies where the claim puts it, and the control does not.
        FAILS: it lies elsewhere, and the control shows that it need not.
        UNKNOWN: the interval reaches both sides, or the control failed: nothing follows.
    """

    HOLDS = "holds"
    FAILS = "fails"
    UNKNOWN = "cannot tell"


@dataclass(frozen=True)
class StressRow:
    """One line of a stress table.

    Attributes:
        row: which test (``worst case``, ...).
        case: which of its cases (``shared mask``, ``at most 25 % shared``, the name of another task, ...).
        claim: what would be true of a circuit that is the whole story.
        value: what was measured, in ``unit``.
        low, high: its interval over examples (over draws, where it is a mean of overlaps).
        control: the same of the control (its mean over draws).
        control_low, control_high: its interval, or the range of its draws.
        unit: ``nats``, ``overlap``, ``p``, ``groups``.
        stand: whether the claim holds.
        because: why, in words.
        n: examples that the line reports on.
        forward, backward: examples run, divided by ``n``: passes.
        p_value, control_p_value: of the tests; NaN where there is none.

    Example:
        >>> line = tls.stress(model, reduction, test, rows=("minimality",), draws=5, bootstrap=100)["minimality"][0]
        >>> line.case, line.unit, line.n
        ('one unit', 'nats', 32)
    """

    row: str
    case: str
    claim: str
    value: float
    low: float
    high: float
    control: float
    control_low: float
    control_high: float
    unit: str
    stand: Stand
    because: str
    n: int
    forward: float = math.nan
    backward: float = math.nan
    p_value: float = math.nan
    control_p_value: float = math.nan


@dataclass(frozen=True)
class Stress:
    """Stress tests of a reduction, as one table.

    Attributes:
        rows: its lines.
        left_out: the tests that were not made, each with the reason: data that were not given.
        details: what a test found beside its lines: of ``mechanisms`` the groups, their circuits and cross-risks.
        tolerance: nats; what counts as no difference.
        level: of the intervals.

    Example:
        >>> table = tls.stress(model, reduction, test, rows=("minimality",), draws=5, bootstrap=100)
        >>> table.save("stress.md")
        >>> table.frame()["case"].tolist()
        ['one unit', 'a pair']
    """

    rows: tuple[StressRow, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = math.nan
    level: float = 0.95

    def __getitem__(self, row: str) -> tuple[StressRow, ...]:
        """The lines of one test.

        Raises:
            KeyError: a test that was not made, with the reason where there is one.
        """
        found = tuple(line for line in self.rows if line.row == row)
        if not found:
            made = ", ".join(dict.fromkeys(line.row for line in self.rows))
            raise KeyError(f"no lines of {row!r} ({self.left_out.get(row, 'not asked for')}); there are {made}")
        return found

    def frame(self) -> pd.DataFrame:
        """One row a line; the columns are :class:`StressRow`'s attributes."""
        return pd.DataFrame([asdict(line) | {"stand": str(line.stand)} for line in self.rows])

    def markdown(self) -> str:
        """The table as Markdown, and below it what was left out and why."""
        heads = ("test", "case", "found", "control", "claim", "verdict", "passes")
        lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for line in self.rows:
            found = f"{_range(line.value, line.low, line.high)} {line.unit}"
            control = _range(line.control, line.control_low, line.control_high)
            if not math.isnan(line.p_value):
                found, control = f"{found}, p = {line.p_value:.2g}", f"{control}, p = {line.control_p_value:.2g}"
            cells = (line.row, line.case, found, control, line.claim, f"**{line.stand}**: {line.because}")
            lines.append("| " + " | ".join((*cells, f"{line.forward:.0f} + {line.backward:.0f}")) + " |")
        notes = [f"Not made: {row} ({reason})." for row, reason in self.left_out.items()]
        return "\n".join(lines) + "\n" + ("\n" + " ".join(notes) + "\n" if notes else "")

    def save(self, path: str | Path) -> None:
        """Write the lines as ``.csv``, ``.md`` or ``.json`` (which also says what was left out), by the file's ending.

        Raises:
            ValueError: another ending.
        """
        path = Path(path)
        if path.suffix == ".csv":
            text = self.frame().to_csv(index=False)
        elif path.suffix == ".md":
            text = self.markdown()
        elif path.suffix == ".json":
            lines = self.frame().astype(object).where(self.frame().notna(), None).to_dict("records")
            whole = {"rows": lines, "left_out": dict(self.left_out), "tolerance": self.tolerance, "level": self.level}
            text = json.dumps(whole, indent=1) + "\n"
        else:
            raise ValueError(f"path is {str(path)!r}; a stress table is saved as .csv, .md or .json")
        write_text(path, text)

    def __repr__(self) -> str:
        parts = [f"{line.row} ({line.case}) {line.stand}" for line in self.rows]
        out = f"; not made: {', '.join(self.left_out)}" if self.left_out else ""
        return f"Stress({', '.join(parts)}{out})"


def _range(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return "-"
    whole = f"{value:.3g}"
    return whole if math.isnan(low) else f"{whole} ({low:.3g} to {high:.3g})"
