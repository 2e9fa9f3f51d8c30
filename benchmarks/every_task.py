"""Every shipped task in one table: accuracy and chance, risk along the path, and which causal models hold.

For each task a search of ten rounds on 256 training examples, without refits inside; its circuits at 20, 10, 5 and 3 %
kept, refitted, judged on the test split. The verdicts on causal models are those of ``algorithms.csv``
(``python benchmarks/algorithms.py``). Tasks done before are kept. Writes ``benchmarks/results/tasks.csv`` and
``tasks.md``.

    python benchmarks/every_task.py [--task NAME ...]
"""

from __future__ import annotations

import time
from typing import Any

import pandas as pd
from algorithms import verdicts
from shared import RESULTS, by_task, nats, parser

import tl_sparsify as tls
from tl_sparsify._internal.files import write_text
from tl_sparsify.comparison.tables import table_of
from tl_sparsify.tasks.overview import overview

SIZES = (0.2, 0.1, 0.05, 0.03)
EXAMPLES = 256  # for training, and for validation
STEPS, BATCH = 40, 64  # of the refit
ROUNDS = 10


def row(name: str) -> dict[str, Any]:
    """What there is to say of a task."""
    started = time.perf_counter()
    task = tls.load_task(name)
    model = task.model()
    train, validation, test = task.examples(0)
    seconds = time.perf_counter() - started
    examples, about = len(train) + len(validation) + len(test), overview(task)
    train, validation = train.sample(EXAMPLES), validation.sample(EXAMPLES)
    units = tls.heads(model) + tls.neurons(model)
    values = tls.constants.zero(model, train, units) if task.ablation == "zero" else None
    same: dict[str, Any] = {"rounds": ROUNDS, "predict": False, "progress": False}
    path = tls.sparsify(model, train, units, smallest=0.03, values=values, **same)
    found: dict[str, Any] = {
        "task": task.name,
        "units": about.units,
        "kinds": about.kinds,
        "chance": about.chance,
        "accuracy": about.accuracy,
        "truth": " ".join(about.truth),
        "examples": examples,
        "load_seconds": seconds,
    }
    for size in SIZES:
        plain = path.at(size)
        fit: dict[str, Any] = {"steps": STEPS, "per_step": BATCH, "progress": False}
        outcome = tls.evaluate(model, tls.constants.refit(model, plain, train, validation, **fit), test)
        found |= {f"kept_{size:g}": len(plain.circuit), f"risk_{size:g}": outcome.risk.mean}
        found |= {f"accuracy_{size:g}": outcome.accuracy}
    return found


def markdown(frame: pd.DataFrame, verdict: dict[str, str]) -> str:
    """One row a task."""
    first, *others = (f"{size:.0%}" for size in SIZES)
    heads = ["task", "units", "chance", "accuracy", "task, model and examples loaded in"]
    lines: list[list[str]] = []
    rows: list[dict[str, Any]] = [dict(row) for row in frame.sort_values("task").to_dict("records")]
    for one in rows:
        cells = [one["task"], f"{one['kinds']}", f"{one['chance']:.3f}", f"{one['accuracy']:.3f}"]
        cells.append(f"{one['load_seconds']:.1f} s, {int(one['examples']):,}")
        for size in SIZES:
            risk, right = one[f"risk_{size:g}"], one[f"accuracy_{size:g}"]
            cells.append(f"{nats(risk)} ({right:.3f})")
        lines.append([*cells, verdict.get(one["task"], "")])
    return table_of([*heads, f"risk (accuracy), refitted: {first}", *others, "causal models"], lines)


def main() -> None:
    arguments = parser(__doc__, tasks=True).parse_args()

    def made(name: str) -> dict[str, pd.DataFrame]:
        new = pd.DataFrame([row(name)])
        print(new.T.to_string(), flush=True)
        return {"tasks": new}

    done = by_task({"tasks": {}}, arguments.task, made, keep_default_na=False)["tasks"]
    write_text(RESULTS / "tasks.md", markdown(done, verdicts(pd.read_csv(RESULTS / "algorithms.csv"))))


if __name__ == "__main__":
    main()
