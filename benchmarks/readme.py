"""Put the tables in ``benchmarks/results`` between their markers in README.md and the pages in ``docs``.

``headline``, the one table of README.md, is made here from ``side_by_side.csv``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from tl_sparsify._internal.files import write_text

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SHOWN = {"joint risk, refitted inside": "`sparsify`", "compensating": "`sparsify_affine`"}  # with their defaults
KEPT = 0.1


def headline(table: pd.DataFrame) -> str:
    """Refitted risk of each task at one size, means over the seeds: ours by their defaults, the lowest of the others
    with its name, random."""
    here = table[(table["ablation"] == "refitted") & (table["size"] == KEPT)]
    means = here.groupby(["task", "method"], sort=False)["risk"].mean().unstack()
    others = means.drop(columns=[*here.loc[here["ours"], "method"].unique(), "random"])
    lines = ["| task | " + " | ".join(SHOWN.values()) + " | best of the others | random |", "|---" * 5 + "|"]
    for task, row in means.iterrows():
        cells = [_number(row[method]) for method in SHOWN]
        best = str(others.loc[task].idxmin())
        cells += [f"{_number(row[best])} ({best})", _number(row["random"])]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return "< 1e-6" if 0 <= value < 1e-6 else f"{value:.2g}"


def main() -> None:
    write_text(RESULTS / "headline.md", headline(pd.read_csv(RESULTS / "side_by_side.csv")))

    def table(match: re.Match[str]) -> str:
        return match[1] + (RESULTS / f"{match[2]}.md").read_text() + match[3]

    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        write_text(page, TABLE.sub(table, page.read_text()))


if __name__ == "__main__":
    main()
