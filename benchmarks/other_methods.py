"""The methods that were added after ``side_by_side.py`` was run, beside three that it has: six tasks, one seed.

AtP*, attribution to second order, the backward passes of GIM and RelP, and the information bottleneck as a mask, as
``compare`` runs them: the setting that is best on validation examples is judged on test examples, with the constants
that the task calls for and without a refit; 256 examples to train on, and as many to validate. Joint risk, attribution
patching and the top-k mask are run anew, so that all see the same data and code. Finished cells lie in
``results/other_methods`` (not in the repository); an interrupted run goes on. Writes
``benchmarks/results/other_methods.csv`` and ``other_methods.md``.

    python benchmarks/other_methods.py [--task NAME ...]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from shared import LEAST, ROOT, by_task, geometric_mean, marked, parser

import tl_sparsify as tls
from tl_sparsify.comparison.methods import BENCH_TASKS, named
from tl_sparsify.comparison.tables import table_of

NEW = ("AtP*", "second order", "attribution, GIM", "attribution, RelP", "information-bottleneck mask")
BESIDE = ("joint risk", "attribution patching", "top-k mask")
SIZES = (0.2, 0.1, 0.05)
COLUMNS = ["task", "method", "setting", "ablation", "size", "kept", "risk", "accuracy", "cmd"]
COLUMNS += ["all_forward", "all_backward", "seconds"]


def rows(name: str) -> pd.DataFrame:
    """A row for each method and size, under the task's own ablation; a method that refuses the task has one."""
    task = tls.load_task(name)
    settings: dict[str, Any] = {"sizes": SIZES, "seeds": 1, "examples": 256, "refit_patience": 0, "bootstrap": 0}
    folder = ROOT / "results" / "other_methods"
    found = tls.compare(task.model(), task, named((*BESIDE, *NEW)), out=folder, progress=False, **settings)
    own: Any = found[found["ablation"] == task.ablation]
    return own.loc[own["size"].isin(SIZES) | own["size"].isna(), [name for name in COLUMNS if name in own]]


def markdown(frame: pd.DataFrame) -> str:
    """One row a task and size, one column a method: risk, the lowest of the row bold; at the end the geometric mean at
    each size (risks below 1e-6 count as that), and the passes of all settings."""
    methods = [*BESIDE, *NEW]
    found: list[dict[str, Any]] = [dict(row) for row in frame.to_dict("records")]
    lines: list[list[str]] = []
    total: dict[float, list[list[float]]] = {}
    for task, kind, size in dict.fromkeys((r["task"], r["ablation"], r["size"]) for r in found if r["size"] > 0):
        here = {row["method"]: row["risk"] for row in found if (row["task"], row["size"]) == (task, size)}
        risks = [here.get(method, float("nan")) for method in methods]
        total.setdefault(size, []).append(risks)
        lines.append([f"{task}, {kind}, {size:.0%}", *marked(risks)])
    for size, rows in total.items():
        means = [_mean(column) for column in zip(*rows, strict=True)]
        lines.append([f"geometric mean, {size:.0%}", *marked(means)])
    cost = {method: [row for row in found if row["method"] == method] for method in methods}
    spent = [[_average(rows, name) for name in ("all_forward", "all_backward")] for rows in cost.values()]
    lines.append(["passes, mean", *(f"{forward:,.0f} + {backward:,.0f}" for forward, backward in spent)])
    return table_of(["task, constants, kept", *methods], lines)


def _average(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / max(1, len(rows))


def _mean(risks: Sequence[float]) -> float:
    """NaN where the method refuses a task."""
    return float("nan") if any(map(math.isnan, risks)) else geometric_mean([max(risk, LEAST) for risk in risks])


def main() -> None:
    arguments = parser(__doc__, tasks=True).parse_args()
    tables = {"other_methods": {"other_methods": markdown}}
    wanted = arguments.task or list(BENCH_TASKS)
    print(markdown(by_task(tables, wanted, lambda name: {"other_methods": rows(name)})["other_methods"]))


if __name__ == "__main__":
    main()
