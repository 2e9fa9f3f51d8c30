"""Which variant of the search: deviation pinned or forgotten, temperature, probes, rounds, refit inside or at the end,
the expansion believed in full or as far as it predicts unseen samples.

On every shipped task, for each seed: each variant's circuits at 10 % and 5 % kept, refitted at the end alike, judged
on the test split. All but the ``cross-fitted`` ones believe the expansion in full and make no round again. What was
done before is kept, so that an interrupted run goes on. Writes ``benchmarks/results/variants.csv``, ``variants.md``
and, of the last one, ``variants_default.md``.

    python benchmarks/variants.py [--task NAME ...] [--variants NAME ...] [--seeds 3]
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pandas as pd
from shared import LEAST, RESULTS, geometric_mean, marked, parser, write

import tl_sparsify as tls
from tl_sparsify.comparison.tables import table_of
from tl_sparsify.expansion.selection import NO_SHRINKAGE

SIZES = (0.1, 0.05)
EXAMPLES = 256  # for training, and for validation
STEPS = 60  # of the refit at the end, on 128 examples each
BELIEVED: dict[str, Any] = {"shrinkage": NO_SHRINKAGE, "exchanges": 0}
CROSS_FITTED: dict[str, Any] = {"shrinkage": None, "exchanges": None}  # the defaults of sparsify
DEFAULT: dict[str, Any] = {"carry_deviation": True, "refitting": tls.Refitting(0)} | BELIEVED
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
SHOWN = tuple(VARIANTS)
FULL, FITTED = "pinned, T = 3, refitted inside", "cross-fitted, refitted inside"
VARIANTS |= {FITTED: CROSS_FITTED | {"refitting": tls.Refitting(20)}}


def rows(task: tls.Task, seed: int, variant: str) -> list[dict[str, Any]]:
    """One row for each size; none where the variant is another one for this task."""
    model = task.model()
    train, validation, test = task.examples(seed)
    train, validation = train.sample(EXAMPLES, seed=seed), validation.sample(EXAMPLES, seed=seed)
    units = tls.heads(model) + tls.neurons(model)
    zero = tls.constants.zero(model, train, units) if task.ablation == "zero" else None
    exact = train.choices is not None and len(train.choices) == 2  # then one probe is exact, and more are not used
    if exact and "probe" in variant:
        return []
    same: dict[str, Any] = {"held_out": validation, "predict": False, "seed": seed, "progress": False}
    path = tls.sparsify(model, train, units, smallest=0.03, values=zero, **same, **(DEFAULT | VARIANTS[variant]))
    found: list[dict[str, Any]] = []
    for size in SIZES:
        fit: dict[str, Any] = {"steps": STEPS, "per_step": 128, "seed": seed, "progress": False}
        reduction = tls.constants.refit(model, path.at(size), train, validation, **fit)
        outcome = tls.evaluate(model, reduction, test)
        row = {"task": task.name, "seed": seed, "variant": variant, "size": size, "kept": len(reduction.circuit)}
        found.append(row | {"risk": outcome.risk.mean, "accuracy": outcome.accuracy})
    print(f"{task.name}, seed {seed}: {variant} " + ", ".join(f"{r['risk']:.3g}" for r in found), flush=True)
    return found


def markdown(frame: pd.DataFrame) -> str:
    """One row a task and size, one column a variant: mean risk over the seeds, lowest bold; at the end the geometric
    mean over the rows (risks below 1e-6 count as that)."""
    rows: list[dict[str, Any]] = [dict(row) for row in frame.to_dict("records")]
    lines: list[list[str]] = []
    risks: dict[str, list[float]] = {variant: [] for variant in SHOWN}
    for task, size in dict.fromkeys((row["task"], row["size"]) for row in rows):
        here = [row for row in rows if (row["task"], row["size"]) == (task, size)]
        for variant in SHOWN:  # with two answers one probe is exact: more are the same search
            there = any(row["variant"] == variant for row in here)
            name = "pinned, T = 3" if "probe" in variant and not there else variant
            some = [row["risk"] for row in here if row["variant"] == name]
            risks[variant].append(max(sum(some) / len(some), LEAST) if some else float("nan"))
        cells = marked([found[-1] for found in risks.values()])
        lines.append([f"{task}, {size:.0%} ({here[0]['kept']:.0f})", *cells])
    means = [float("nan") if any(map(math.isnan, found)) else geometric_mean(found) for found in risks.values()]
    lines.append(["geometric mean", *marked(means)])
    return table_of(["task, kept", *SHOWN], lines)


def default_markdown(frame: pd.DataFrame) -> str:
    """The search that believes its expansion as far as it predicts beside the one that believes all of it, over the
    seeds that both have been run with."""
    known = {(r["task"], r["size"], r["seed"], r["variant"]): float(r["risk"]) for r in frame.to_dict("records")}
    seeds: dict[tuple[str, float], list[int]] = {}
    for task, size, seed, variant in known:
        if variant == FITTED and (task, size, seed, FULL) in known:
            seeds.setdefault((task, size), []).append(seed)
    lines: list[list[str]] = []
    risks: list[list[float]] = [[], []]
    for (task, size), some in seeds.items():
        pair = [sum(known[task, size, seed, name] for seed in some) / len(some) for name in (FULL, FITTED)]
        for found, risk in zip(risks, pair, strict=True):
            found.append(max(risk, LEAST))
        lines.append([f"{task}, {size:.0%}", str(len(some)), *marked(pair)])
    lines.append(["geometric mean", "", *marked([geometric_mean(found) for found in risks])])
    return table_of(["task, kept", "seeds", "believed in full", "cross-fitted, with exchanges: the default"], lines)


PAGES = {"variants": markdown, "variants_default": default_markdown}


def main() -> None:
    options = parser(__doc__, seeds=3, tasks=True)
    options.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    arguments = options.parse_args()
    file = RESULTS / "variants.csv"
    done = pd.read_csv(file) if file.is_file() else pd.DataFrame({"task": [], "seed": [], "variant": []})
    names = arguments.task or list(dict.fromkeys(done.task)) or tls.list_tasks()
    for seed, name, variant in product(range(arguments.seeds), names, arguments.variants):
        if bool(((done.task == name) & (done.seed == seed) & (done.variant == variant)).any()):
            continue
        new = rows(tls.load_task(name), seed, variant)
        if new:
            done = pd.concat([done, pd.DataFrame(new)], ignore_index=True)
            write("variants", done, PAGES, show=False)
    write("variants", done, PAGES)


if __name__ == "__main__":
    main()
