"""Measures of ablated circuits computed the slow way: one example at a time, hooks and sums written out.

Nothing of the package takes part but the names and hook points of units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from tl_sparsify.core.circuit import Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.units import Units

Fill = Mapping[str, Tensor]
"""Hook point to what its units are set to: ``[pos or 1, units, width]``."""


def constant(values: Values) -> Fill:
    """The same for every position."""
    return {site.hook: tensor[None] for site, tensor in zip(values.units.sites, values.tensors, strict=True)}


def run(
    model: Any,
    units: Units,
    tokens: Tensor,
    kept: Collection[str] | None = None,
    fill: Fill | None = None,
    taken: Collection[str] = (),
    other: Fill | None = None,
    at: slice = slice(None),
) -> tuple[Tensor, Fill]:
    """Logits ``[pos, vocab]`` of one input and its units' values, with the units outside ``kept`` (``None``: all are
    kept) set to ``fill`` and those in ``taken`` to ``other``, at the positions ``at``."""
    seen: dict[str, Tensor] = {}

    def change(activation: Tensor, hook: Any, site: Any) -> Tensor:
        new = activation.clone()
        cells = new[0] if new.ndim == 4 else new[0][..., None]  # [pos, units, width]: a view
        for i in range(site.size):
            if site.name(i) in taken and other is not None:
                cells[at, i] = other[site.hook].expand_as(cells)[at, i]
            elif kept is not None and site.name(i) not in kept and fill is not None:
                cells[at, i] = fill[site.hook].expand_as(cells)[at, i]
        seen[site.hook] = cells.clone()
        return new

    hooks = [(site.hook, lambda v, hook, site=site: change(v, hook, site)) for site in units.sites]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return model(tokens[None])[0], seen


def measures(full: Tensor, reduced: Tensor, labels: Tensor, choices: list[int]) -> dict[str, float]:
    """All measures of one example, from the logits of the original and the ablated model at every position."""
    sums = {"risk": 0.0, "accuracy": 0.0, "agreement": 0.0, "metric": 0.0}
    answered = [position for position in range(len(labels)) if labels[position] != -100]
    for position in answered:
        z, w = ([float(logits[position, c]) for c in choices] for logits in (full, reduced))
        p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (z, w))
        right = choices.index(int(labels[position]))
        sums["risk"] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(answered)
        sums["accuracy"] += (w.index(max(w)) == right) / len(answered)
        sums["agreement"] += (z.index(max(z)) == w.index(max(w))) / len(answered)
        others = sum(b for i, b in enumerate(q) if i != right)
        sums["metric"] += (math.log(q[right]) - math.log(others)) / len(answered)
    return sums


def table(
    model: Any,
    units: Units,
    examples: Examples,
    circuits: list[list[str] | None],
    fill: Callable[[int], Fill],
) -> list[list[dict[str, float]]]:
    """The measures of every example (the rows) under each circuit, with the other units set to ``fill(example)``."""
    choices = list(range(model.cfg.d_vocab)) if examples.choices is None else examples.choices.tolist()
    rows: list[list[dict[str, float]]] = []
    for i, (tokens, labels) in enumerate(zip(examples.tokens, examples.labels, strict=True)):
        full = run(model, units, tokens)[0]
        outputs = [run(model, units, tokens, kept, fill(i))[0] for kept in circuits]
        rows.append([measures(full, reduced, labels, choices) for reduced in outputs])
    return rows


def average(rows: list[list[dict[str, float]]], circuit: int, measure: str, weights: list[float]) -> float:
    """A measure's weighted mean over examples."""
    return sum(w * row[circuit][measure] for w, row in zip(weights, rows, strict=True)) / sum(weights)
