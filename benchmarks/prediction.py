"""Does second-order risk predict what happens? On every shipped task, on held-out examples.

Along the path of a search: the predicted joint risk of each round's circuit, linearised before the round's removals,
against the measured one, on the test split. Of single units: the rank correlation of each score with the measured
effect of removing the unit alone (``score.exact``, KL), all on the same test examples, over all units and over neurons
and heads apart; the replacement is the mean over the training split everywhere but in the variances, which are about
their own. For each seed of the data split and the probes. Writes ``benchmarks/results/prediction.csv`` (the path)
and ``prediction_units.csv``, and a Markdown table of each.

    python benchmarks/prediction.py [--task NAME ...] [--seeds 3] [--examples 256]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import tl_sparsify as tls
from tl_sparsify._files import write_text
from tl_sparsify.scores import Scores

RESULTS = Path(__file__).parent / "results"
ALL = "heads and neurons"


def along_path(task: tls.Task, seed: int) -> pd.DataFrame:
    """One row a round."""
    model = task.model()
    train, _, test = task.examples(seed)
    units = tls.heads(model) + tls.neurons(model)
    path = tls.sparsify(model, train, units, held_out=test, refit_steps=0, seed=seed, progress=False)
    return path.to_frame().assign(task=task.name, seed=seed, round=range(1, len(path.rounds) + 1))


def of_units(task: tls.Task, seed: int, count: int) -> list[dict[str, Any]]:
    """One row for each score and kind of units."""
    model = task.model()
    train, _, test = task.examples(seed)
    test = test[:count]
    units = tls.heads(model) + tls.neurons(model)
    values = tls.constants.mean(model, train, units)
    scores = {
        "variance": tls.score.variance(model, test, units),
        "scaled variance": tls.score.scaled_variance(model, test, units),
        "gradient (absolute)": tls.score.gradient(model, test, units, values=values).absolute,
        "integrated (absolute)": tls.score.integrated(model, test, units, values=values).absolute,
        "risk": tls.score.risk(model, test, units, values=values, seed=seed),
        "risk, T = 3": tls.score.risk(model, test, units, values=values, temperature=3.0, seed=seed),
    }
    exact = tls.score.exact(model, test, units, values=values, progress=False)
    kinds = {ALL: units, "heads": tls.heads(model), "neurons": tls.neurons(model)}
    return [
        {
            "task": task.name,
            "seed": seed,
            "score": name,
            "units": kind,
            "rank_correlation": part(found, some).rank_correlation(part(exact, some)),
            "forward_passes": found.forward_passes,
            "backward_passes": found.backward_passes,
            "n": len(test),
        }
        for name, found in scores.items()
        for kind, some in kinds.items()
    ]


def part(scores: Scores, units: tls.Units) -> Scores:
    """The scores of some of the units."""
    index = torch.tensor([scores.units.index(name) for name in units.names])
    given = (scores.name, scores.measured_in, scores.forward_passes, scores.backward_passes)
    return Scores(units, scores.scores[index], scores.stderr[index], *given)


def path_table(frame: pd.DataFrame) -> str:
    """Predicted and measured joint risk: means over the seeds, and the range of their ratio."""
    lines = ["| task | units kept | predicted (nats) | measured (nats) | predicted / measured |", "|---" * 5 + "|"]
    for (task, _), rows in frame.groupby(["task", "round"], sort=False):
        ratio = rows.predicted / rows.measured
        cells = [str(task), f"{rows.kept.iloc[0]} ({rows.fraction.iloc[0]:.0%})"]
        cells += [f"{rows.predicted.mean():.2g}", f"{rows.measured.mean():.2g}"]
        cells += [f"{ratio.median():.2g} ({ratio.min():.2g} to {ratio.max():.2g})"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def units_table(frame: pd.DataFrame) -> str:
    """Rank correlations: the mean over the seeds and the range."""
    kinds = list(dict.fromkeys(frame.units))
    lines = ["| task | score | passes (forward + backward) | " + " | ".join(kinds) + " |"]
    lines.append("|---" * (len(kinds) + 3) + "|")
    for (task, name), rows in frame.groupby(["task", "score"], sort=False):
        cells = [str(task), str(name), f"{rows.forward_passes.iloc[0]} + {rows.backward_passes.iloc[0]}"]
        for kind in kinds:
            found = rows.rank_correlation[rows.units == kind]
            cells.append(f"{found.mean():.3f} ({found.min():.3f} to {found.max():.3f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", nargs="*", default=list(tls.list_tasks()))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=256)
    arguments = parser.parse_args()
    rounds: list[pd.DataFrame] = []
    units: list[dict[str, Any]] = []
    for name in arguments.task:
        for seed in range(arguments.seeds):
            task = tls.load_task(name)
            rounds.append(along_path(task, seed))
            units += of_units(task, seed, arguments.examples)
            print(f"{name}: seed {seed}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    for stem, frame, table in (
        ("prediction", pd.concat(rounds), path_table),
        ("prediction_units", pd.DataFrame(units), units_table),
    ):
        write_text(RESULTS / f"{stem}.csv", frame.to_csv(index=False))
        write_text(RESULTS / f"{stem}.md", table(frame))
        print(table(frame))


if __name__ == "__main__":
    main()
