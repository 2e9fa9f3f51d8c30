"""Masks, beside a search and after it: what training from its order, weaving and exchanges bring.

Circuits of edges of small tasks that the benchmark of edges does not report, judged on validation examples: of a search
of 20 rounds; of a mask from nothing, in steps of 32 examples or in more and smaller ones, with each size's divergence
as it is, or relative to its own level; and of a search of one round for each size, none of them made again, that is
sharpened in all other passes, with exchanges and without. What was done before is kept, so that an interrupted run goes
on. Writes ``benchmarks/results/sharpening.csv`` and ``sharpening.md``.

    python benchmarks/sharpening.py [--seeds 2]
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pandas as pd
from shared import RESULTS, circuit_of, geometric_mean, marked, parser, search_passes, sharpened, trained_mask, write

import tl_sparsify as tls
from tl_sparsify.comparison.tables import table_of
from tl_sparsify.core.measure import circuit_risks

TASKS = ("hierarchical_equality", "balanced_brackets", "greatest_of_list", "planted_gate", "tracr_sort")
ABLATIONS = ("counterfactual", "mean")
SIZES = (0.5, 0.3, 0.2, 0.1, 0.05)
TRAIN, VALIDATION = 64, 256  # examples
PER_STEP = {"mask": 32, "sharpened": 16}  # examples
ROUNDS, PROBES, EXCHANGED = 20, 4, 2
LEAST = 1e-4  # nats; risks below it count as this
METHODS = (
    *("search", "mask", "mask, steps of 16", "mask, steps of 8", "mask, relative"),
    *("sharpened, no exchanges", "sharpened", "sharpened, steps of 8"),
)


def found_by(method: str, model: Any, train: tls.Examples, units: tls.Units, values: tls.Values, seed: int) -> Any:
    """Scores of a mask, or a path."""
    relative, kind = method.endswith("relative"), method.split(",")[0]
    size = int(method.split()[-1]) if "steps of" in method else PER_STEP.get(kind, TRAIN)
    given: dict[str, Any] = {"values": values, "seed": seed}
    searching: dict[str, Any] = given | {"probing": tls.Probing(PROBES)}
    if kind == "search":
        searching |= {"rounds": ROUNDS, "smallest": SIZES[-1], "progress": False}
        return tls.sparsify(model, train, units, **searching)
    given |= {"per_step": size, "relative": relative}
    budget = search_passes(ROUNDS, PROBES, TRAIN)
    if kind == "mask":
        return trained_mask(model, train, units, examples=budget, smallest=SIZES[-1], **given)
    exchanged = 0 if method.endswith("no exchanges") else EXCHANGED
    given |= searching | {"sizes": SIZES, "exchanges": 0, "exchanged": exchanged, "held_out": train}
    return sharpened(model, train, units, budget=budget, **given)


def rows(name: str, ablation: str, method: str, seed: int) -> list[dict[str, Any]]:
    """One for each size."""
    task = tls.load_task(name)
    model = task.model()
    train, validation, _ = task.examples(seed)
    train, validation = train.sample(TRAIN, seed=seed), validation.sample(VALIDATION, seed=seed)
    units = tls.edges(model)
    make = tls.constants.counterfactual if ablation == "counterfactual" else tls.constants.mean
    values = make(model, train, units)
    order = found_by(method, model, train, units, values, seed)
    circuits = [circuit_of(order, size) for size in SIZES]
    measured = circuit_risks(model, tls.constants.reduced(model, circuits[0], values), circuits, validation)
    same = {"task": name, "ablation": ablation, "seed": seed, "method": method}
    found: list[dict[str, Any]] = [
        same | {"size": size, "kept": len(circuit), "risk": risk.mean}
        for size, circuit, risk in zip(SIZES, circuits, measured, strict=True)
    ]
    print(f"{name}, {ablation}, seed {seed}: {method} " + ", ".join(f"{r['risk']:.3g}" for r in found), flush=True)
    return found


def markdown(frame: pd.DataFrame) -> str:
    """One row a task and ablation, one column a method: the geometric mean of the risk over sizes and seeds (risks
    below 1e-4 nats count as that); at the end that over the rows."""
    risks = frame.assign(risk=frame.risk.clip(lower=LEAST))
    lines: list[list[str]] = []
    kept: dict[str, list[float]] = {method: [] for method in METHODS}
    for (task, ablation), part in risks.groupby(["task", "ablation"], sort=False):
        for method, found in kept.items():
            found.append(geometric_mean(list(part[part.method == method].risk)))
        lines.append([f"{task}, {ablation}", *marked([found[-1] for found in kept.values()])])
    lines.append(["geometric mean", *marked([geometric_mean(found) for found in kept.values()])])
    return table_of(["task, ablation", *METHODS], lines)


def main() -> None:
    arguments = parser(__doc__, seeds=2).parse_args()
    file = RESULTS / "sharpening.csv"
    done = pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=["task", "ablation", "seed", "method"])
    for seed, name, ablation, method in product(range(arguments.seeds), TASKS, ABLATIONS, METHODS):
        same = (done.task == name) & (done.ablation == ablation) & (done.seed == seed) & (done.method == method)
        if not bool(same.any()):
            done = pd.concat([done, pd.DataFrame(rows(name, ablation, method, seed))], ignore_index=True)
            write("sharpening", done, {}, show=False)
    write("sharpening", done, {"sharpening": markdown})


if __name__ == "__main__":
    main()
