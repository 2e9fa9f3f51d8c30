"""Printed: tables for a terminal, of what a run found."""

from __future__ import annotations

import pandas as pd
from rich.markup import escape
from rich.table import Table

from tl_sparsify.abstraction.evidence import RANDOM_UNITS, Evidence
from tl_sparsify.abstraction.verdicts import Role, judged
from tl_sparsify.presentation.sentences import told_apart

_SIZES = ("heads", "neurons", "parameters")


def table(title: str, frame: pd.DataFrame) -> Table:
    """A frame, with numbers to the right."""
    made = Table(title=escape(title), title_justify="left")
    for name in frame.columns:
        made.add_column(name.replace("_", " "), justify="left" if frame[name].dtype.kind in "OUT" else "right")
    for row in frame.itertuples(index=False):
        made.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else escape(f"{cell}") for cell in row))
    return made


def evidence(found: Evidence) -> tuple[Table, str]:
    """One line a variable and intervention, one column a model; and what does not fit into it."""
    models = list(dict.fromkeys(row.model for row in found.rows))
    made = Table(title="Evidence: interchange accuracy (where the answer should change)", title_justify="left")
    for name in ("variable", "told from the answer", "interchanged", *models):
        made.add_column(escape(name))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    told: dict[tuple[str, str], str] = {}  # in the first model: which pairs count differs from model to model
    for row in found.rows:
        cell = f"{row.accuracy:.3f} ({row.accuracy_changed:.3f})"
        cell += f", {row.units:g} units" if row.intervention == RANDOM_UNITS else ""
        lines.setdefault((row.variable, row.intervention), {})[row.model] = cell
        told.setdefault((row.variable, row.intervention), told_apart(row.tells_apart, row.is_answer))
    for names, cells in lines.items():
        made.add_row(escape(names[0]), told[names], escape(names[1]), *(cells.get(model, "") for model in models))
    notes: list[str] = []
    for model in models:
        aligned = [
            row for row in found.rows if row.model == model and row.role is Role.ALIGNED and not row.sources_apart
        ]
        kept = ", ".join(f"{row.variable} {row.units:.0f} of {row.units + row.removed:.0f}" for row in aligned)
        notes.append(f"{model}: {aligned[0].retained:.1%} of the pairs right on both inputs, aligned units: {kept}")
    notes += dict.fromkeys(verdict.reservation for verdict in judged(found.to_frame()) if verdict.reservation)
    return made, escape("\n".join(notes))


def before_and_after(sizes: pd.DataFrame) -> pd.DataFrame:
    """The sizes of :func:`tl_sparsify.folding.sizes.sizes_by_layer` as ``4 to 3``."""
    columns = {name: zip(sizes[name], sizes[f"{name}_kept"], strict=True) for name in _SIZES}
    return pd.DataFrame({"part": sizes.part} | {name: [f"{a:,} to {b:,}" for a, b in c] for name, c in columns.items()})
