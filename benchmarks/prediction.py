"""Does second-order risk predict what happens? On every shipped task, on held-out examples.

Along the path of a search: the predicted joint risk of each round's circuit, linearised before the round's removals,
against the measured one, on the test split. Of single units: the rank correlation of each score with the measured
effect of removing the unit alone (``score.exact``, KL), all on the same test examples, over all units and over neurons
and heads apart; the replacement is what the task calls for (the mean over training examples, or zero) everywhere but in
the variances, which are about their own. For each seed of the data split and the probes. Tasks done before are kept, so
that an interrupted run goes on. Writes ``benchmarks/results/prediction.csv`` (the path) and ``prediction_units.csv``,
and a Markdown table of each.

    python benchmarks/prediction.py [--task NAME ...] [--seeds 3] [--examples 256]
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from shared import LEAST, by_task, marked, parser

import tl_sparsify as tls
from tl_sparsify.comparison.tables import table_of
from tl_sparsify.search.scores import Scores

ALL = "heads and neurons"
SIZES = (0.5, 0.2, 0.1, 0.05)  # of the path's table: the nearest rounds


def setting(task: tls.Task, seed: int, count: int) -> tuple[Any, tls.Examples, tls.Examples, tls.Units, tls.Values]:
    """Model, training and test examples, units, and what removed units are set to."""
    model = task.model()
    train, _, test = task.examples(seed)
    train, test = train.sample(count, seed=seed), test.sample(count, seed=seed)
    units = tls.heads(model) + tls.neurons(model)
    return model, train, test, units, getattr(tls.constants, task.ablation)(model, train, units)


def along_path(task: tls.Task, seed: int, count: int) -> pd.DataFrame:
    """One row a round."""
    model, train, test, units, values = setting(task, seed, count)
    path = tls.sparsify(
        model,
        train,
        units,
        held_out=test,
        values=values,
        smallest=0.03,
        refitting=tls.Refitting(0),
        seed=seed,
        progress=False,
    )
    return path.to_frame().assign(task=task.name, seed=seed, round=range(1, len(path.rounds) + 1))


def of_units(task: tls.Task, seed: int, count: int) -> list[dict[str, Any]]:
    """One row for each score and kind of units."""
    model, _, test, units, values = setting(task, seed, count)
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
    """One row a task, one column a size: predicted and measured joint risk, means over the seeds, and in brackets the
    median of their ratio."""
    lines: list[list[str]] = []
    for task, rounds in frame.groupby("task", sort=False):
        cells = [str(task)]
        for size in SIZES:
            rows = rounds[rounds["round"] == rounds.loc[(rounds.fraction - size).abs().idxmin(), "round"]]
            if rows.measured.mean() < LEAST and rows.predicted.mean() < LEAST:
                cells.append("both < 1e-6")
                continue
            ratio = (rows.predicted / rows.measured).median()
            cells.append(f"{rows.predicted.mean():.2g} / {rows.measured.mean():.2g} ({ratio:.2g})")
        lines.append(cells)
    return table_of(["task", *(f"{size:.0%}" for size in SIZES)], lines)


def units_table(frame: pd.DataFrame) -> str:
    """One row a task, one column a score: rank correlations over heads and neurons, the mean over the seeds; the best
    bold. At the end the mean over the tasks, of all units and of each kind."""
    scores = list(dict.fromkeys(frame.score))

    def line(title: str, rows: pd.DataFrame) -> list[str]:
        means = [float(rows.rank_correlation[rows.score == name].mean()) for name in scores]
        return [title, *marked(means, "{:.3f}".format, max)]

    tasks = frame[frame.units == ALL].groupby("task", sort=False)
    lines = [line(str(task), rows) for task, rows in tasks]
    kinds = dict.fromkeys(frame.units)
    lines += [line(f"mean over tasks: {kind}", frame[frame.units == kind]) for kind in kinds]
    return table_of(["task", *scores], lines)


def main() -> None:
    options = parser(__doc__, seeds=3, tasks=True)
    options.add_argument("--examples", type=int, default=256)
    arguments = options.parse_args()
    tables = {"prediction": {"prediction": path_table}, "prediction_units": {"prediction_units": units_table}}

    def made(name: str) -> dict[str, pd.DataFrame]:
        task, seeds, count = tls.load_task(name), range(arguments.seeds), arguments.examples
        return {
            "prediction": pd.concat([along_path(task, seed, count) for seed in seeds], ignore_index=True),
            "prediction_units": pd.DataFrame([row for seed in seeds for row in of_units(task, seed, count)]),
        }

    done = by_task(tables, arguments.task, made)
    print(f"{path_table(done['prediction'])}{units_table(done['prediction_units'])}")


if __name__ == "__main__":
    main()
