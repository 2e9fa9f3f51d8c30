"""Does it help that removed neurons become affine in kept ones? On every shipped task, at 10 % kept.

For each seed: circuits of three searches, with the task's own constants and with the removed neurons affine in their 8
nearest or in all kept neurons of their layer; ``joint risk`` and ``compensating`` also after the same refit. The joint
search takes units whose errors, with constants, undo each other; the other two do not. Tasks without removed neurons
beside kept ones have no maps. Risk in nats on the test split. Tasks done before are kept, so that an interrupted run
goes on. Writes ``benchmarks/results/neighbours.csv`` and ``neighbours.md``.

    python benchmarks/neighbours.py [--task NAME ...] [--seeds 3]
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from shared import LEAST, by_task, geometric_mean, marked, parser

import tl_sparsify as tls
from tl_sparsify.comparison.tables import table_of

SIZE = 0.1
ROUNDS = (0.5, 0.3, 0.2, 0.15, SIZE)  # of the compensating search
EXAMPLES = 512  # for training, and for validation
STEPS = 60  # of the refit, on 128 examples each


def rows(task: tls.Task, seed: int) -> list[dict[str, Any]]:
    """One row for each search and replacement."""
    model = task.model()
    train, validation, test = task.examples(seed)
    train, validation = train.sample(EXAMPLES, seed=seed), validation.sample(EXAMPLES, seed=seed)
    units = tls.heads(model) + tls.neurons(model)
    values = getattr(tls.constants, task.ablation)(model, train, units)
    same: dict[str, Any] = {"seed": seed, "progress": False}
    joint = tls.sparsify(
        model, train, units, smallest=SIZE, values=values, refitting=tls.Refitting(0), predict=False, **same
    )
    affine = tls.sparsify_affine(model, train, units, sizes=ROUNDS, **same)
    single = tls.score.risk(model, train, units, values=values, temperature=3.0, seed=seed)
    circuits = {
        "joint risk": joint.at(SIZE).circuit,
        "single-unit risk": single.top(SIZE),
        "compensating": affine.rounds[-1].reduction.circuit,
    }
    found: list[dict[str, Any]] = []
    for search, circuit in circuits.items():
        plain = tls.constants.reduced(model, circuit, values)
        kinds = {
            "constants": plain,
            "affine in 8": tls.constants.neighbours(model, plain, train),
            "affine in all": tls.constants.neighbours(model, plain, train, nearest=None),
        }
        if search != "single-unit risk":
            fit: dict[str, Any] = {"steps": STEPS, "per_step": 128, **same}
            for name in ("constants", "affine in all"):
                kinds[f"{name}, refitted"] = tls.constants.refit(model, kinds[name], train, validation, **fit)
        key = {"task": task.name, "seed": seed, "kept": len(circuit), "circuit of": search}
        for name, reduction in kinds.items():
            outcome = {"replacement": name, "affine": reduction.mixing is not None}
            found.append(key | outcome | {"risk": tls.risk(model, reduction, test).mean})
    return found


def markdown(frame: pd.DataFrame) -> str:
    """One row a task and search, one column a replacement: mean risk over the seeds, the lowest of the row bold. At the
    end each search's geometric mean over the tasks (risks below 1e-6 count as that)."""
    names = list(dict.fromkeys(frame.replacement))
    lines: list[list[str]] = []
    risks: dict[str, dict[str, list[float]]] = {}
    for (task, search), part in frame.groupby(["task", "circuit of"], sort=False):
        means = {str(name): max(float(risk), LEAST) for name, risk in part.groupby("replacement").risk.mean().items()}
        for name, risk in means.items():
            risks.setdefault(str(search), {}).setdefault(name, []).append(risk)
        mapped = "" if part.affine.any() else ", no maps"
        cells = marked([means.get(name, float("nan")) for name in names])
        lines.append([f"{task}, {int(part.kept.iloc[0])}{mapped}", str(search), *cells])
    for search, found in risks.items():
        total = {name: geometric_mean(some) for name, some in found.items()}
        lines.append(["geometric mean", search, *marked([total.get(name, float("nan")) for name in names])])
    return table_of(["task, kept", "circuit of", *names], lines)


def main() -> None:
    arguments = parser(__doc__, seeds=3, tasks=True).parse_args()

    def made(name: str) -> dict[str, pd.DataFrame]:
        task = tls.load_task(name)
        return {"neighbours": pd.DataFrame([row for seed in range(arguments.seeds) for row in rows(task, seed)])}

    print(markdown(by_task({"neighbours": {"neighbours": markdown}}, arguments.task, made)["neighbours"]))


if __name__ == "__main__":
    main()
