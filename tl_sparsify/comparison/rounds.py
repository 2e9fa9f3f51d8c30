"""Any scorer in rounds: score, remove the lowest units, score again in the model without them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count
from tl_sparsify._internal.progress import progress as bar
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.distributions import removal
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import batches_of, check_call
from tl_sparsify.core.intervene import ablate, intervened
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model, Units
from tl_sparsify.search.constants import mean
from tl_sparsify.search.joint import schedule
from tl_sparsify.search.scores import Scores, kept_count


@checked
def in_rounds(
    scorer: Callable[..., Scores],
    model: Model,
    examples: Examples,
    units: Units,
    *,
    rounds: int = 20,
    smallest: float = 0.01,
    absolute: bool = False,
    values: Values | None = None,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> Scores:
    """Any scorer, iterated: score in the model with the units removed so far ablated, remove the lowest, go on. A
    unit's score is its place in the order of removal; the units that are left at the end are in order of their last
    score.

    Args:
        scorer: a function ``(model, examples, units, *, seed, ...) -> Scores``.
        rounds, smallest: the schedule of :func:`sparsify`: from all units down to ``smallest`` of them.
        absolute: order by the size of signed scores.
        values: what removed units are set to; their means over ``examples`` where not given. They are also what the
            scorer removes units to, if it takes constants. With :func:`constants.counterfactual` the scorer sees a
            batch at a time, and a score is the mean over batches; what it draws at random then depends on them.
        settings: go to the scorer.

    The passes of the scorer in each round that removes a unit; one forward pass for the means where not given.

    Raises:
        ValueError: ``rounds`` below one, ``smallest`` outside (0, 1] or too large to remove any unit, and what the
            scorer raises.

    Example:
        >>> tls.baselines.in_rounds(tls.score.variance, model, train, units, rounds=3, progress=False).top(0.25)
        Circuit(3 of 12 units: 3 heads)
    """
    check_call(model, examples, seed=seed)
    check_count("rounds", rounds, least=None, most=MOST)
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least one is needed")
    least = kept_count(len(units), smallest, "smallest")
    if least == len(units):
        raise ValueError(f"smallest={smallest} removes none of the {len(units)} units: choose a smaller one")
    given = values is not None
    values = values if values is not None else mean(model, examples, units, batch_size=settings.get("batch_size"))
    takes = inspect.signature(scorer).parameters
    run = settings.get("source", takes["source"].default if "source" in takes else "constant")
    if "values" in takes and run == "constant":
        settings["values"] = values
    takes_size = "batch_size" in takes
    if "progress" in takes:
        settings["progress"] = False
    current = Reduction(Circuit.full(units), values)
    order: list[Tensor] = []
    rest = torch.arange(len(units))
    name, forward, backward = "", int(not given), 0
    targets = [kept_count(len(units), f) for f in schedule(rounds, least / len(units), None, 1.0)]
    for number, target in enumerate(bar(targets, "removing units", progress)):
        excess = len(current.circuit) - target
        if excess <= 0:
            continue
        found = _without(model, current, examples, partial(scorer, model, seed=seed + number, **settings), takes_size)
        found = found.absolute if absolute else found
        name, forward, backward = found.name, forward + found.forward_passes, backward + found.backward_passes
        ranked = found.order.cpu()
        ranked = ranked[current.circuit.mask[ranked]]
        order.append(ranked[:excess])
        rest = ranked[excess:]
        removed = torch.zeros(len(units), dtype=torch.bool).index_fill(0, ranked[:excess], True)
        current = current.with_circuit(current.circuit - Circuit(units, removed))
    place = torch.empty(len(units), dtype=torch.float64)
    place[torch.cat([*order, rest])] = torch.arange(len(units), dtype=torch.float64)
    unknown = torch.full_like(place, float("nan"))
    return Scores(units, place, unknown, f"{name}, {rounds} rounds", "place in the order of removal", forward, backward)


def _without(
    model: Model, current: Reduction, examples: Examples, scorer: Callable[..., Scores], takes_size: bool
) -> Scores:
    """The scores in the model without what has been removed so far; of values of counterfactual inputs, which belong to
    their examples, batch by batch."""
    if not current.values.paired:
        with intervened(model, ablate(current)):
            return scorer(examples, current.units)
    size = scorer.keywords.pop("batch_size", None) if isinstance(scorer, partial) else None
    parts: list[tuple[int, Scores]] = []
    for index, batch in batches_of(model, examples, size):
        with intervened(model, removal(model, current, examples, index)):
            of_batch = {"batch_size": len(index)} if takes_size else {}
            parts.append((len(index), scorer(batch, current.units.for_examples(index, examples.spans), **of_batch)))
    total = sum(count * part.scores for count, part in parts) / len(examples)
    last = parts[-1][1]
    unknown = torch.full_like(last.scores, float("nan"))
    return replace(last, units=current.units, scores=total, stderr=unknown, forward_passes=last.forward_passes + 1)
