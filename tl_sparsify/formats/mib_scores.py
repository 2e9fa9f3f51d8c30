"""Standing in the Mechanistic Interpretability Benchmark: its areas, and the folder of circuits that it takes.

With ``f`` the faithfulness of the circuit at each size, ``(m(C) - m(0)) / (m(M) - m(0))`` for the difference of the
logits of right and wrong answer, and ``x`` the edges in it over all edges,

    CPR = area under f, for circuits by signed scores,      CMD = area under |1 - f|, for circuits by absolute scores,

by the trapezoidal rule. What is not in a circuit takes its value of the counterfactual's run, and ``m(0)`` is measured
there: nothing of the example itself is left, not even its embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.directory import directory
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.distributions import InterventionDistribution, source_batch
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, batch_size_for, check_model, run_values
from tl_sparsify.core.intervene import Intervention, intervened
from tl_sparsify.core.metrics import Metric, by_example, mean_difference, measured_by
from tl_sparsify.core.units import Model, Units
from tl_sparsify.formats.mib_edges import owners
from tl_sparsify.formats.mib_graph import Graph, graph, joined, of_edges
from tl_sparsify.search.path import CircuitPath
from tl_sparsify.search.scores import Scores

PERCENTAGES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The benchmark's sizes; the last is the whole model, for which nobody sends a circuit."""
MODELS = ("gpt2", "qwen2.5", "gemma2", "llama3", "interpbench")
TASKS = ("ioi", "mcqa", "arithmetic_addition", "arithmetic_subtraction", "arc_easy", "arc_challenge")


@dataclass(frozen=True)
class Standing:
    """How circuits of the benchmark's sizes do by its own rule.

    Attributes:
        edges: how many edges each circuit has, rising; the last is the whole model.
        faithfulness: of each.
        area: under it, over the share of edges.
        area_from_1: under its distance from 1.

    Example:
        >>> tls.mib.Standing((5, 10), (0.5, 1.0), *tls.mib.areas([5, 10], [0.5, 1.0]))
        Standing(edges=(5, 10), faithfulness=(0.5, 1.0), area=0.375, area_from_1=0.125)
    """

    edges: tuple[int, ...]
    faithfulness: tuple[float, ...]
    area: float
    area_from_1: float


@checked
def areas(edges: Sequence[float | int], faithfulness: Sequence[float | int]) -> tuple[float, float]:
    """CPR and CMD: the areas under ``f`` and under ``|1 - f|`` over the share of edges, from the smallest circuit to
    the last, which counts as the whole.

    Raises:
        ValueError: lists of other lengths, of less than two sizes, of numbers that are not finite, or numbers of edges
            that do not rise.

    Example:
        >>> tls.mib.areas([5, 10], [0.5, 1.0])
        (0.375, 0.125)
    """
    if len(edges) != len(faithfulness) or len(edges) < 2:
        raise ValueError(
            f"edges has {len(edges)} entries, faithfulness {len(faithfulness)}: give as many, at least two"
        )
    if not all(map(math.isfinite, (*edges, *faithfulness))):
        raise ValueError(f"edges {list(edges)} and faithfulness {list(faithfulness)} must be finite")
    if any(b < a for a, b in pairwise(edges)) or edges[-1] <= 0:
        raise ValueError(f"edges are {list(edges)}: they must rise")
    x = torch.tensor(edges, dtype=torch.float64) / edges[-1]
    f = torch.tensor(faithfulness, dtype=torch.float64)
    return float(torch.trapezoid(f, x)), float(torch.trapezoid((1 - f).abs(), x))


@checked
def circuits(model: Model, source: Scores | CircuitPath, sizes: Sequence[float] = PERCENTAGES[:-1]) -> list[Graph]:
    """The largest circuit with at most each share of the model's edges, in the order of the scores or of the path: of
    heads and MLPs, or of edges, which are taken without those that are not joined to both the input and the logits.
    No model pass.

    Raises:
        ValueError: units that the benchmark does not have, a size outside (0, 1].

    Example:
        >>> tls.mib.circuits(model, scores, sizes=[0.1, 0.5])
        [Graph(6 of 17 nodes, 19 of 262 edges), Graph(12 of 17 nodes, 114 of 262 edges)]
    """
    scores = source if isinstance(source, Scores) else _as_scores(source)
    return [part for _, part in _of_sizes(model, scores, sizes)]


def _of_sizes(model: Any, scores: Scores, sizes: Sequence[float]) -> list[tuple[Circuit, Graph]]:
    """The circuit of each size, and its graph."""
    whole = graph(model, Circuit.full(scores.units), scores)
    edgewise, total = of_edges(scores.units), len(whole.kept_edges)
    order = scores.order.flip(0).cpu()
    most = _most_edges(whole, scores.units, order) if edgewise else _most_nodes(model, scores, order)
    least = int(_of(model, scores, order[:0])[1].kept_edges.sum())
    found: list[tuple[Circuit, Graph]] = []
    for size in sizes:
        if not 0 < size <= 1:
            raise ValueError(f"size is {size}; it lies in (0, 1]")
        if least > size * total and least > 1:
            raise ValueError(
                f"size {size} is {int(size * total):,} edges, and units that are not among {scores.units!r} have "
                f"{least:,}: score {'edges(model)' if edgewise else 'heads(model) + mlps(model)'}"
            )
        circuit, part = _of(model, scores, order[: most(size * total)])
        found.append((circuit, joined(part) if edgewise else part))
    return found


