"""Which variant of the search: deviation pinned or forgotten, temperature, probes, rounds, refit inside or at the end.

On every shipped task, for each seed: each variant's circuits at 10 % and 5 % kept, refitted at the end alike, judged
on the test split. Tasks done before are kept, so that an interrupted run goes on. Writes
``benchmarks/results/variants.csv`` and ``variants.md``.

    python benchmarks/variants.py [--task NAME ...] [--seeds 3]
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from shared import LEAST, by_task, geometric_mean, marked, parser

import tl_sparsify as tls
from tl_sparsify.comparison.tables import table_of

SIZES = (0.1, 0.05)
EXAMPLES = 256  # for training, and for validation
STEPS = 60  # of the refit at the end, on 128 examples each
DEFAULT = {"carry_deviation": True, "refitting": tls.Refitting(0)}
VARIANTS: dict[str, dict[str, Any]] = {
    f"{deviation}, T = {temperature:g}": {
        "carry_deviation": deviation == "pinned",
        "probing": tls.Probing(temperature=temperature),
    }
    for deviation in ("pinned", "forgotten")
    for temperature in (1.0, 2.0, 3.0)
} | {
    "pinned, T = 3, refitted inside": {"refitting": tls.Refitting(20)},
    "forgotten, T = 3, refitted inside": {"carry_deviation": False, "refitting": tls.Refitting(20)},
    "pinned, T = 3, 1 probe": {"probing": tls.Probing(1)},
    "pinned, T = 3, 8 probes": {"probing": tls.Probing(8)},
    "pinned, T = 3, 60 rounds": {"rounds": 60},
}


def rows(task: tls.Task, seed: int) -> list[dict[str, Any]]:
    """One row for each variant and size."""
    model = task.model()
    train, validation, test = task.examples(seed)
    train, validation = train.sample(EXAMPLES, seed=seed), validation.sample(EXAMPLES, seed=seed)
    units = tls.heads(model) + tls.neurons(model)
    zero = tls.constants.zero(model, train, units) if task.ablation == "zero" else None
    exact = train.choices is not None and len(train.choices) == 2  # then one probe is exact, and more are not used
    found: list[dict[str, Any]] = []
    for name, changed in VARIANTS.items():
        if exact and "probe" in name:
            continue
        settings = DEFAULT | changed
        same: dict[str, Any] = {"held_out": validation, "predict": False, "seed": seed, "progress": False}
        path = tls.sparsify(model, train, units, smallest=0.03, values=zero, **same, **settings)
        for size in SIZES:
            fit: dict[str, Any] = {"steps": STEPS, "per_step": 128, "seed": seed, "progress": False}
            reduction = tls.constants.refit(model, path.at(size), train, validation, **fit)
            outcome = tls.evaluate(model, reduction, test)
            row = {"task": task.name, "seed": seed, "variant": name, "size": size, "kept": len(reduction.circuit)}
            found.append(row | {"risk": outcome.risk.mean, "accuracy": outcome.accuracy})
        print(f"{task.name}, seed {seed}: {name} " + ", ".join(f"{r['risk']:.3g}" for r in found[-2:]), flush=True)
    return found


def markdown(frame: pd.DataFrame) -> str:
    """One row a task and size, one column a variant: mean risk over the seeds, lowest bold; at the end the geometric
    mean over the rows (risks below 1e-6 count as that)."""
    rows: list[dict[str, Any]] = [dict(row) for row in frame.to_dict("records")]
    lines: list[list[str]] = []
    risks: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for task, size in dict.fromkeys((row["task"], row["size"]) for row in rows):
        here = [row for row in rows if (row["task"], row["size"]) == (task, size)]
        for variant in VARIANTS:  # with two answers one probe is exact: more are the same search
            name = variant if any(row["variant"] == variant for row in here) else "pinned, T = 3"
            some = [row["risk"] for row in here if row["variant"] == name]
            risks[variant].append(max(sum(some) / len(some), LEAST))
        cells = marked([found[-1] for found in risks.values()])
        lines.append([f"{task}, {size:.0%} ({here[0]['kept']:.0f})", *cells])
    lines.append(["geometric mean", *marked([geometric_mean(found) for found in risks.values()])])
    return table_of(["task, kept", *VARIANTS], lines)


def main() -> None:
    arguments = parser(__doc__, seeds=3, tasks=True).parse_args()

    def made(name: str) -> dict[str, pd.DataFrame]:
        task = tls.load_task(name)
        return {"variants": pd.DataFrame([row for seed in range(arguments.seeds) for row in rows(task, seed)])}

    print(markdown(by_task({"variants": {"variants": markdown}}, arguments.task, made)["variants"]))


if __name__ == "__main__":
    main()
