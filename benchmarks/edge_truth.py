"""Do orders of edges find the edges that are known to be true? On every shipped task whose units are known.

Candidates are edges both of whose ends are true: the embedding, the logits, true heads and MLPs with a true neuron
(``truth.json``, by ``removal``, or by ``weights`` where that alone is known). Of these an edge is true if removing it
alone from the circuit of all candidates changes an answer's logits beyond round-off, in float64, on the task's training
examples, under the named ablation. So truth is exact for the examples and for that circuit; it is not a mechanism: an
edge with a backup that takes over in full counts as false, and one that carries something the answer does not need, but
shifts a logit, as true. ``risk`` is what the circuit of the candidates costs: where it is not near zero the candidates
are not all that the model does.

Each order is scored by its area under the ROC curve and its average precision. One cell for each task, method and seed:
a CSV of its own, so that a run that was stopped goes on where it was. Writes ``benchmarks/results/edge_truth.md``.

    python benchmarks/edge_truth.py [--task NAME ...] [--methods NAME ...] [--seeds 1]
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pandas as pd
import torch
from edges import OURS, methods
from jaxtyping import Float
from shared import RESULTS, marked, nats, parser
from torch import Tensor

import tl_sparsify as tls
from tl_sparsify._internal.files import write_text
from tl_sparsify.comparison.evaluate import auroc, average_precision
from tl_sparsify.comparison.tables import table_of
from tl_sparsify.core.forward import answer_logits

ROUND_OFF = 1e-9
"""Of the largest logit: a change below it is none."""
ROUNDS, PROBES, STEPS = 20, 4, 5
NAMES = (OURS, "risk, one shot", "EAP", "EAP-IG", "EAP, rounds", "EAP-IG, rounds", "GIM", "top-k mask", "edge pruning")


def candidates(units: tls.Units, true: tuple[str, ...]) -> tls.Circuit:
    """The edges both of whose ends are true; an MLP is true if one of its neurons is."""
    ends = {name if "N" not in name else f"{name.partition('N')[0]}MLP" for name in true} | {"embed", "logits"}
    pairs = (name.split("->") for name in units.names)
    mask = [writer in ends and reader.partition(".")[0] in ends for writer, reader in pairs]
    return tls.Circuit(units, torch.tensor(mask))


def changes(model: Any, examples: tls.Examples, circuit: tls.Circuit, values: tls.Values) -> Float[Tensor, "units"]:
    """By how much removing each edge of a circuit alone from it changes any answer's logit, as a share of the largest
    logit; 0 for edges outside. One forward pass for each edge."""

    def logits(kept: tls.Circuit) -> Float[Tensor, "rows choices"]:
        with torch.no_grad(), tls.intervened(model, tls.ablate(tls.constants.reduced(model, kept, values))):
            return answer_logits(model, examples)

    whole = logits(circuit)
    found = torch.zeros(len(circuit.units), dtype=torch.float64)
    for number in circuit.mask.nonzero()[:, 0].tolist():
        mask = circuit.mask.clone()
        mask[number] = False
        found[number] = (logits(tls.Circuit(circuit.units, mask)) - whole).abs().max()
    return found / whole.abs().max()


def true_edges(task: tls.Task, model: Any, examples: tls.Examples, units: tls.Units) -> tuple[tls.Circuit, float]:
    """The true edges, and the risk of the circuit of all candidates in nats."""
    wide = copy.deepcopy(model).double()
    values = getattr(tls.constants, task.ablation)(wide, examples, units)
    circuit = candidates(units, task.truth.get("removal", task.truth["weights"]))
    mask = changes(wide, examples, circuit, values) > ROUND_OFF
    return tls.Circuit(units, mask), tls.risk(wide, tls.constants.reduced(wide, circuit, values), examples).mean


def order(method: str, task: tls.Task, model: Any, train: tls.Examples, units: tls.Units, seed: int) -> Tensor:
    """A method's scores, larger for edges that it keeps longer."""
    values = getattr(tls.constants, task.ablation)(model, train, units)
    if method == "GIM":
        return tls.score.gradient(model, train, units, values=values, backward="gim", seed=seed).absolute.scores
    return methods(ROUNDS, PROBES, STEPS)[method](model, train, units, values=values, seed=seed).scores


@cache
def setting(name: str, seed: int, examples: int) -> tuple[tls.Task, Any, tls.Examples, tls.Circuit, float]:
    """A task, its model, training examples, the true edges and the candidates' risk."""
    task = tls.load_task(name)
    model = task.model()
    train, _, _ = task.examples(seed)
    train = train.sample(min(examples, len(train)), seed=seed)
    return task, model, train, *true_edges(task, model, train, tls.edges(model))


def cell(name: str, method: str, seed: int, examples: int) -> pd.DataFrame:
    """One method on one task: one row."""
    task, model, train, truth, risk = setting(name, seed, examples)
    units = truth.units
    row = {"task": name, "ablation": task.ablation, "method": method, "seed": seed, "edges": len(units)}
    row |= {"true": len(truth), "risk": risk, "auroc": float("nan"), "average_precision": float("nan")}
    if 0 < len(truth) < len(units):
        scores = order(method, task, model, train, units, seed)
        row |= {"auroc": auroc(scores, truth), "average_precision": average_precision(scores, truth)}
    return pd.DataFrame([row])


def page(frame: pd.DataFrame) -> str:
    """Two tables, a row a task and a column a method, means over seeds, the best bold: AUROC and average precision."""
    names = [name for name in NAMES if name in set(frame.method)]
    parts: list[str] = []
    for measure, title in (("auroc", "Area under the ROC curve"), ("average_precision", "Average precision")):
        lines: list[list[str]] = []
        for (task, ablation), part in frame.groupby(["task", "ablation"], sort=True):
            means = part.groupby("method")[measure].mean().reindex(names)
            first = part.iloc[0]
            about = [f"{task} ({ablation})", f"{first.true} of {first.edges}", nats(float(part.risk.mean()))]
            lines.append([*about, *marked(list(means), "{:.3f}".format, max)])
        whole = frame.groupby(["task", "method"])[measure].mean().groupby("method").mean().reindex(names)
        lines.append(["mean of the tasks", "", "", *marked(list(whole), "{:.3f}".format, max)])
        parts.append(f"{title}\n\n{table_of(['task (ablation)', 'true edges', 'risk', *names], lines)}")
    return "\n".join(parts)


def main() -> None:
    """Make every cell that is missing, and the page of all that there are."""
    options = parser(__doc__, seeds=1, tasks=True)
    options.add_argument("--methods", nargs="+", default=NAMES, choices=NAMES)
    options.add_argument("--examples", type=int, default=64)
    chosen = options.parse_args()
    folder = RESULTS / "edge_truth"
    folder.mkdir(parents=True, exist_ok=True)
    known = [name for name in tls.list_tasks() if tls.load_task(name).truth]
    for seed in range(chosen.seeds):
        for method in chosen.methods:
            for name in chosen.task or known:
                file = folder / f"{name}-{method.replace(', ', '-').replace(' ', '_')}-{seed}.csv"
                if not file.is_file():
                    found = cell(name, method, seed, chosen.examples)
                    write_text(file, found.to_csv(index=False))
                    print(f"{name}, {method}, seed {seed}: {found.auroc.iloc[0]:.3f}", flush=True)
    write_text(RESULTS / "edge_truth.md", page(pd.concat(map(pd.read_csv, sorted(folder.glob("*.csv"))))))


if __name__ == "__main__":
    main()