def _most_nodes(model: Any, scores: Scores, order: Int[Tensor, "units"]) -> Callable[[float], int]:
    """The most units whose edges are no more than so many."""

    def most(edges: float) -> int:
        low, high = 0, len(scores.units)
        while low < high:
            middle = (low + high + 1) // 2
            fits = int(_of(model, scores, order[:middle])[1].kept_edges.sum()) <= edges
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    return most


def _most_edges(whole: Graph, units: Units, order: Int[Tensor, "units"]) -> Callable[[float], int]:
    """The same of edges, each of which is one or more of the benchmark's."""
    owner = owners(units, whole.sizes, "scores")
    each = torch.bincount(owner[owner >= 0], minlength=len(units))
    so_far = int((owner < 0).sum()) + each[order].cumsum(0)
    return lambda edges: int((so_far <= edges).sum())


@checked
def submission(
    folder: str | Path,
    model: Model,
    source: Scores | CircuitPath,
    *,
    task: str,
    name: str,
    suffix: str = ".json",
) -> Path:
    """Write what the benchmark's leaderboard takes for one task and model: a folder ``task_name`` in ``folder`` with
    the circuits of its nine sizes (:func:`circuits`), in place of an older one. Complete, or not at all. No model pass.

    Args:
        task: one of :data:`TASKS`.
        name: the benchmark's name of the model, one of :data:`MODELS`.
        suffix: ``.json``, or ``.pt`` for tensors.

    Raises:
        ValueError: another task or model, units that the benchmark does not have.

    Example:
        >>> found = tls.score.risk(model, train, tls.heads(model) + tls.mlps(model), probes=1)
        >>> folder = tls.mib.submission("circuits", model, found, task="ioi", name="gpt2")
        >>> len(sorted(folder.glob("*.json"))), folder.name
        (9, 'ioi_gpt2')
    """
    for argument, value, known in [("task", task, TASKS), ("name", name, MODELS), ("suffix", suffix, (".json", ".pt"))]:
        if value not in known:
            raise ValueError(f"{argument} is {value!r}; the benchmark knows {', '.join(known)}")
    target = Path(folder) / f"{task}_{name}"
    sizes = PERCENTAGES[:-1]
    marks = [f"{sizes[-1]}{ending}" for ending in (".json", ".pt")]
    mark = next((one for one in marks if (target / one).is_file()), marks[0])
    with directory(target, mark, "submission") as beside:
        for size, part in zip(sizes, circuits(model, source, sizes), strict=True):
            part.save(beside / f"{size}{suffix}")
    return target


@checked
def standing(
    model: Model,
    source: Scores | CircuitPath,
    examples: Examples,
    *,
    metric: Metric = mean_difference,
    batch_size: int | None = None,
) -> Standing:
    """The areas of :func:`circuits` of all sizes, measured as the benchmark does. For CPR give signed scores, for CMD
    ``scores.absolute``.

    One forward pass for the model, one for each size, and one for the counterfactuals in each of these.

    Raises:
        ValueError: examples without counterfactual inputs and wrong answers; units that the benchmark does not have.

    Example:
        >>> found = tls.score.risk(model, train, tls.heads(model) + tls.mlps(model), probes=1)
        >>> tls.mib.standing(model, found, test).edges[-1]
        262
        >>> edges = tls.edges(model)
        >>> paired = tls.constants.counterfactual(model, train, edges)
        >>> path = tls.sparsify(model, train, edges, values=paired, rounds=3, smallest=0.05, progress=False)
        >>> len(tls.mib.standing(model, path, test).faithfulness)
        10
    """
    check_model(model)
    scores = source if isinstance(source, Scores) else _as_scores(source)
    found, units = _of_sizes(model, scores, PERCENTAGES[:-1]), scores.units
    other = InterventionDistribution.interchange(1.0, "counterfactual")
    totals = torch.zeros(2 + len(found), dtype=torch.float64)
    with torch.no_grad():
        for index, batch in examples.batches(batch_size_for(model, examples, batch_size)):
            far = source_batch(other, examples, index, 0)
            values = run_values(model, far, units)
            runs = [answer_logits(model, batch), answer_logits(model, far)]
            for circuit, _ in found:
                with intervened(model, Intervention(units, circuit.mask.float(), values)):
                    runs.append(answer_logits(model, batch))
            totals += torch.stack(
                [by_example(measured_by(metric, logits, batch), batch).double().sum().cpu() for logits in runs]
            )
    full, empty, *some = (totals / len(examples)).tolist()
    if full == empty:
        raise ValueError(
            "the model does no better on the examples than on their counterfactuals: nothing to be faithful to"
        )
    edges = [int(part.kept_edges.sum()) for _, part in found] + [len(found[0][1].kept_edges)]
    faithfulness = [(m - empty) / (full - empty) for m in some] + [1.0]
    return Standing(tuple(edges), tuple(faithfulness), *areas(edges, faithfulness))


def _of(model: Any, scores: Scores, kept: Int[Tensor, "kept"]) -> tuple[Circuit, Graph]:
    """The circuit of these units, and its graph."""
    circuit = Circuit(scores.units, torch.zeros(len(scores.units), dtype=torch.bool).index_fill(0, kept, True))
    return circuit, graph(model, circuit, scores)


def _as_scores(path: CircuitPath) -> Scores:
    """The order in which units leave, as scores."""
    places = path.scores.double()
    return Scores(path.units, places, torch.full_like(places, float("nan")), "path", "places", 0, 0)
