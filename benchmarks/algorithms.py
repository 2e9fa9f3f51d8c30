"""Which algorithm? Every shipped task's causal models, right and wrong, held against its network and its circuit.

Each causal model is judged on the same pairs with the task's own alignment (for the variables that it names) and with
the best alignment that ``align`` finds for it on other pairs, on the original and on the folded circuit (the smallest
of a search within 0.01 nats on validation), beside controls. A model is accepted when, for each of its variables, the
accuracy is at least 0.95, and at least 0.9 on the pairs whose answer should change. ``align`` may find for a wrong
model places of the right one's variables, or of the answer, so the task's own alignment decides where it names all
variables. Tasks done before are kept. Writes ``benchmarks/results/algorithms.csv``, ``algorithms.md`` and
``alignments.md``.

    python benchmarks/algorithms.py [--task NAME ...] [--pairs 512]
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from shared import by_task, parser

import tl_sparsify as tls
from tl_sparsify.abstraction.verdicts import accepted
from tl_sparsify.comparison.tables import table_of

WITHIN = 0.01  # nats
TOKENS = 5_120  # of training examples for the search
MANY = 2_000  # units: the search of so many is not refitted inside


def circuit(task: tls.Task, model: Any) -> tls.Reduction:
    """The smallest circuit of a search whose risk on validation examples is within 0.01 nats."""
    train, validation, _ = task.examples(0)
    train = train[: TOKENS // train.labels.shape[1]]
    units = tls.heads(model) + tls.neurons(model)
    values = getattr(tls.constants, task.ablation)(model, train, units)
    fast = {"refitting": tls.Refitting(0), "predict": False} if len(units) > MANY else {}
    path = tls.sparsify(model, train, units, values=values, held_out=validation, seed=0, progress=False, **fast)
    return path.within(model, validation, WITHIN)


def judged(model: Any, small: Any, causal_model: tls.CausalModel, alignment: tls.Alignment, pairs: Any) -> pd.DataFrame:
    """One row for each variable: accuracies on the original and the folded model, and the controls."""
    evidence = tls.verify(model, causal_model, alignment, pairs, reduced=small, draws=3)
    by_name = {(row.variable, row.model, row.intervention): row.accuracy for row in evidence.rows}
    untrained = {row.variable: row.accuracy for row in evidence.rows if row.untrained and row.role == "aligned"}

    def control(variable: str, name: str) -> float:
        return by_name.get((variable, "original", name), float("nan"))

    return pd.DataFrame(
        [
            {
                "variable": variable,
                "units": len(alignment.units[variable]),
                "original": evidence.verdict(variable).accuracy,
                "changed": evidence.verdict(variable).changed,
                "folded": evidence.verdict(variable, "reduced").accuracy,
                "do_nothing": control(variable, "do nothing"),
                "random_units": control(variable, "random units"),
                "random_weights": untrained[variable],
            }
            for variable in alignment.variables
        ]
    )


def says(causal_model: tls.CausalModel, variable: str, pairs: tls.Pairs) -> bool:
    """Whether interchanging the variable changes the answer of a pair, on either half of them."""
    halves = (pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :])
    return all(
        bool((half.expected(causal_model, (variable,)) != half.expected(causal_model, ())).any()) for half in halves
    )


def rows(task: tls.Task, pairs: int) -> list[pd.DataFrame]:
    """For each causal model and alignment one row for each variable."""
    model = task.model()
    reduction = circuit(task, model)
    small = tls.fold(model, reduction)
    searching, judging = task.pairs(pairs, 1), task.pairs(pairs, 0)
    found: list[pd.DataFrame] = []
    for name, causal_model in task.causal_models.items():
        variables = tuple(
            v for v in causal_model.variables if v != causal_model.output and says(causal_model, v, searching)
        )
        if not variables:
            continue  # it says nothing of what goes on inside
        search = tls.align(model, causal_model, searching, judging, variables=variables)
        shared = {v: units for v, units in task.alignment.units.items() if v in variables}
        alignments = {"found": search.alignment} | ({"shipped": tls.Alignment(shared)} if shared else {})
        for source, alignment in alignments.items():
            frame = judged(model, small, causal_model, alignment, judging)
            found.append(
                frame.assign(
                    task=task.name,
                    kept=f"{len(reduction.circuit)} of {len(reduction.units)}",
                    causal_model=name,
                    own=causal_model == task.causal_model,
                    supposed="wrong" if name in task.wrong else "right",
                    alignment=source,
                    complete=set(alignment.variables) == set(variables),
                    forward=search.forward,
                    backward=search.backward,
                    exhaustive=search.exhaustive,
                )
            )
        print(task.name, name, search, flush=True)
    return found


def number(accuracy: float) -> str:
    """Three decimals; a dash where there is none (sites without other units)."""
    return "-" if pd.isna(accuracy) else f"{accuracy:.3f}"


def worst(part: pd.DataFrame) -> str:
    """The lowest accuracy over the variables, where it is, and the lowest where the answer should change."""
    if part.empty:
        return ""
    row = part.loc[part.original.idxmin()]
    return f"{row.original:.3f} ({row.variable}; changed {part.changed.min():.3f}); folded {part.folded.min():.3f}"


def judgement(part: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """The rows that decide on a causal model, and whether it is accepted."""
    shipped, found = (part[part.alignment == source] for source in ("shipped", "found"))
    decisive = shipped if len(shipped) and shipped.complete.all() else found
    return decisive, all(accepted(row.original, row.changed) for row in decisive.itertuples())


def verdicts(frame: pd.DataFrame) -> dict[str, str]:
    """For each task which causal models were accepted and rejected, with the lowest accuracy that decided."""
    said: dict[str, list[str]] = {}
    for (task, name), part in frame.groupby(["task", "causal_model"], sort=False):
        decisive, fine = judgement(part)
        supposed = "" if part.supposed.iloc[0] == "right" else " (wrong)"
        verdict = "accepted" if fine else "rejected"
        said.setdefault(str(task), []).append(f"{name}{supposed} {verdict} {decisive.original.min():.3f}")
    return {task: ", ".join(some) for task, some in said.items()}


def markdown(frame: pd.DataFrame) -> str:
    """One row a causal model: the lowest accuracies over its variables, and the controls' highest."""
    heads = ["task (kept units)", "causal model", "supposed", "task's alignment", "best found by `align`"]
    heads += ["do nothing", "random units", "random weights", "verdict"]
    lines: list[list[str]] = []
    for (task, name), part in frame.groupby(["task", "causal_model"], sort=False):
        shipped, found = (part[part.alignment == source] for source in ("shipped", "found"))
        decisive, fine = judgement(part)
        verdict = "accepted" if fine else "rejected"
        controls = [number(decisive[column].max()) for column in ("do_nothing", "random_units", "random_weights")]
        cells = [f"{task} ({part.kept.iloc[0]})", str(name), part.supposed.iloc[0], worst(shipped), worst(found)]
        lines.append([*cells, *controls, verdict])
    return table_of(heads, lines)


