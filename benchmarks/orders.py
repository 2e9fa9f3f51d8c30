"""Which order of removing units, and which constants: the tables of the README.

For each seed (of the data split, the probes and the random order) every method orders the units of the task's model
on the training split; the circuits that it keeps are judged on the test split, with mean constants (or affine maps,
where the method has them) and with the same refit (train, early-stopped on validation). Writes
``benchmarks/results/orders.csv`` and two Markdown tables.

    python benchmarks/orders.py [--task hierarchical_equality] [--seeds 3]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
from shared import parser, write

import tl_sparsify as tls
from tl_sparsify.comparison.tables import table_of
from tl_sparsify.core.reduction import Reduction

SIZES = (0.2, 0.1, 0.05, 0.03)
ROUNDS = (0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03)  # of the compensating search


def orders(model: Any, train: Any, validation: Any, units: Any, seed: int) -> dict[str, Callable[[float], Reduction]]:
    """For each method the reduction with mean constants that it gives for a fraction of units."""
    values = tls.constants.mean(model, train, units)

    def by(scores: tls.Scores) -> Callable[[float], Reduction]:
        return lambda fraction: tls.constants.reduced(model, scores.top(fraction), values)

    settings: dict[str, Any] = {"held_out": validation, "seed": seed, "progress": False}
    path = tls.sparsify(model, train, units, refitting=tls.Refitting(0), **settings)
    inside = tls.sparsify(model, train, units, **settings)
    affine = tls.sparsify_affine(model, train, units, sizes=ROUNDS, held_out=validation, seed=seed, progress=False)
    fitted = {size: step.reduction for size, step in zip(ROUNDS, affine.rounds, strict=True)}
    return {
        "random": by(tls.baselines.random(model, train, units, seed=seed)),
        "activation variance": by(tls.score.variance(model, train, units)),
        "single-unit risk, one shot": by(tls.score.risk(model, train, units, temperature=3.0, seed=seed)),
        "joint risk, 20 rounds": path.at,
        "joint risk, 20 rounds, refitted inside": inside.at,
        "joint risk, 20 rounds, affine in kept neurons": lambda size: tls.constants.neighbours(
            model, path.at(size), train, nearest=None
        ),
        "compensating, 8 rounds, affine in kept neurons": fitted.__getitem__,
    }


def measured(model: Any, reduction: Reduction, test: Any) -> dict[str, float]:
    found = tls.evaluate(model, reduction, test)
    return {"risk": found.risk.mean, "accuracy": found.accuracy}


def rows(task: tls.Task, seed: int) -> list[dict[str, Any]]:
    model = task.model()
    train, validation, test = task.examples(seed)
    units = tls.heads(model) + tls.neurons(model)
    found: list[dict[str, Any]] = []
    for name, at in orders(model, train, validation, units, seed).items():
        for size in SIZES:
            reduction = at(size)
            refitted = tls.constants.refit(model, reduction, train, validation, seed=seed, progress=False)
            key = {"task": task.name, "method": name, "seed": seed, "size": size, "kept": len(reduction.circuit)}
            if "inside" not in name:
                found.append(key | {"constants": "mean"} | measured(model, reduction, test))
            found.append(key | {"constants": "refitted"} | measured(model, refitted, test))
        print(f"seed {seed}: {name}", flush=True)
    return found


def markdown(frame: pd.DataFrame, constants: str) -> str:
    """One row a method: mean risk over the seeds, its range, and mean accuracy in brackets."""
    chosen = frame[frame.constants == constants]
    lines: list[list[str]] = []
    for method in dict.fromkeys(chosen.method):
        cells: list[str] = []
        for size in SIZES:
            part = chosen[(chosen.method == method) & (chosen["size"] == size)]
            spread = f"{part.risk.min():.2g} to {part.risk.max():.2g}"
            cells.append(f"{part.risk.mean():.2g} ({spread}), {part.accuracy.mean():.3f}")
        lines.append([method, *cells])
    return table_of([f"order, {constants} replacements", *(f"{size:.0%} kept" for size in SIZES)], lines)


def main() -> None:
    options = parser(__doc__, seeds=3)
    options.add_argument("--task", default="hierarchical_equality")
    arguments = options.parse_args()
    task = tls.load_task(arguments.task)
    frame = pd.DataFrame([row for seed in range(arguments.seeds) for row in rows(task, seed)])
    pages = {f"orders_{constants}": partial(markdown, constants=constants) for constants in ("mean", "refitted")}
    write("orders", frame, pages)


if __name__ == "__main__":
    main()
