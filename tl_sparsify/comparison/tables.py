"""Tables: a comparison as Markdown, for READMEs and reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

_LEAST = 1e-6  # nats: lower risks are told apart by rounding only
_AREAS = {"cmd": 1, "cpr": -1, "auroc": -1}  # 1: lower is better


def table_of(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    Raises:
        ValueError: a row that has not as many cells as there are heads.
    """
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        if len(row) != len(heads):
            raise ValueError(f"a row has {len(row)} cells, and the table {len(heads)} columns: {', '.join(row)}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def markdown(table: pd.DataFrame, task: str) -> str:
    """One task of a table of :func:`tl_sparsify.compare`: a line for each method, means over seeds, a column's best
    bold.

    Risk in nats (accuracy) at each size with the constants that the task calls for, with the same refit, with the same
    affine maps, and (for searches that fit replacements) as found: the sizes are those of the refit, without one all
    that were measured. CMD and CPR with the constants that the task calls for; AUROC where the true units are known;
    the setting chosen most often; passes (forward + backward) of all settings tried; seconds and memory (MiB) of the
    chosen one.

    Raises:
        ValueError: a task that the table does not have.
    """
    rows: list[dict[str, Any]] = [dict(row) for row in table.to_dict("records") if row["task"] == task]
    if not rows:
        raise ValueError(f"task is {task!r}; the table has {', '.join(sorted(set(table['task'])))}")
    own = rows[0]["own_ablation"]
    columns: dict[str, dict[str, tuple[float, str]]] = {}
    sizes = _sizes(rows, own)
    for kind in (own, "refitted", "maps", "as found"):
        for size in sizes:
            here = [row for row in rows if row["ablation"] == kind and row["size"] == size]
            risk, accuracy = _means(here, "risk"), _means(here, "accuracy")
            columns[f"{kind}, {100 * size:g}%"] = {
                m: (max(risk[m], _LEAST), f"{_nats(risk[m])} ({accuracy[m]:.3f})") for m in risk
            }
    for name, sign in _AREAS.items():
        found = _means([row for row in rows if row["ablation"] == own], name)
        columns[name.upper()] = {m: (sign * round(value, 3), f"{value:.3f}") for m, value in found.items()}
    columns = {title: cells for title, cells in columns.items() if cells}
    best = {title: min(value for value, _ in cells.values()) for title, cells in columns.items()}
    cost = {name: _means(rows, name) for name in ("all_forward", "all_backward", "seconds", "peak_mb")}
    lines: list[list[str]] = []
    for method in dict.fromkeys(row["method"] for row in rows):
        setting = Counter(row["setting"] for row in rows if row["method"] == method).most_common(1)[0][0]
        cells = [_text(cells.get(method), best[title]) for title, cells in columns.items()]
        cells.append(f"{cost['all_forward'][method]:,.0f} + {cost['all_backward'][method]:,.0f}")
        cells.append(f"{cost['seconds'][method]:.1f}")
        cells.append(f"{max(0.0, cost['peak_mb'][method]):.0f}" if method in cost["peak_mb"] else "")
        name = method if setting == "default" else f"{method} ({setting})"
        lines.append([name, *cells])
    return table_of(["method (setting)", *columns, "passes", "seconds", "MB"], lines)


def _sizes(rows: list[dict[str, Any]], own: str) -> list[float]:
    """The sizes that circuits were refitted at; without a refit all those that were measured, but for the whole."""
    refitted = {row["size"] for row in rows if row["ablation"] == "refitted"}
    measured = {row["size"] for row in rows if row["ablation"] in (own, "as found") and row["size"] < 1}
    return sorted(refitted or measured, reverse=True)


def _means(rows: list[dict[str, Any]], column: str) -> dict[str, float]:
    """The mean of a column by method, without those that have none."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row[column])
    means = {method: sum(values) / len(values) for method, values in found.items()}
    return {method: mean for method, mean in means.items() if not math.isnan(mean)}


def _nats(risk: float) -> str:
    return f"{risk:.2g}" if risk >= _LEAST else f"< {_LEAST:g}"


def _text(cell: tuple[float, str] | None, best: float) -> str:
    if cell is None:
        return ""
    return f"**{cell[1]}**" if cell[0] == best else cell[1]
