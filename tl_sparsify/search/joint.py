"""Search: from scores to a nested path of circuits.

``sparsify`` removes units in rounds. Each round linearises the model *with the units removed so far ablated*, picks
the next units jointly by predicted risk (the deviation already made stays in the sum), removes them, and goes on.
Selecting happens on the training split, choosing a size on validation, reporting on test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal.progress import progress as bar
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.distributions import NONE, InterventionDistribution
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.measure import computed, remembering, risk
from tl_sparsify.core.metrics import Metric
from tl_sparsify.core.moments import Estimate, Moments
from tl_sparsify.core.probes import Linearisation, Samples, joint_moments, linearise, samples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model, Units
from tl_sparsify.search.constants import mean, reduced, refit
from tl_sparsify.search.path import CircuitPath, Round
from tl_sparsify.search.scores import kept_count

__all__ = ["CircuitPath", "Round", "greedy", "sparsify"]

_POOL = 2048


def greedy(
    linearisation: Linearisation,
    candidates: Bool[Tensor, "units"],
    count: int | float,
    *,
    costs: Float[Tensor, "units"] | None = None,
    pool: int = _POOL,
) -> Int[Tensor, "some"]:
    """Remove ``count`` of the candidates one at a time, each time the unit whose removal leaves the least joint risk
    ``1/2 |b + sum a|^2``; returns them in order. No model pass.

    With ``costs`` the unit that raises the risk least for what it saves, until ``count`` in cost is saved.

    Up to ``pool`` candidates this is exact. Beyond, the ``pool`` cheapest are gathered, a quarter of them is picked
    one at a time with their interactions exact, and the pool is gathered anew.

    Cost: ``O(rows * units)`` a pool and ``O(pool)`` a pick.
    """
    matrix = linearisation.matrix
    residual = matrix.new_zeros(len(matrix))
    alone = matrix.square().sum(0) / 2 + linearisation.linear
    alive = candidates.to(matrix.device).clone()
    worth = None if costs is None else costs.to(matrix)
    picked: list[Tensor] = []
    left = float(count)
    while left > 0 and bool(alive.any()):
        rise = alone + residual @ matrix
        rank = torch.where(alive, rise if worth is None else _by_cost(rise, worth), float("inf"))
        here = rank.argsort(stable=True)[: min(pool, int(alive.sum()))].sort().values
        quota = len(here) if len(here) < pool else max(1, pool // 4)
        some = None if worth is None else worth[here]
        chosen = here[_greedy_exact(matrix[:, here], rise[here], some, quota, left)]
        alive[chosen] = False
        residual = residual + matrix[:, chosen].sum(1)
        picked.append(chosen.cpu())
        left -= len(chosen) if worth is None else float(worth[chosen].double().sum())
    return torch.cat(picked) if picked else torch.zeros(0, dtype=torch.long)


def _by_cost(rise: Float[Tensor, "some"], costs: Float[Tensor, "some"]) -> Float[Tensor, "some"]:
    """What removing a unit raises the risk by, for each unit of cost that it saves; a fall counts for as much more."""
    return torch.where(rise > 0, rise / costs, rise * costs)


def _greedy_exact(
    matrix: Float[Tensor, "rows some"],
    rise: Float[Tensor, "some"],
    costs: Float[Tensor, "some"] | None,
    quota: int,
    target: float,
) -> Int[Tensor, "picked"]:
    """One at a time, up to ``quota`` units or ``target`` in cost; the ``rise`` of a unit changes by its interaction
    with every unit picked."""
    interactions = matrix.T @ matrix
    rise = rise.clone()
    picks = torch.empty(quota, dtype=torch.long, device=rise.device)
    saved, i = 0.0, 0
    while i < quota and saved < target:
        pick = (rise if costs is None else _by_cost(rise, costs)).argmin()
        picks[i] = pick
        rise += interactions[pick]
        rise[pick] = float("inf")
        saved += 1.0 if costs is None else float(costs[pick])
        i += 1
    return picks[:i]


def sparsify(
    model: Model,
    train: Examples,
    units: Units,
    *,
    rounds: int = 20,
    smallest: float = 0.01,
    sizes: Sequence[float] | None = None,
    probes: int = 4,
    temperature: float = 3.0,
    values: Values | None = None,
    held_out: Examples | None = None,
    metric: Metric | None = None,
    interventions: InterventionDistribution = NONE,
    refit_steps: int | None = None,
    deviation: Literal["pinned", "forgotten"] = "pinned",
    predict: bool | None = None,
    pinned: Circuit | None = None,
    costs: Float[Tensor, "units"] | None = None,
    start: Reduction | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> CircuitPath:
    """Find a nested path of circuits by joint second-order risk, in rounds.

    Args:
        rounds: a geometric schedule of this many rounds, from all units down to ``smallest`` of them.
        sizes: a schedule of your own instead: the fraction kept after each round, falling.
        probes, temperature: see :func:`probes.fisher_probes`; the temperature is for selecting only.
        values: what removed units are set to; their means over ``train`` where not given.
        held_out: where predicted and measured risk are taken; ``train`` where not given.
        metric: half its squared error instead of the KL divergence.
        interventions: what both models are under, in the search and where risk is measured.
        refit_steps: refit the constants by this many steps after each round, early-stopped on ``held_out``; where not
            given 20 with ``held_out`` (best at small sizes, ``benchmarks/variants.py``) and none without.
        deviation: ``pinned``: a round also counts what the removals so far have changed, so that a unit which cancels
            that is removed first; ``forgotten``: it takes the ablated model for the original, which was better where
            constants are refitted at the end only (``benchmarks/variants.py``): the deviation is not what will be left.
        predict: predict each round's risk at temperature 1, on the examples where it is measured; where not given
            only with ``held_out`` or a ``metric``: it costs as much as the search itself.
        pinned: units that are never removed.
        costs: what each unit costs (:func:`units.parameters`); the schedule's fractions are then of the total cost,
            and ``path.within_budget`` gives a circuit for a budget.
        start: go on from this reduction (of another path, say) instead of the whole model.

    Returns:
        The path; the same one, bit for bit, for the same arguments on the same machine.

    Cost in passes over the data: per round one forward and ``probes + 1`` backward on ``train``, and as many again on
    the examples where risk is predicted; one forward for the means, one for the last measured risk (in every round
    where it is on other examples than all this), and one of the original model (in every round where its logits
    are more than 2**24 numbers). With ``interventions`` the measured risk takes two forward passes in every round, and
    each ``interchange`` two more a pass.

    Raises:
        ValueError: a model in training mode, ``rounds`` below one, ``smallest`` or ``sizes`` outside (0, 1], pinned
            units that are more than the smallest size leaves, costs that are not positive, an unknown ``deviation``.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least one is needed")
    if deviation not in ("pinned", "forgotten"):
        raise ValueError(f"deviation is {deviation!r}; it is pinned or forgotten")
    refit_steps = (0 if held_out is None else 20) if refit_steps is None else refit_steps
    if refit_steps and held_out is None:
        raise ValueError("refit_steps needs held_out examples, on which the refit stops early")
    if start is not None and start.units != units:
        raise ValueError(f"start is a reduction over {start.units!r}, not over {units!r}")
    if pinned is not None and pinned.units != units:
        raise ValueError(f"pinned is a circuit over {pinned.units!r}, not over {units!r}")
    if costs is not None and (costs.shape != (len(units),) or not bool((costs > 0).all())):
        raise ValueError(f"costs must hold a positive number for each of the {len(units)} units")
    weight = torch.ones(len(units), dtype=torch.float64) if costs is None else costs.double().cpu()
    first = Circuit.full(units) if start is None else start.circuit
    whole = float(weight.sum())
    least = smallest if costs is not None else kept_count(len(units), smallest, "smallest") / len(units)
    fractions = schedule(rounds, least, sizes, float(weight[first.mask].sum()) / whole)
    targets = [kept_count(len(units), f) if costs is None else f * whole for f in fractions]
    held = 0.0 if pinned is None else float(weight[pinned.mask].sum())
    if pinned is not None and targets and held > targets[-1]:
        raise ValueError(f"pinned units come to {held:g}, the smallest size leaves {targets[-1]:g}: pin fewer")
    if start is None:
        values = mean(model, train, units, batch_size=batch_size) if values is None else values
        current = reduced(model, first, values)
    else:
        current = start if values is None else replace(start, values=values)
    free = torch.ones(len(units), dtype=torch.bool) if pinned is None else ~pinned.mask
    judged = train if held_out is None else held_out
    predict = held_out is not None or metric is not None if predict is None else predict
    clean = interventions == NONE
    of_train = remembering() if clean else computed
    of_judged = of_train if held_out is None else remembering() if clean else computed
    drawn: dict[str, Any] = {"metric": metric, "interventions": interventions, "batch_size": batch_size}
    shared: dict[str, Any] = drawn | {"probes": probes}
    unit = "nats" if metric is None else "squared units"
    seen = clean and (predict or held_out is None)  # the next round passes over the examples where risk is measured
    order: list[Tensor] = [(~first.mask).nonzero().flatten()]
    found: list[Round] = []
    sketch: Linearisation | None = None
    for number, target in enumerate(bar(targets, "removing units", progress)):
        excess = float(weight[current.circuit.mask].sum()) - target
        if excess <= 0:
            continue
        before = current if len(current.circuit) < len(units) else None
        here: dict[str, Any] = shared | {"current": before, "seed": seed + number}
        made: list[Moments] = []  # of the divergence that the removals before this round have made
        parts = samples(model, train, current, temperature=temperature, recall=of_train, **here)
        sketch = linearise(parts if predict else _noting(parts, made), len(train), seed=seed + number)
        if deviation == "forgotten":
            sketch = replace(sketch, linear=torch.zeros_like(sketch.linear))
        picks = greedy(sketch, current.circuit.mask & free, excess, costs=costs)
        removed = torch.zeros(len(units), dtype=torch.bool).index_fill(0, picks, True)
        predicted, additivity = Estimate(float("nan"), float("nan"), len(judged), unit), float("nan")
        if predict:
            parts = samples(model, judged, current, temperature=1.0, recall=of_judged, **here)
            predicted, additivity = _predicted(_noting(parts, made), removed, len(judged), unit)
        if found and seen:
            found[-1] = replace(found[-1], measured=Estimate.of(Moments.merge(made), unit))
        current = current.with_circuit(current.circuit - Circuit(units, removed))
        if refit_steps:
            settings = {"steps": refit_steps, "metric": metric, "interventions": interventions, "seed": seed}
            current = refit(model, current, train, judged, progress=False, **settings)
        measured = predicted if seen else risk(model, current, judged, seed=seed, **drawn)
        order.append(picks)
        found.append(Round(current, predicted, measured, additivity))
    if sketch is None:
        raise ValueError(f"smallest={smallest} removes none of the {len(units)} units: choose a smaller one")
    if seen:
        found[-1] = replace(found[-1], measured=risk(model, current, judged, seed=seed, **drawn))
    alive = current.circuit.mask & free
    rest = greedy(_after(sketch, order[-1]), alive, float("inf"), costs=costs)
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


def _after(linearisation: Linearisation, picks: Int[Tensor, "some"]) -> Linearisation:
    moved = linearisation.matrix[:, picks.to(linearisation.matrix.device)].sum(1) @ linearisation.matrix
    return replace(linearisation, linear=linearisation.linear + moved)


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
    return Estimate.of(total, unit), (joint - alone) / joint if joint else 0.0
