"""Do other backward passes find better circuits: the true gradient, GIM and RelP, in the joint search, in one-shot
scores and in edge attribution.

On small shipped tasks: the circuit of each size is found on training examples and judged by its risk (KL, removed units
at their means) on validation examples; test examples are not touched. Writes ``benchmarks/results/backward_modes.csv``
and ``backward_modes.md``.

    python benchmarks/backward_modes.py [--task NAME ...] [--seeds 1]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pandas as pd
from shared import LEAST, by_task, geometric_mean, marked, parser

import tl_sparsify as tls

TASKS = ("planted_gate", "hierarchical_equality", "balanced_brackets", "induction")
MODES = ("true", "gim", "relp")
SIZES = (0.2, 0.1, 0.05)
EXAMPLES = 128
ROUNDS = 10
EDGES = 1500  # most edges of a model whose edges are scored, too


def searched(model: Any, train: tls.Examples, units: tls.Units, mode: Any, seed: int) -> tls.CircuitPath:
    probing = tls.Probing(backward=mode)
    return tls.sparsify(
        model, train, units, rounds=ROUNDS, smallest=0.03, probing=probing, predict=False, seed=seed, progress=False
    )


def scored(score: Callable[..., tls.Scores], model: Any, train: tls.Examples, units: tls.Units, mode: Any, seed: int):
    return score(model, train, units, backward=mode, seed=seed).absolute


METHODS: dict[str, Callable[..., Any]] = {
    "joint search": searched,
    "risk, one shot": partial(scored, partial(tls.score.risk, temperature=3.0)),
    "gradient to the mean": partial(scored, tls.score.gradient),
    "EAP": partial(scored, tls.baselines.eap),
    "EAP-IG": partial(scored, tls.baselines.eap_ig),
}
OF_EDGES = ("joint search", "risk, one shot", "gradient to the mean")


def rows(name: str, seeds: int) -> dict[str, pd.DataFrame]:
    task = tls.load_task(name)
    model = task.model()
    found: list[dict[str, Any]] = []
    nodes = tls.heads(model) + tls.neurons(model)
    edges = tls.edges(model)
    kinds = {"nodes": nodes} | ({"edges": edges} if len(edges) <= EDGES else {})
    for seed in range(seeds):
        train, validation, _ = task.examples(seed)
        train, validation = train.sample(EXAMPLES, seed=seed), validation.sample(EXAMPLES, seed=seed)
        for kind, units in kinds.items():
            means = tls.constants.mean(model, train, units)
            for method, run in METHODS.items():
                if kind == "edges" and method not in OF_EDGES:
                    continue
                for mode in MODES:
                    order = run(model, train, units, mode, seed)
                    for size in SIZES:
                        circuit = order.top(size) if isinstance(order, tls.Scores) else order.at(size).circuit
                        reduction = tls.constants.reduced(model, circuit, means)
                        risk = tls.risk(model, reduction, validation).mean
                        row = {"task": name, "kind": kind, "seed": seed, "method": method, "backward": mode}
                        found.append(row | {"size": size, "risk": risk})
    return {"backward_modes": pd.DataFrame(found)}


def page(frame: pd.DataFrame) -> str:
    """Risk on validation by method and mode, geometric means over tasks and seeds, and by task at the middle size."""
    lines = [
        f"Risk in nats (KL, removed units at their means) on {EXAMPLES} validation examples; circuits found on "
        f"{EXAMPLES} training examples; {ROUNDS} rounds in the joint search. Made by "
        "`benchmarks/backward_modes.py`. Lower is better; bold: the best of a row.",
        "",
        f"Geometric means over {frame.task.nunique()} tasks ({', '.join(frame.task.unique())}; edges over "
        f"{frame[frame.kind == 'edges'].task.nunique()}); risks below {LEAST:g} count as that:",
        "",
    ]
    head = ["| units | method | kept | true | GIM | RelP |", "|---|---|---|---|---|---|"]
    lines += head
    for key, part in frame.groupby(["kind", "method", "size"], sort=False):
        kind, method, size = cast(tuple[str, str, float], key)
        cells = [geometric_mean([max(r, LEAST) for r in part.risk[part.backward == mode]]) for mode in MODES]
        lines.append(f"| {kind} | {method} | {size:.0%} | " + " | ".join(marked(cells)) + " |")
    lines += [
        "",
        "By task, 10 % kept:",
        "",
        "| task | units | method | true | GIM | RelP |",
        "|---|---|---|---|---|---|",
    ]
    for key, part in frame[frame["size"] == SIZES[1]].groupby(["task", "kind", "method"], sort=False):
        task, kind, method = cast(tuple[str, str, str], key)
        cells = [float(part.risk[part.backward == mode].mean()) for mode in MODES]
        lines.append(f"| {task} | {kind} | {method} | " + " | ".join(marked(cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    options = parser(__doc__, seeds=1, tasks=True).parse_args()
    by_task({"backward_modes": {"backward_modes": page}}, options.task or TASKS, partial(rows, seeds=options.seeds))
