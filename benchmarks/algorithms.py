"""Which algorithm? Every shipped task's causal models, right and wrong, held against its network and its circuit.

For each causal model ``align`` looks for the best units of each of its variables; ``verify`` then judges them on other
pairs, on the original and on the folded circuit (the smallest of the search within 0.05 nats on validation), beside
controls. A model counts as accepted when every variable's accuracy on the original is at least 0.95. Also, for the
task's own alignment: its accuracy, and what ``align`` cost beside trying every unit. Writes
``benchmarks/results/algorithms.csv``, ``algorithms.md`` and ``alignments.md``.

    python benchmarks/algorithms.py [--task NAME ...] [--pairs 512]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

import tl_sparsify as tls
from tl_sparsify._files import write_text

RESULTS = Path(__file__).parent / "results"
GOAL = 0.95
WITHIN = 0.05  # nats


def circuit(task: tls.Task, model: Any) -> tls.Reduction:
    """The smallest circuit of a search whose risk on validation examples is within 0.05 nats."""
    train, validation, _ = task.examples(0)
    units = tls.heads(model) + tls.neurons(model)
    values = getattr(tls.constants, task.ablation)(model, train, units)
    path = tls.sparsify(model, train, units, values=values, held_out=validation, refit_steps=20, seed=0, progress=False)
    return path.within(model, validation, WITHIN)


def rows(task: tls.Task, pairs: int) -> list[dict[str, Any]]:
    """One row for each causal model and variable."""
    model = task.model()
    reduction = circuit(task, model)
    small = tls.fold(model, reduction)
    searching, judging = task.pairs(pairs, 1), task.pairs(pairs, 0)
    found: list[dict[str, Any]] = []
    for name, causal_model in task.causal_models.items():
        verdict = "wrong" if name in task.wrong else "right"
        variables = tuple(v for v in causal_model.variables if v != causal_model.output)
        search = tls.align(model, causal_model, searching, judging, variables=variables)
        evidence = tls.verify(model, causal_model, search.alignment, judging, reduced=small, draws=3)
        own = task.causal_model is causal_model
        given = tls.Alignment({v: u for v, u in task.alignment.units.items() if v in variables}) if own else None
        shipped = None if given is None else tls.verify(model, causal_model, given, judging, reduced=small, draws=3)
        for variable in variables:
            aligned = search.alignment.units[variable]
            row = {
                "task": task.name,
                "causal_model": name,
                "supposed": verdict,
                "variable": variable,
                "units": len(aligned),
                "original": evidence.accuracy(variable),
                "folded": evidence.accuracy(variable, "reduced"),
                "do_nothing": evidence.accuracy(variable, intervention="do nothing"),
                "random_units": evidence.accuracy(variable, intervention="random units"),
                "random_weights": evidence.accuracy(variable, "random weights"),
                "kept": len(reduction.circuit),
                "of": len(reduction.units),
                "forward": search.forward,
                "backward": search.backward,
                "exhaustive": search.exhaustive,
            }
            if shipped is not None and given is not None and variable in given.variables:
                row["shipped_original"] = shipped.accuracy(variable)
                row["shipped_folded"] = shipped.accuracy(variable, "reduced")
                row["shipped_random"] = shipped.accuracy(variable, intervention="random units")
            found.append(row)
        print(task.name, name, search, flush=True)
    return found


def markdown(frame: pd.DataFrame) -> str:
    """One row a causal model: the lowest accuracy over its variables, with the variable, and the controls' highest."""
    lines = [
        "| task (kept units) | causal model | supposed | original | folded | do nothing | random units "
        "| random weights | verdict |",
        "|---" * 9 + "|",
    ]
    for (task, name), part in frame.groupby(["task", "causal_model"], sort=False):
        worst = part.loc[part.original.idxmin()]
        cells = [f"{part[column].max():.3f}" for column in ("do_nothing", "random_units", "random_weights")]
        verdict = "accepted" if worst.original >= GOAL else "rejected"
        lines.append(
            f"| {task} ({worst.kept} of {worst.of}) | {name} | {worst.supposed} | {worst.original:.3f} "
            f"({worst.variable}) | {part.folded.min():.3f} | " + " | ".join(cells) + f" | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def alignments(frame: pd.DataFrame) -> str:
    """One row for each variable of each task's own causal model: the shipped alignment beside the one found."""
    lines = [
        "| task | variable | shipped alignment: original / folded / random units | found by `align`: units, original "
        "| passes of `align` (forward + backward) | trying every unit |",
        "|---" * 6 + "|",
    ]
    for _, row in frame[frame.shipped_original.notna()].iterrows():
        lines.append(
            f"| {row.task} | {row.variable} | {row.shipped_original:.3f} / {row.shipped_folded:.3f} / "
            f"{row.shipped_random:.3f} | {row.units} units, {row.original:.3f} | {row.forward} + {row.backward} "
            f"| {row.exhaustive} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="*", default=None)
    parser.add_argument("--pairs", type=int, default=512)
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    for name in arguments.task or tls.list_tasks():
        found += rows(tls.load_task(name), arguments.pairs)
    frame = pd.DataFrame(found)
    write_text(RESULTS / "algorithms.csv", frame.to_csv(index=False))
    write_text(RESULTS / "algorithms.md", markdown(frame))
    write_text(RESULTS / "alignments.md", alignments(frame))
    print(markdown(frame))
    print(alignments(frame))


if __name__ == "__main__":
    main()
