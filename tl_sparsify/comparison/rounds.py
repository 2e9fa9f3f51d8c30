"""Any scorer in rounds: score, remove the lowest units, score again in the model without them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
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
            scorer removes units to, if it takes constants. With :func:`constants.counterfactual`, and for units at
            spans or at a position for each example, the scorer sees a batch at a time, and a score is the mean over
            batches; what it draws at random, and means that it takes itself, then depend on them.
        settings: go to the scorer.

    The passes of the scorer in each round that removes a unit; one forward pass for the means where not given.

    Raises:
        ValueError: ``rounds`` below one, ``smallest`` outside (0, 1] or too large to remove any unit, and what the
            scorer raises.

    Example:
        >>> tls.baselines.in_rounds(tls.score.variance, model, train, units, rounds=3, progress=False).top(0.25)
        Circuit(3 of 12 units: 3 heads)
    """
    check_call(model, examples, units, seed=seed)
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
    if "values" in takes and (run == "constant" or (run is None and given)):
        settings["values"] = values
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
        found = _without(scorer, model, current, examples, settings | {"seed": seed + number})
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
    scorer: Callable[..., Scores], model: Model, current: Reduction, examples: Examples, settings: dict[str, Any]
) -> Scores:
    """The scores in the model without what has been removed so far. Batch by batch where that belongs to examples: of
    values of counterfactual inputs, and of units at other positions in each example."""
    paired = current.values.paired
    if not paired and not current.units.placed_by_example:
        with intervened(model, ablate(current)):
            return scorer(model, examples, current.units, **settings)
    takes_size = "batch_size" in inspect.signature(scorer).parameters
    parts: list[tuple[int, Scores]] = []
    for index, batch in batches_of(model, examples, settings.get("batch_size")):
        here = current.for_examples(index, examples.spans)
        of_batch = {name: value for name, value in settings.items() if name != "batch_size"}
        of_batch |= {"values": here.values} if "values" in settings else {}
        of_batch |= {"batch_size": len(index)} if takes_size else {}
        with intervened(model, removal(model, current, examples, index)):
            parts.append((len(index), scorer(model, batch, here.units, **of_batch)))
    total = sum(count * part.scores for count, part in parts) / len(examples)
    last = parts[-1][1]
    unknown = torch.full_like(last.scores, float("nan"))
    other_run = int(paired and not bool(current.circuit.mask.all()))  # it is run where something is removed
    forward = last.forward_passes + other_run
    return replace(last, units=current.units, scores=total, stderr=unknown, forward_passes=forward)
