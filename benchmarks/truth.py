"""Do scores find the units that are known to be true? On every shipped task whose circuit is known.

A score's area under the ROC curve and average precision for the true units, by kind of truth (``weights``: units whose
weights do work; ``removal``: units whose removal matters under the named ablation) and over seeds of the data and the
probes. ``joint risk`` is the order in which ``sparsify`` removes units. Writes ``benchmarks/results/truth.csv`` and
``truth.md``.

    python benchmarks/truth.py [--task NAME ...] [--seeds 3]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from shared import parser, write

import tl_sparsify as tls
from tl_sparsify.comparison.evaluate import auroc, average_precision
from tl_sparsify.comparison.tables import table_of


def scores(task: tls.Task, seed: int) -> tuple[tls.Units, dict[str, torch.Tensor]]:
    """Every method's score of every unit, with the task's own kind of ablation."""
    model = task.model()
    train, _, _ = task.examples(seed)
    units = tls.heads(model) + tls.neurons(model)
    values = getattr(tls.constants, task.ablation)(model, train, units)
    given: dict[str, Any] = {"values": values, "seed": seed}
    path = tls.sparsify(model, train, units, values=values, seed=seed, progress=False)
    methods: dict[str, Callable[[], torch.Tensor]] = {
        "variance": lambda: tls.score.variance(model, train, units).scores,
        "scaled variance": lambda: tls.score.scaled_variance(model, train, units).scores,
        "gradient (absolute)": lambda: tls.score.gradient(model, train, units, **given).absolute.scores,
        "integrated (absolute)": lambda: tls.score.integrated(model, train, units, **given).absolute.scores,
        "exact removal, one by one": lambda: tls.score.exact(model, train, units, **given, progress=False).scores,
        "risk": lambda: tls.score.risk(model, train, units, **given).scores,
        "risk, T = 3": lambda: tls.score.risk(model, train, units, temperature=3.0, **given).scores,
        "joint risk": lambda: path.scores,
    }
    return units, {name: method() for name, method in methods.items()}


def rows(task: tls.Task, seed: int) -> list[dict[str, Any]]:
    units, found = scores(task, seed)
    truths = {kind: tls.Circuit.of(units, list(names)) for kind, names in task.truth.items()}
    return [
        {
            "task": task.name,
            "ablation": task.ablation,
            "truth": kind,
            "units": len(units),
            "true": len(truth),
            "seed": seed,
            "score": name,
            "auroc": auroc(score, truth),
            "average_precision": average_precision(score, truth),
        }
        for kind, truth in truths.items()
        for name, score in found.items()
    ]


def markdown(frame: pd.DataFrame) -> str:
    """One row a task and kind of truth, one column a score: AUROC / average precision, means over the seeds."""
    names = list(dict.fromkeys(frame.score))
    lines: list[list[str]] = []
    for (task, ablation, truth, units, true), part in frame.groupby(
        ["task", "ablation", "truth", "units", "true"], sort=False
    ):
        means = part.groupby("score")[["auroc", "average_precision"]].mean()
        cells = [f"{means.auroc[name]:.3f} / {means.average_precision[name]:.3f}" for name in names]
        if true == units:
            cells = ["-"] * len(names)  # nothing to tell apart
        lines.append([f"{task} ({ablation})", f"{truth}: {true} of {units}", *cells])
    return table_of(["task (ablation)", "truth: units", *names], lines)


def main() -> None:
    arguments = parser(__doc__, seeds=3, tasks=True).parse_args()
    known = [name for name in tls.list_tasks() if tls.load_task(name).truth]
    found: list[dict[str, Any]] = []
    for name in arguments.task or known:
        found += [row for seed in range(arguments.seeds) for row in rows(tls.load_task(name), seed)]
        print(name, flush=True)
    write("truth", pd.DataFrame(found), {"truth": markdown})


if __name__ == "__main__":
    main()
