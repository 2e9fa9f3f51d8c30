"""Which variant of the search: deviation pinned or forgotten, temperature, probes, refit inside or at the end.

On every shipped task, for each seed: each variant's circuits at 10 % and 5 % kept, refitted at the end alike, judged
on the test split. Tasks done before are kept, so that an interrupted run goes on. Writes
``benchmarks/results/variants.csv`` and ``variants.md``.

    python benchmarks/variants.py [--task NAME ...] [--seeds 3]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

import tl_sparsify as tls
from tl_sparsify._files import write_text

SIZES = (0.1, 0.05)
TOKENS = 10_240  # of training examples
RESULTS = Path(__file__).parent / "results"
DEFAULT = {"deviation": "pinned", "temperature": 3.0, "probes": 4, "refit_steps": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    f"{deviation}, T = {temperature:g}": {"deviation": deviation, "temperature": temperature}
    for deviation in ("pinned", "forgotten")
    for temperature in (1.0, 2.0, 3.0)
} | {
    "pinned, T = 3, refitted inside": {"refit_steps": 20},
    "forgotten, T = 3, refitted inside": {"deviation": "forgotten", "refit_steps": 20},
    "pinned, T = 3, 1 probe": {"probes": 1},
    "pinned, T = 3, 8 probes": {"probes": 8},
}


def rows(task: tls.Task, seed: int) -> list[dict[str, Any]]:
    """One row for each variant and size."""
    model = task.model()
    train, validation, test = task.examples(seed)
    train = train.sample(TOKENS // train.labels.shape[1], seed=seed)
    units = tls.heads(model) + tls.neurons(model)
    zero = tls.constants.zero(model, train, units) if task.ablation == "zero" else None
    exact = train.choices is not None and len(train.choices) == 2  # then one probe is exact, and more are not used
    found: list[dict[str, Any]] = []
    for name, changed in VARIANTS.items():
        if exact and "probes" in changed:
            continue
        settings = DEFAULT | changed
        path = tls.sparsify(
            model, train, units, smallest=0.03, values=zero, held_out=validation, seed=seed, progress=False, **settings
        )
        for size in SIZES:
            reduction = tls.constants.refit(model, path.at(size), train, validation, seed=seed, progress=False)
            outcome = tls.evaluate(model, reduction, test)
            row = {"task": task.name, "seed": seed, "variant": name, "size": size, "kept": len(reduction.circuit)}
            found.append(row | {"risk": outcome.risk.mean, "accuracy": outcome.accuracy})
        print(f"{task.name}, seed {seed}: {name} " + ", ".join(f"{r['risk']:.3g}" for r in found[-2:]), flush=True)
    return found


def markdown(frame: pd.DataFrame) -> str:
    """One row a variant, one column a task and size: mean risk over the seeds and its range."""
    columns = list(dict.fromkeys(zip(frame.task, frame["size"], strict=True)))
    lines = ["| search | " + " | ".join(f"{task}, {size:.0%}" for task, size in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for variant in VARIANTS:
        cells: list[str] = []
        for task, size in columns:
            part = frame[(frame.variant == variant) & (frame.task == task) & (frame["size"] == size)].risk
            cells.append(f"{part.mean():.2g} ({part.min():.2g} to {part.max():.2g})" if len(part) else "as 4 probes")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="*", default=None, help="again; all that are not done where not given")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    table = RESULTS / "variants.csv"
    done = pd.read_csv(table) if table.is_file() else pd.DataFrame({"task": []})
    wanted = arguments.task or [name for name in tls.list_tasks() if name not in set(done.task)]
    for name in wanted:
        new = [row for seed in range(arguments.seeds) for row in rows(tls.load_task(name), seed)]
        done = pd.concat([done[done.task != name], pd.DataFrame(new)], ignore_index=True)
        write_text(table, done.to_csv(index=False))
        write_text(RESULTS / "variants.md", markdown(done))
    print(markdown(done))


if __name__ == "__main__":
    main()
