"""What the README shows of the demo: ``make demo`` writes ``results/hierarchical_equality``, this script turns it into
the tables ``fold`` and ``evidence`` in ``benchmarks/results`` and the figures in ``docs``.

    python benchmarks/demo.py [--folder results/hierarchical_equality]
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
from shared import RESULTS, ROOT, parser

from tl_sparsify._internal.files import write_text
from tl_sparsify.comparison.tables import table_of


def fold(frame: pd.DataFrame) -> str:
    """Heads, neurons and parameters of each layer, before and after."""
    lines: list[list[str]] = []
    for row in frame.to_dict("records"):
        cells = [f"{row[name]:,} → {row[f'{name}_kept']:,}" for name in ("heads", "neurons", "parameters")]
        lines.append([row["part"], *cells])
    return table_of(["part", "heads", "neurons", "parameters"], lines)


def evidence(frame: pd.DataFrame) -> str:
    """A line for each variable and intervention, a column for each model."""
    models = list(dict.fromkeys(frame.model))
    retained = {model: frame[frame.model == model].retained.iloc[0] for model in models}
    heads = [f"{model} ({retained[model]:.1%} retained)" for model in models]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in frame.to_dict("records"):
        found = f"{row['accuracy']:.3f}"
        if pd.notna(row["accuracy_changed"]):
            found += f" ({row['accuracy_changed']:.3f})"
        if row["removed"]:
            found += f", {row['units']:.0f} of {row['units'] + row['removed']:.0f} units left"
        cells.setdefault((row["variable"], row["intervention"]), {})[row["model"]] = found
    lines = [[*names, *(found.get(model, "") for model in models)] for names, found in cells.items()]
    return table_of(["variable", "interchanged", *heads], lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, default=ROOT / "results" / "hierarchical_equality")
    folder = options.parse_args().folder
    for name, table in (("fold", fold), ("evidence", evidence)):
        text = table(pd.read_csv(folder / f"{name}.csv"))
        write_text(RESULTS / f"{name}.md", text)
        print(text)
    for name in ("risk", "map"):
        shutil.copy(folder / f"{name}.png", ROOT / "docs" / f"{name}.png")


if __name__ == "__main__":
    main()
