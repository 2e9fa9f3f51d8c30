"""Sharpening: the gates of the top-k mask, trained from the order of a search. With few, large units a search's
expansion says little, and what it found is still a far better start than nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.measure import remembering, risk
from tl_sparsify.core.metrics import Metric
from tl_sparsify.core.moments import Estimate
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model
from tl_sparsify.masking.gates import of_random_sizes, relative_to_size
from tl_sparsify.masking.training import PER_STEP, trained
from tl_sparsify.search.path import CircuitPath, Round, order_through, worse

_SHARPENING = 20  # passes over the data
_LEAST = 1e-6  # nats; risks below it count as this


@checked
def sharpen(
    model: Model,
    path: CircuitPath,
    train: Examples,
    *,
    steps: int | None = None,
    learning_rate: float = 0.15,
    temperature: float = 0.2,
    relative: bool = False,
    per_step: int = PER_STEP,
    always_keep: Circuit | None = None,
    held_out: Examples | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> CircuitPath:
    """Train the gates of :func:`top_k_gate` from the order of a path, and return the best of four paths: for few,
    large units (heads, edges, whole MLPs), which an expansion of second order says little about.

    Logits start evenly spaced from -1 to 1 in the path's order. The given path and that of the trained logits are
    measured on ``held_out`` at the sizes of the path's rounds. Where the second is better from some size on, so are two
    that join them there: the given circuit before that size, taken apart in the trained order, and the trained circuit
    of that size, with the other units before it in the given order. The one with the lowest geometric mean of its risks
    is returned, with these. A circuit that measures worse than the next smaller one, by more than its standard error,
    is grown from that one within the next larger one, in the given or in the trained order, where that measures lower.

    Args:
        path: of constants or counterfactual values that were not refitted in its rounds (refit afterwards).
        steps: of Adam, with a cosine schedule; where not given as many as make 20 passes over ``train``.
        always_keep: units that stay in every circuit.
        held_out: where they are measured; ``train`` where not given.
        learning_rate, temperature, relative, per_step, metric, batch_size: as in :func:`top_k_gate`.

    By default 40 forward and 20 backward passes over ``train``, in general ``2 steps per_step / n`` and half as many;
    at most three forward passes over ``held_out`` for each round, two more for each that is grown, and one of the
    original model.

    Raises:
        ValueError: a model in training mode; a path by cost, or whose constants were refitted in its rounds; ``steps``
            or ``per_step`` below one; a ``learning_rate`` or ``temperature`` that is not positive.

    Example:
        >>> better = tls.sharpen(model, path, train, steps=3, progress=False)
        >>> better.to_frame()["kept"].tolist() == path.to_frame()["kept"].tolist()
        True
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if path.costs is not None:
        raise ValueError("path is ordered by costs, which a mask does not know: sharpen one of a search without costs")
    last, units = path.rounds[-1].reduction, path.units
    if last.refitted or last.mixing is not None:
        raise ValueError(
            f"path has {last.kind} values, fitted in its rounds: search with Refitting(0), and refit after"
        )
    if always_keep is not None and always_keep.units != units:
        raise ValueError(f"always_keep is a circuit over {always_keep.units!r}, not over {units!r}")
    size = min(per_step, len(train))
    start = torch.empty(len(units))
    start[path.order] = torch.linspace(-1, 1, len(units))
    gates = of_random_sizes(len(last.circuit), len(units), temperature, seed)
    steps = math.ceil(_SHARPENING * len(train) / max(1, size)) if steps is None else steps
    settings = {"steps": steps, "learning_rate": learning_rate, "per_step": per_step, "values": last.values}
    settings |= {"held_out": None, "metric": metric, "seed": seed, "batch_size": batch_size, "progress": progress}
    settings |= {"first_token": last.first_token}
    settings |= {"weighting": relative_to_size() if relative else None}
    logits = trained(model, train, units, start, gates, None, name="sharpened", **settings).scores.cpu().double()
    if always_keep is not None:
        logits = logits.masked_fill(always_keep.mask, float("inf"))
    judged, recall = train if held_out is None else held_out, remembering()
    measuring: dict[str, Any] = {"metric": metric, "seed": seed, "recall": recall, "batch_size": batch_size}
    known: dict[Circuit, Estimate] = {}
    unknown = Estimate(float("nan"), float("nan"), len(judged), "nats" if metric is None else "squared units")

    def round_of(step: Round, reduction: Reduction) -> Round:
        """With this reduction in place of the given round's."""
        if (circuit := reduction.circuit) not in known:
            known[circuit] = risk(model, reduction, judged, **measuring)
        same = circuit == step.reduction.circuit
        predicted = (step.predicted, step.additivity) if same else (unknown, float("nan"))
        return Round(reduction, predicted[0], known[circuit], predicted[1])

    def measured(order: Int[Tensor, "units"]) -> CircuitPath:
        """The path of an order, at the sizes of the given one."""
        ordered = replace(path, order=order)
        rounds = (round_of(step, ordered.at(step.reduction.circuit.fraction)) for step in path.rounds)
        return replace(ordered, rounds=tuple(rounds))

    def grown(step: Round, smaller: Circuit, around: Bool[Tensor, "units"], order: Int[Tensor, "units"]) -> Round:
        """The smaller circuit with the last units of an order, among those around it, up to the size of the step."""
        free = order[(around & ~smaller.mask)[order]]
        more = free[len(free) - (len(step.reduction.circuit) - len(smaller)) :]
        return round_of(step, step.reduction.with_circuit(Circuit(units, smaller.mask.index_fill(0, more, True))))

    trained_order = logits.argsort(stable=True)
    first, second = measured(path.order), measured(trained_order)
    gains = torch.tensor([a - b for a, b in zip(_logs(first), _logs(second), strict=True)])
    rest = gains.flip(0).cumsum(0).flip(0)  # what the second path gains from this round on
    paths = [first, second]
    joint = int(rest.argmax())
    if joint > 0 and bool(rest[joint] > 0):
        before, there = path.rounds[joint - 1].reduction.circuit.mask, second.rounds[joint].reduction.circuit.mask
        for inside in (before, there):
            paths.append(measured(torch.cat([path.order[~inside[path.order]], trained_order[inside[trained_order]]])))
    best = min(paths, key=lambda one: sum(_logs(one)))
    rounds, every = list(best.rounds), torch.ones(len(units), dtype=torch.bool)
    for place in reversed(range(len(rounds) - 1)):
        larger, smaller = rounds[place : place + 2]
        if worse(larger, smaller):
            around = rounds[place - 1].reduction.circuit.mask if place else every
            here = (smaller.reduction.circuit, around)
            others = [grown(path.rounds[place], *here, order) for order in (path.order, trained_order)]
            rounds[place] = min([larger, *others], key=lambda one: one.measured.mean)
    return replace(best, order=order_through(best.order, rounds), rounds=tuple(rounds))


def _logs(path: CircuitPath) -> list[float]:
    """The logarithms of a path's measured risks."""
    return [math.log(max(step.measured.mean, _LEAST)) for step in path.rounds]
