"""Do four tasks of one model have four circuits? Overlaps of the circuits of ``multi_task``.

For each of the four tasks and each seed (of the data and of the search) ``sparsify`` keeps 20 % and 10 % of the units
by the task's own examples. Removed units are at their means over the examples of that task (so that a unit which only
says which task it is costs nothing) or of all four. Overlap is the Jaccard index: shared units by units in either.
Beside it stand two random overlaps, of circuits with as many units, and of circuits with as many units of each kind in
each layer; and the overlap of one task's circuits for different seeds. Writes ``benchmarks/results/overlap.csv``
(every pair of circuits) and ``overlap.md``.

    python benchmarks/overlap.py [--seeds 3]
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from shared import parser, write

import tl_sparsify as tls
from tasks.multi_task.task import TASKS, subset
from tl_sparsify.comparison.tables import table_of

SIZES = (0.2, 0.1)
ROUNDS = (0.8, 0.65, 0.5, 0.4, 0.32, 0.26, 0.2, 0.16, 0.13, 0.1)
MEANS = ("own", "all four")
DRAWS = 200


@dataclass(frozen=True)
class TaskCircuit:
    """The circuit of a task."""

    means: str
    size: float
    task: str
    seed: int
    circuit: tls.Circuit
    risk: float
    accuracy: float


def circuits(model: Any, units: tls.Units, seed: int) -> list[TaskCircuit]:
    """The circuits of the four tasks for a seed, with either kind of means."""
    everything, _, _ = tls.load_task("multi_task").examples(seed)
    found: list[TaskCircuit] = []
    for means, name in itertools.product(MEANS, TASKS):
        train, validation, test = subset(name, seed)
        values = tls.constants.mean(model, train if means == "own" else everything, units)
        path = tls.sparsify(
            model, train, units, sizes=ROUNDS, values=values, held_out=validation, seed=seed, progress=False
        )
        for size in SIZES:
            reduction = path.at(size)
            judged = tls.evaluate(model, reduction, test)
            found.append(TaskCircuit(means, size, name, seed, reduction.circuit, judged.risk.mean, judged.accuracy))
        print(f"seed {seed}: {name}, means of {means}: {found[-1].risk:.3g} nats", flush=True)
    return found


def jaccard(one: tls.Circuit, two: tls.Circuit) -> float:
    """Shared units by units in either."""
    return len(one & two) / len(one | two)


def by_chance(one: tls.Circuit, two: tls.Circuit, seed: int, alike: bool) -> float:
    """The mean overlap of random circuits of these sizes, ``alike``: in each layer and of each kind."""
    rng = np.random.default_rng([seed, 83])
    slices = one.units.slices if alike else (slice(0, len(one.units)),)

    def drawn(circuit: tls.Circuit) -> tls.Circuit:
        mask = torch.zeros(len(circuit.units), dtype=torch.bool)
        for part in slices:
            count = int(circuit.mask[part].sum())
            mask[part.start + rng.choice(part.stop - part.start, count, replace=False)] = True
        return tls.Circuit(circuit.units, mask)

    return float(np.mean([jaccard(drawn(one), drawn(two)) for _ in range(DRAWS)]))


def rows(found: list[TaskCircuit]) -> list[dict[str, Any]]:
    """One row for each pair of circuits of a size and kind of means: of two tasks and one seed, or of one task and two
    seeds; and for each circuit with itself, which says how good it is."""
    table: list[dict[str, Any]] = []
    for one, two in itertools.combinations_with_replacement(found, 2):
        if (one.means, one.size) != (two.means, two.size) or (one.task != two.task and one.seed != two.seed):
            continue
        same = one is two
        table.append(
            {
                "means": one.means,
                "size": one.size,
                "task": one.task,
                "other": two.task,
                "seed": one.seed,
                "other_seed": two.seed,
                "kept": len(one.circuit),
                "overlap": jaccard(one.circuit, two.circuit),
                "random": float("nan") if same else by_chance(one.circuit, two.circuit, one.seed, alike=False),
                "random_alike": float("nan") if same else by_chance(one.circuit, two.circuit, one.seed, alike=True),
                "risk": one.risk if same else float("nan"),
                "accuracy": one.accuracy if same else float("nan"),
            }
        )
    return table


def cell(part: pd.DataFrame) -> str:
    """Mean and range over the seeds, and the overlap of circuits drawn alike in brackets."""
    mean, low, high = part.overlap.mean(), part.overlap.min(), part.overlap.max()
    return f"{mean:.2f}, {low:.2f} to {high:.2f} ({part.random_alike.mean():.2f})"


def markdown(frame: pd.DataFrame) -> str:
    """One row for each pair of tasks: the overlaps at each size and with each kind of means."""
    columns = list(itertools.product(MEANS, SIZES))
    heads = [f"{size:.0%} kept, means of {'the task' if means == 'own' else means}" for means, size in columns]
    lines: list[list[str]] = []
    parts = {column: frame[(frame.means == column[0]) & (frame["size"] == column[1])] for column in columns}
    for one, two in itertools.combinations(TASKS, 2):
        cells = [cell(part[(part.task == one) & (part.other == two)]) for part in parts.values()]
        lines.append([f"{one}, {two}", *cells])
    for name in TASKS:
        own = [part[(part.task == name) & (part.other == name)] for part in parts.values()]
        cells = [cell(part[part.seed != part.other_seed]) for part in own]
        lines.append([f"{name}, other seeds", *cells])
    random = [part[part.seed == part.other_seed].random.mean() for part in parts.values()]
    lines.append(["random circuits of that size", *(f"{value:.2f}" for value in random)])
    for name in TASKS:
        own = [part[(part.task == name) & part.risk.notna()] for part in parts.values()]
        cells = [f"{part.risk.mean():.2g} nats, {part.accuracy.mean():.3f}" for part in own]
        lines.append([f"risk and accuracy: {name}", *cells])
    return table_of(["circuits of", *heads], lines)


def main() -> None:
    arguments = parser(__doc__, seeds=3).parse_args()
    model = tls.load_task("multi_task").model()
    units = tls.heads(model) + tls.neurons(model)
    found = [circuit for seed in range(arguments.seeds) for circuit in circuits(model, units, seed)]
    write("overlap", pd.DataFrame(rows(found)), {"overlap": markdown})


if __name__ == "__main__":
    main()