def alignments(frame: pd.DataFrame) -> str:
    """One row for each variable of each task's own causal model: the shipped alignment beside the one found."""
    heads = ["task", "variable", "shipped alignment: units, original / folded / random units"]
    heads += ["found by `align`: units, original", "passes of `align`, all variables (forward + backward)"]
    lines: list[list[str]] = []
    own = frame[frame.own].drop_duplicates(["task", "causal_model", "variable", "alignment"])
    for (task, variable), part in own.groupby(["task", "variable"], sort=False):
        sides = {source: part[part.alignment == source].iloc[:1] for source in ("shipped", "found")}
        if any(side.empty for side in sides.values()):
            continue
        one, two = (side.iloc[0] for side in sides.values())
        shipped = f"{one.units}, {one.original:.3f} / {one.folded:.3f} / {number(one.random_units)}"
        cells = [shipped, f"{two.units}, {two.original:.3f}", f"{two.forward} + {two.backward}", f"{two.exhaustive}"]
        lines.append([str(task), str(variable), *cells])
    return table_of([*heads, "trying every unit"], lines)


def main() -> None:
    options = parser(__doc__, tasks=True)
    options.add_argument("--pairs", type=int, default=512)
    arguments = options.parse_args()

    def made(name: str) -> dict[str, pd.DataFrame]:
        return {"algorithms": pd.concat(rows(tls.load_task(name), arguments.pairs), ignore_index=True)}

    pages = {"algorithms": markdown, "alignments": alignments}
    by_task({"algorithms": pages}, arguments.task, made, in_order=True)


if __name__ == "__main__":
    main()
