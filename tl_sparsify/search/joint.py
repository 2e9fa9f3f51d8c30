"""Search: from scores to a nested path of circuits.

``sparsify`` removes units in rounds. Each round linearises the model *with the units removed so far ablated*, picks
the next units jointly by predicted risk (the deviation already made stays in the sum), removes them, and goes on. Where
units outnumber samples, the expansion is shrunk (:mod:`shrinkage`), and a round that did much worse than it
predicted is taken back by half. Selecting happens on the training split, choosing a size on validation, reporting on
test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparsify._internal.progress import progress as bar
from tl_sparsify.core.circuit import Circuit, FirstToken, Values
from tl_sparsify.core.distributions import NONE, InterventionDistribution
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.measure import computed, remembering, risk
from tl_sparsify.core.metrics import Metric
from tl_sparsify.core.moments import Estimate, Moments
from tl_sparsify.core.probes import Samples, joint_moments, samples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model, Units
from tl_sparsify.search.constants import mean, reduced, refit
from tl_sparsify.search.linearisation import Linearisation, linearise_folds, merged
from tl_sparsify.search.path import CircuitPath, Round
from tl_sparsify.search.scores import kept_count
from tl_sparsify.search.selection import NO_SHRINKAGE, Shrinkage, after, greedy
from tl_sparsify.search.shrinkage import START, chosen

_FAR = 3.0  # times the predicted divergence: more than that, and half of the round is taken back
_MOST_ROUNDS = 10_000
_LEAST = 1e-3  # nats; below it no round is taken back


@dataclass(frozen=True)
class Probing:
    """How the divergence is probed, in the search only.

    Attributes:
        probes: for each example and round (:func:`probes.fisher_probes`).
        temperature: of the output, for the probes.

    Example:
        >>> tls.sparsify(model, train, units, sizes=(0.5,), probing=tls.Probing(probes=1), progress=False).at(0.5)
        Reduction(Circuit(6 of 12 units: 6 heads), mean values)
    """

    probes: int = 4
    temperature: float = 3.0


@dataclass(frozen=True)
class Refitting:
    """Whether constants are refitted after each round.

    Attributes:
        steps: of each refit, early-stopped on ``held_out``; where not given 20 with ``held_out`` (best at small sizes,
            ``benchmarks/variants.py``) and none without.
        per_step: examples in a step; ``None``: all of ``train``.

    Example:
        >>> few = tls.Refitting(steps=2)
        >>> tls.sparsify(model, train, units, sizes=(0.5,), held_out=validation, refitting=few, progress=False).at(0.5)
        Reduction(Circuit(6 of 12 units: 6 heads), refit values)
    """

    steps: int | None = None
    per_step: int | None = 512


@dataclass(frozen=True, eq=False)
class Constraints:
    """What a search has to respect.

    Attributes:
        always_keep: units that are never removed.
        costs: what each unit costs (:func:`units.parameters`); the schedule's fractions are then of the total cost,
            and ``path.within_budget`` gives a circuit for a budget.

    Example:
        >>> keep = tls.Constraints(always_keep=tls.Circuit.of(units, ["L2H3"]))
        >>> "L2H3" in tls.sparsify(model, train, units, sizes=(0.5,), constraints=keep, progress=False).at(0.5).circuit
        True
    """

    always_keep: Circuit | None = None
    costs: Float[Tensor, "units"] | None = None


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
    predict: bool | None = None,
    start: Reduction | None = None,
    first_token: FirstToken = "bos",
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> CircuitPath:
    """Find a nested path of circuits by joint second-order risk, in rounds.

    Args:
        rounds: a geometric schedule of this many rounds, from all units down to ``smallest`` of them.
        sizes: a schedule of your own instead: the fraction kept after each round, falling.
        values: what removed units are set to; their means over ``train`` where not given.
        held_out: where predicted and measured risk are taken; ``train`` where not given.
        metric: half its squared error instead of the KL divergence.
        interventions: what both models are under, in the search and where risk is measured.
        carry_deviation: a round also counts what the removals so far have changed, so that a unit which cancels
            that is removed first; without, it takes the ablated model for the original, which was better where
            constants are refitted at the end only (``benchmarks/variants.py``): the deviation is not what will be left.
        shrinkage: how much of the expansion is believed; where not given all of it in rounds with more samples than
            units to choose from, and else what predicts best on examples that the choice has not seen
            (:func:`shrinkage.chosen`: two halves of ``train``).
        predict: predict each round's risk at temperature 1, on the examples where it is measured; where not given
            only with ``held_out`` or a ``metric``: it costs as much as the search itself.
        start: go on from this reduction (of another path, say) instead of the whole model.
        first_token: at which first tokens removed units are left alone (:data:`circuit.FirstToken`).

    Returns:
        The path; the same one, bit for bit, for the same arguments on the same machine.

    Cost in passes over the data: per round one forward and ``probes + 1`` backward on ``train``, and as many again on
    the examples where risk is predicted; one forward for the means, one for the last measured risk (in every round
    where it is on other examples than all this), and one of the original model (in every round where its logits
    are more than 2**24 numbers). With ``interventions`` the measured risk takes two forward passes in every round, and
    each ``interchange`` two more a pass. A round that is taken back by half is made again: at most half as many rounds
    more.

    Raises:
        ValueError: a model in training mode, ``rounds`` below one, ``smallest`` or ``sizes`` outside (0, 1],
            units to be kept always that are more than the smallest size leaves, costs that are not positive.

    Example:
        >>> path = tls.sparsify(model, train, units, sizes=(0.75, 0.5), seed=0, progress=False)
        >>> path.at(0.5)
        Reduction(Circuit(6 of 12 units: 6 heads), mean values)
    """
    if not 1 <= rounds <= _MOST_ROUNDS:
        raise ValueError(f"rounds is {rounds}; at least one is needed, and at most {_MOST_ROUNDS:,}")
    always_keep, costs = constraints.always_keep, constraints.costs
    refit_steps = (0 if held_out is None else 20) if refitting.steps is None else refitting.steps
    if refit_steps and held_out is None:
        raise ValueError("refitting.steps needs held_out examples, on which the refit stops early")
    if start is not None and start.units != units:
        raise ValueError(f"start is a reduction over {start.units!r}, not over {units!r}")
    if always_keep is not None and always_keep.units != units:
        raise ValueError(f"always_keep is a circuit over {always_keep.units!r}, not over {units!r}")
    if costs is not None and (costs.shape != (len(units),) or not bool((costs > 0).all())):
        raise ValueError(f"costs must hold a positive number for each of the {len(units)} units")
    weight = torch.ones(len(units), dtype=torch.float64) if costs is None else costs.double().cpu()
    first = Circuit.full(units) if start is None else start.circuit
    whole = float(weight.sum())
    least = smallest if costs is not None else kept_count(len(units), smallest, "smallest") / len(units)
    fractions = schedule(rounds, least, sizes, float(weight[first.mask].sum()) / whole)
    targets = [kept_count(len(units), f) if costs is None else f * whole for f in fractions]
    held = 0.0 if always_keep is None else float(weight[always_keep.mask].sum())
    if always_keep is not None and targets and held > targets[-1]:
        raise ValueError(f"always_keep comes to {held:g}, the smallest size leaves {targets[-1]:g}: keep fewer")
    if start is None:
        values = mean(model, train, units, batch_size=batch_size) if values is None else values
        current = replace(reduced(model, first, values), first_token=first_token)
    else:
        current = start if values is None else replace(start, values=values)
    free = torch.ones(len(units), dtype=torch.bool) if always_keep is None else ~always_keep.mask
    judged = train if held_out is None else held_out
    predict = held_out is not None or metric is not None if predict is None else predict
    clean = interventions == NONE
    of_train = remembering() if clean else computed
    of_judged = of_train if held_out is None else remembering() if clean else computed
    drawn: dict[str, Any] = {"metric": metric, "interventions": interventions, "batch_size": batch_size}
    shared: dict[str, Any] = drawn | {"probes": probing.probes}
    unit = "nats" if metric is None else "squared units"
    seen = clean and (predict or held_out is None)  # the next round passes over the examples where risk is measured
    order: list[Tensor] = [(~first.mask).nonzero().flatten()]
    found: list[Round] = []
    sketch: Linearisation | None = None
    believed, promised = START if shrinkage is None else shrinkage, float("inf")
    number, spare = 0, rounds // 2  # linearisations made, and those that may be made again
    for target in bar(targets, "removing units", progress):
        pending = [target]
        while pending:
            excess = float(weight[current.circuit.mask].sum()) - pending[0]
            if excess <= 0:
                pending.pop(0)
                continue
            before = current if len(current.circuit) < len(units) else None
            here: dict[str, Any] = shared | {"current": before, "seed": seed + number}
            made: list[Moments] = []  # of the divergence that the removals before this round have made
            parts = samples(model, train, current, temperature=probing.temperature, recall=of_train, **here)
            halves = linearise_folds(parts if predict else _noting(parts, made), len(train), seed=seed + number)
            if not carry_deviation:
                halves = tuple(replace(half, linear=torch.zeros_like(half.linear), deviation=None) for half in halves)
            sketch, number = merged(halves), number + 1
            if found and spare > 0 and sketch.offset > max(_LEAST, _FAR * promised) and len(order[-1]) > 1:
                reached = float(weight[current.circuit.mask].sum())
                half = len(order[-1]) // 2
                mask = current.circuit.mask.index_fill(0, order[-1][half:], True)
                current, order[-1] = current.with_circuit(Circuit(units, mask)), order[-1][:half]
                found.pop()
                pending, spare, promised = [reached, *pending], spare - 1, float("inf")
                continue
            candidates = current.circuit.mask & free
            if shrinkage is not None:
                believed = shrinkage
            elif sketch.samples >= int(candidates.sum()):
                believed, promised = NO_SHRINKAGE, float("inf")
            else:
                near = START if believed == NO_SHRINKAGE else believed
                believed, promised = chosen(halves, candidates, excess, near=near, slopes=number % 2 == 0, costs=costs)
            picks = greedy(sketch, candidates, excess, shrinkage=believed, costs=costs)
            removed = torch.zeros(len(units), dtype=torch.bool).index_fill(0, picks, True)
            predicted, additivity = Estimate(float("nan"), float("nan"), len(judged), unit), float("nan")
            if predict:
                parts = samples(model, judged, current, temperature=1.0, recall=of_judged, **here)
                predicted, additivity = _predicted(_noting(parts, made), removed, len(judged), unit)
            if found and seen and found[-1].reduction.circuit == current.circuit:  # not after half was taken back
                found[-1] = replace(found[-1], measured=Estimate.of(Moments.merge(made), unit))
            current = current.with_circuit(current.circuit - Circuit(units, removed))
            if refit_steps:
                settings = {"steps": refit_steps, "metric": metric, "interventions": interventions, "seed": seed}
                settings |= {"per_step": refitting.per_step, "batch_size": batch_size}
                current = refit(model, current, train, judged, progress=False, **settings)
            measured = predicted if seen else risk(model, current, judged, seed=seed, **drawn)
            order.append(picks)
            found.append(Round(current, predicted, measured, additivity))
            pending.pop(0)
    if sketch is None:
        raise ValueError(f"smallest={smallest} removes none of the {len(units)} units: choose a smaller one")
    if seen:
        found[-1] = replace(found[-1], measured=risk(model, current, judged, seed=seed, **drawn))
    alive = current.circuit.mask & free
    rest = greedy(after(sketch, order[-1], believed), alive, float("inf"), shrinkage=believed, costs=costs)
    order += [rest, (current.circuit.mask & ~free).nonzero().flatten()]
    return CircuitPath(units, torch.cat(order), tuple(found), costs)


def schedule(rounds: int, smallest: float, sizes: Sequence[float] | None, start: float) -> list[float]:
    """The fractions kept after each round."""
    kept_count(1, smallest, "smallest")
    if sizes is None:
        return [start * (smallest / start) ** (i / rounds) for i in range(1, rounds + 1)]
    for size in sizes:
        kept_count(1, size, "sizes")
    if not sizes or list(sizes) != sorted(sizes, reverse=True):
        raise ValueError(f"sizes is {list(sizes)}; it must name falling fractions")
    return list(sizes)


def _noting(parts: Iterator[Samples], made: list[Moments]) -> Iterator[Samples]:
    """The same samples; notes the divergence already made on the way."""
    for part in parts:
        made.append(Moments.of(part.made.double()))
        yield part


def _predicted(parts: Iterator[Samples], removed: Bool[Tensor, "units"], n: int, unit: str) -> tuple[Estimate, float]:
    """The predicted joint risk after the removals, and how far their own part of it is from a sum over units."""
    made, alone = 0.0, 0.0

    def watched() -> Iterator[Samples]:
        nonlocal made, alone
        for part in parts:
            made += float(part.offset.double().sum()) / n
            each = part.linear.double() + part.effects.double().square().sum(0) / 2
            alone += float(each[:, removed.to(each.device)].sum()) / n
            yield part

    total = joint_moments(watched(), removed)
    joint = float(total.mean) - made
    found = Estimate.of(total, unit)
    found = replace(found, mean=max(0.0, found.mean))  # a divergence is never negative
    return found, (joint - alone) / joint if joint else 0.0
