"""The methods that were added after ``side_by_side.py`` was run, beside three that it has: six tasks, one seed.

AtP*, attribution to second order, the backward passes of GIM and RelP, and the information bottleneck as a mask, as
``compare`` runs them: the setting that is best on validation examples is judged on test examples, with the constants
that the task calls for and without a refit. Joint risk, attribution patching and the top-k mask are run anew, so that
all see the same data and code. Finished cells lie in ``results/other_methods`` (not in the repository); an interrupted
run goes on. Writes ``benchmarks/results/other_methods.csv`` and ``other_methods.md``.

    python benchmarks/other_methods.py [--task NAME ...]
"""

from __future__ import annotations

import math
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
    settings: dict[str, Any] = {"sizes": SIZES, "seeds": 1, "refit_patience": 0, "bootstrap": 0}
    folder = ROOT / "results" / "other_methods"
    found = tls.compare(task.model(), task, named((*BESIDE, *NEW)), out=folder, progress=False, **settings)
    own = found[found["ablation"] == task.ablation]
    return own.loc[own["size"].isin(SIZES) | own["size"].isna(), [name for name in COLUMNS if name in own]]


def markdown(frame: pd.DataFrame) -> str:
    """One row a task and size, one column a method: risk, the lowest of the row bold; at the end the geometric mean at
    each size (risks below 1e-6 count as that), and the passes of all settings."""
    methods = [*BESIDE, *NEW]
    lines: list[list[str]] = []
    total: dict[float, dict[str, list[float]]] = {}
    for (task, size), part in frame[frame["size"].notna()].groupby(["task", "size"], sort=False):
        risk = {str(row["method"]): float(row["risk"]) for row in part.to_dict("records")}
        for method in methods:
            total.setdefault(float(str(size)), {}).setdefault(method, []).append(risk.get(method, float("nan")))
        about = f"{task}, {part['ablation'].iloc[0]}, {float(str(size)):.0%}"
        lines.append([about, *marked([risk.get(method, float("nan")) for method in methods])])
    for size, found in total.items():
        means = [_mean(found[method]) for method in methods]
        lines.append([f"geometric mean, {size:.0%}", *marked(means)])
    cost = frame.groupby("method")[["all_forward", "all_backward"]].mean()
    spent = (f"{cost.all_forward.get(m, 0):,.0f} + {cost.all_backward.get(m, 0):,.0f}" for m in methods)
    lines.append(["passes, mean", *spent])
    return table_of(["task, constants, kept", *methods], lines)


def _mean(risks: list[float]) -> float:
    """Of the tasks that the method does not refuse."""
    known = [max(risk, LEAST) for risk in risks if not math.isnan(risk)]
    return geometric_mean(known) if len(known) == len(risks) else float("nan")


def main() -> None:
    arguments = parser(__doc__, tasks=True).parse_args()
    tables = {"other_methods": {"other_methods": markdown}}
    wanted = arguments.task or list(BENCH_TASKS)
    print(markdown(by_task(tables, wanted, lambda name: {"other_methods": rows(name)})["other_methods"]))


if __name__ == "__main__":
    main()
