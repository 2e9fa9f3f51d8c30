"""Search: from scores to a nested path of circuits.

``sparsify`` removes units in rounds. Each round linearises the model *with the units removed so far ablated*, picks
the next units jointly by predicted risk (the deviation already made stays in the sum), removes them, and goes on. The
expansion is shrunk by as much as predicts unseen samples best (:mod:`shrinkage`), a round that did much worse than it
predicted is taken back by half, and rounds of exchanges put right what removals got wrong: a few units come back and as
many leave. Selecting happens on the training split, choosing a size on validation, reporting on test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.ranks import agreed
from tl_sparsify.core.circuit import Circuit, FirstToken, Values
from tl_sparsify.core.distributions import NONE, InterventionDistribution
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import check_held_out
from tl_sparsify.core.measure import Known, computed, known_of, remembering, risk
from tl_sparsify.core.metrics import Metric
from tl_sparsify.core.moments import Estimate, Moments
from tl_sparsify.core.probes import samples
from tl_sparsify.core.reduction import Reduction, check_fingerprint, check_saved, fingerprint
from tl_sparsify.core.units import Model, Units
from tl_sparsify.expansion.linearisation import noting, predicted_change
from tl_sparsify.expansion.selection import ROUNDING, Shrinkage
from tl_sparsify.search.checkpoint import State, describe, read, write
from tl_sparsify.search.constants import mean, reduced
from tl_sparsify.search.path import CircuitPath
from tl_sparsify.search.refitting import refit
from tl_sparsify.search.rounds import Change, Measure, Search, all_rounds, expanding, path_of, starting
from tl_sparsify.search.scores import check_sizes, kept_count
from tl_sparsify.search.settings import Constraints, Probing, Refitting

_MOST_ROUNDS = 10_000


@checked
def sparsify(
    model: Model,
    train: Examples,
    units: Units,
    *,
    rounds: int = 20,
    smallest: float = 0.01,
    sizes: Sequence[float] | None = None,
    probing: Probing = Probing(),
    refitting: Refitting = Refitting(),
    constraints: Constraints = Constraints(),
    values: Values | None = None,
    held_out: Examples | None = None,
    metric: Metric | None = None,
    interventions: InterventionDistribution = NONE,
    carry_deviation: bool = True,
    shrinkage: Shrinkage | None = None,
    exchanges: int | None = None,
    predict: bool | None = None,
    start: Reduction | None = None,
    first_token: FirstToken = "bos",
    checkpoint: str | Path | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> CircuitPath:
    """Find a nested path of circuits by joint second-order risk, in rounds.

    Args:
        rounds: a geometric schedule of this many rounds, from all units down to ``smallest`` of them.
        sizes: a schedule of your own instead: the fraction kept after each round, falling.
        values: what removed units are set to; their means over ``train`` where not given;
            :func:`constants.counterfactual`: their values on each example's counterfactual input.
        held_out: where predicted and measured risk are taken; ``train`` where not given.
        metric: half its squared error instead of the KL divergence.
        interventions: what both models are under, in the search and where risk is measured.
        carry_deviation: a round also counts what the removals so far have changed, so that a unit which cancels
            that is removed first; without, it takes the ablated model for the original, which was better where
            constants are refitted at the end only (``benchmarks/variants.py``): the deviation is not what will be left.
        shrinkage: how much of the expansion is believed; where not given, in each round what predicts best on examples
            that the choice has not seen (:func:`shrinkage.chosen`: two halves of ``train``), starting from all of it
            where samples outnumber units.
        exchanges: rounds that may be made again at a size, at most: with half of what the last one removed taken back,
            where that did much worse than predicted; or as an exchange of a few kept units for as many removed ones,
            where that promises enough on examples that the choice has not seen. Half of ``rounds`` where not given;
            none with a ``shrinkage`` of your own, which promises nothing.
        predict: predict each round's risk at temperature 1, on the examples where it is measured; where not given
            only with ``held_out`` or a ``metric``: it costs as much as the search itself.
        start: go on from this reduction of constants (of another path, say) instead of the whole model; its own first
            tokens are left alone.
        first_token: at which first tokens removed units are left alone (:data:`circuit.FirstToken`).
        checkpoint: a folder into which the search is written after every round. The same call goes on from what is
            there, and returns the same path bit for bit; one with other arguments is refused.

    Returns:
        The path; the same one, bit for bit, for the same arguments on the same machine.

    Cost in passes over the data: per round one forward and ``probes`` backward (fewer where fewer are exact: one with
    two answers; a single probe of more answers takes two) on ``train``, and as many again on the examples where risk is
    predicted; one forward for the means, one for the last measured risk (in every round where it is on other examples
    than all this), and one of the original model (in every round where its logits are more than 2**24 numbers). With
    ``interventions`` the measured risk takes two forward passes in every round, and each ``interchange`` two more a
    pass. Rounds that are made again come on top, at most ``exchanges`` of them, and for each round whose circuit lacks
    a unit that was taken back later one forward pass. A round that did worse than the next smaller one, by more than
    its standard error, is grown from that one, for a round's passes and two measured risks (not with ``costs``, nor
    with a ``shrinkage`` of your own). With ``probing.examples`` a pass of a round is over so many examples, and risk,
    where it is not measured on others, is on those of the next round, of the smallest circuit on the last round's: to
    compare rounds measure them again, on the same examples.

    Raises:
        ValueError: a model in training mode, ``rounds`` below one, ``smallest`` or ``sizes`` outside (0, 1],
            ``exchanges`` below zero, units to be kept always that are more than the smallest size leaves, costs that
            are not positive; a ``start`` of another model, with affine replacements, or without a unit that is to be
            kept always; positions of another number of examples; with ``checkpoint`` units that cannot be saved.

    Example:
        >>> path = tls.sparsify(model, train, units, sizes=(0.75, 0.5), seed=0, progress=False)
        >>> path.at(0.5)
        Reduction(Circuit(6 of 12 units: 6 heads), mean values)
    """
    if not 1 <= rounds <= _MOST_ROUNDS:
        raise ValueError(f"rounds is {rounds}; at least one is needed, and at most {_MOST_ROUNDS:,}")
    if exchanges is not None and exchanges < 0:
        raise ValueError(f"exchanges is {exchanges}; it must not be negative: 0 makes no round again")
    refit_steps = (0 if held_out is None else 20) if refitting.steps is None else refitting.steps
    if refit_steps and held_out is None:
        raise ValueError("refitting.steps needs held_out examples, on which the refit stops early")
    if checkpoint is not None:
        check_saved(units)
    if start is not None:
        _check_start(model, start, units, constraints.always_keep)
    first = Circuit.full(units) if start is None else start.circuit
    weight = _weights(units, constraints)
    targets = _targets(first, weight, constraints, rounds, smallest, sizes)
    if start is None:
        values = mean(model, train, units, batch_size=batch_size) if values is None else values
        current = replace(reduced(model, first, values), first_token=first_token)
    else:
        current = start if values is None else replace(start, values=values)
    if current.values.paired and refit_steps:
        if refitting.steps is not None:
            raise ValueError(f"refitting.steps is {refit_steps}, and values are no constants to be refitted: give 0")
        refit_steps = 0
    judged = train if held_out is None else held_out
    check_held_out(units, held_out, train)
    predict = held_out is not None or metric is not None if predict is None else predict
    clean = interventions == NONE
    shared: dict[str, Any] = {"metric": metric, "interventions": interventions, "batch_size": batch_size}
    of_train = remembering() if clean else computed
    of_judged = of_train if held_out is None else remembering() if clean else computed
    most = rounds // 2 if exchanges is None else exchanges

    def foretold(here: Reduction, change: Change, number: int) -> tuple[Estimate, float, Moments]:
        made: list[Moments] = []
        given = {"current": None if len(here.circuit) == len(units) else here, "restorable": True}
        given |= {"probes": probing.probes, "seed": seed + number, "recall": of_judged}
        parts = samples(model, judged, here, temperature=1.0, **given, **shared)
        estimate, additivity = predicted_change(noting(parts, made), *change, len(judged), unit)
        return estimate, additivity, Moments.over(made, len(judged))

    def measuring(index: Int[Tensor, "some"] | None) -> Measure:
        recall = of_judged if index is None else remembering()
        examples = judged if index is None else judged[index]

        def measured(reduction: Reduction) -> Estimate:
            here = reduction if index is None else reduction.for_examples(index)
            return risk(model, here, examples, seed=seed, recall=recall, **shared)

        return measured

    @cache
    def known() -> Known:
        many = refit_steps * min(refitting.per_step or len(train), len(train)) > len(train)
        return known_of(model, train, units, clean=clean, many=many, batch_size=batch_size)

    def refitted(reduction: Reduction) -> Reduction:
        settings: dict[str, Any] = {"steps": refit_steps, "per_step": refitting.per_step, "seed": seed, **shared}
        return refit(model, reduction, train, judged, known=known(), progress=False, **settings)

    unit = "nats" if metric is None else "squared units"
    always_keep = constraints.always_keep
    search = Search(
        units=units,
        first=first,
        targets=targets,
        free=Circuit.full(units).mask if always_keep is None else ~always_keep.mask,
        weight=weight,
        costs=constraints.costs,
        shrinkage=shrinkage,
        most=most,
        unknown=Estimate(float("nan"), float("nan"), len(judged), unit),
        seen=clean and (predict or held_out is None),
        expand=expanding(model, train, probing, carry_deviation, seed, of_train, shared),
        foretell=foretold if predict else None,
        measuring=measuring,
        refit=refitted if refit_steps else None,
    )
    state = starting(search, current)
    described: dict[str, str] = {}
    if checkpoint is not None:
        given: dict[str, Any] = {"model": fingerprint(model), "train": train, "units": units, "sizes": list(targets)}
        given |= {"probing": probing, "refitting": refitting, "constraints": constraints, "start": current}
        given |= {"held_out": held_out, "metric": metric, "interventions": interventions, "shrinkage": shrinkage}
        given |= {"carry_deviation": carry_deviation, "exchanges": most, "predict": predict, "seed": seed}
        described = describe(given)
        with agreed("reading the search"):
            state = read(Path(checkpoint), described, units) or state

    def saved(now: State) -> State:
        if checkpoint is not None:
            write(Path(checkpoint), described, now)
        return now

    state, expansion = all_rounds(search, state, saved, progress)
    if expansion is None and state.found:  # all rounds were there already
        expansion = search.expand(state.before, state.number - 1)
    if expansion is None:
        given_sizes = f"smallest={smallest}" if sizes is None else f"sizes={list(sizes)}"
        raise ValueError(f"{given_sizes} removes none of the {len(units)} units: choose a smaller one")
    return path_of(search, state, expansion)


def _check_start(model: Model, start: Reduction, units: Units, always_keep: Circuit | None) -> None:
    """Refuse a reduction that a search over these units of the model cannot go on from."""
    if start.units != units:
        raise ValueError(f"start is a reduction over {start.units!r}, not over {units!r}")
    check_fingerprint(model, start)
    if start.mixing is not None:
        raise ValueError("start has affine replacements, made for its circuit only: go on from one of constants")
    if always_keep is not None and not always_keep <= start.circuit:
        missing = always_keep - start.circuit
        raise ValueError(f"always_keep has {missing.names[0]}, which start has removed already: keep what it keeps")


def _weights(units: Units, constraints: Constraints) -> Float[Tensor, "units"]:
    """What each unit counts for: 1, or what it costs."""
    always_keep, costs = constraints.always_keep, constraints.costs
    if always_keep is not None and always_keep.units != units:
        raise ValueError(f"always_keep is a circuit over {always_keep.units!r}, not over {units!r}")
    if costs is None:
        return torch.ones(len(units), dtype=torch.float64)
    if costs.shape != (len(units),) or not bool(((costs > 0) & costs.isfinite()).all()):
        raise ValueError(f"costs must hold a positive number for each of the {len(units)} units")
    return costs.double().cpu()


def _targets(
    first: Circuit,
    weight: Float[Tensor, "units"],
    constraints: Constraints,
    rounds: int,
    smallest: float,
    sizes: Sequence[float] | None,
) -> tuple[int | float, ...]:
    """What each round leaves, in units or in what they cost."""
    n, whole, by_cost = len(first.units), float(weight.sum()), constraints.costs is not None
    least = smallest if by_cost else kept_count(n, smallest, "smallest") / n
    fractions = schedule(rounds, least, sizes, float(weight[first.mask].sum()) / whole)
    targets = tuple(f * whole if by_cost else kept_count(n, f) for f in fractions)
    if constraints.always_keep is not None:
        held = float(weight[constraints.always_keep.mask].sum())
        if held > targets[-1] * (1 + ROUNDING):
            raise ValueError(f"always_keep comes to {held:g}, the smallest size leaves {targets[-1]:g}: keep fewer")
    return targets


@checked
def schedule(rounds: int, smallest: float, sizes: Sequence[float] | None, start: float) -> list[float]:
    """The fractions kept after each round."""
    kept_count(1, smallest, "smallest")
    if sizes is None:
        return [start * (smallest / start) ** (i / rounds) for i in range(1, rounds + 1)]
    check_sizes(sizes)
    return list(sizes)
