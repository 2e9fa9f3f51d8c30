"""Every method side by side: eight tasks, all methods, three seeds. The tables of the README and of docs/benchmark.md.

The cells and the whole table lie in ``results/bench`` (not in the repository); an interrupted run goes on. Writes
``benchmarks/results/side_by_side.csv`` and ``side_by_side.md`` (the summary), ``docs/benchmark.md`` (a table for each
task) and two figures in ``docs``.

    python benchmarks/side_by_side.py [TASK ...] [--seeds 3] [--workers 2] [--out results/bench]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from shared import RESULTS, ROOT, nats, parser

from tl_sparsify import plot
from tl_sparsify._internal.files import write_text
from tl_sparsify.comparison.benchmark import compare_tasks
from tl_sparsify.comparison.methods import BENCH_FOLDER, BENCH_TASKS
from tl_sparsify.comparison.tables import markdown, table_of

SIZES = (0.1, 0.05)
MORE_TASKS = ("greatest_of_list", "tracr_hist")  # beside what `tl-sparsify bench` runs by default


def summary(table: pd.DataFrame) -> str:
    """A row for each task and measure: joint risk, the lowest of ours, the lowest of the others, random; means over the
    seeds."""
    rows: list[dict[str, Any]] = [dict(row) for row in table.to_dict("records")]
    lines: list[list[str]] = []
    for task in dict.fromkeys(row["task"] for row in rows):
        part = [row for row in rows if row["task"] == task]
        own = part[0]["own_ablation"]
        for kind in (own, "refitted"):
            for size in SIZES:
                here = [row for row in part if row["ablation"] == kind and row["size"] == size]
                if here:  # of few units two sizes can be the same circuit
                    lines.append([task, f"risk, {kind}, {size:.0%}", *_cells(here, "risk")])
        here = [row for row in part if row["ablation"] == own]
        lines.append([task, f"CMD, {own}", *_cells(here, "cmd")])
    return table_of(["task", "measure", "joint risk", "best of ours", "best of the others", "random"], lines)


def _cells(rows: list[dict[str, Any]], measure: str) -> list[str]:
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row[measure])
    means = {method: sum(values) / len(values) for method, values in found.items()}
    mine = {row["method"] for row in rows if row["ours"]}

    def least(names: list[str]) -> str:
        name = min(names, key=lambda one: means[one], default="")
        return f"{nats(means[name])} ({name})" if name else ""

    ours = [name for name in means if name in mine]
    others = [name for name in means if name not in ours and name != "random"]
    one, last = (nats(means[name]) if name in means else "" for name in ("joint risk", "random"))
    return [one, least(ours), least(others), last]


def page(table: pd.DataFrame, versions: dict[str, str]) -> str:
    """The page with a table for each task."""
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# Side by side",
        "",
        "Every method orders the same units on the same examples; the circuits that it keeps are judged alike, on test",
        "examples, with the constants that the task calls for and with the same refit. Cells are means over the seeds",
        "(of the data, and of everything random): risk in nats, accuracy in brackets; the best of a column is bold.",
        "CMD (lower is better) and CPR (higher is better) are areas over ten sizes. Passes, forward and backward, are",
        "those of all settings among which validation chose; the setting chosen most often is in brackets, with its",
        "seconds and memory. Made by `benchmarks/side_by_side.py` with " + made + ".",
        "",
    ]
    for task in dict.fromkeys(table["task"]):
        lines += [f"## {task}", "", markdown(table, task)]
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__, seeds=3)
    options.add_argument("tasks", nargs="*", default=[*BENCH_TASKS, *MORE_TASKS])
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--out", type=Path, default=ROOT / BENCH_FOLDER)
    arguments = options.parse_args()
    table = compare_tasks(arguments.tasks, seeds=arguments.seeds, workers=arguments.workers, out=arguments.out)
    judged = table[table["size"].isin([0.2, 0.1, 0.05, 0.03])]
    write_text(RESULTS / "side_by_side.csv", judged.to_csv(index=False, float_format="%.4g"))
    write_text(RESULTS / "side_by_side.md", summary(table))
    versions = json.loads((arguments.out / "settings.json").read_text())["versions"]
    write_text(ROOT / "docs" / "benchmark.md", page(table, versions))
    plot.save(
        plot.frontier(table, "risk", tasks=arguments.tasks[:2], ablation="refitted"), ROOT / "docs" / "methods.png"
    )
    print(summary(table))


if __name__ == "__main__":
    main()
