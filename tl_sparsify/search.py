"""Search: from scores to a nested path of circuits.

``sparsify`` removes units in rounds. Each round linearises the model *with the units removed so far ablated*, picks
the next units jointly by predicted risk (the deviation already made stays in the sum), removes them, and goes on.
Selecting happens on the training split, choosing a size on validation, reporting on test.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._progress import progress as bar
from tl_sparsify.circuit import Circuit, Reduction, Values, fingerprint
from tl_sparsify.constants import mean, refit
from tl_sparsify.examples import Examples
from tl_sparsify.measure import Metric, risk
from tl_sparsify.moments import Estimate
from tl_sparsify.probes import Linearisation, joint_moments, linearise, samples
from tl_sparsify.score import kept_count
from tl_sparsify.units import Model, Units

_POOL = 2048


@dataclass(frozen=True)
class Round:
    """One step of a path.

    Attributes:
        reduction: the circuit after the round.
        predicted: its second-order joint risk, linearised before the round's removals (nats, temperature 1).
        measured: its risk (nats), on the same examples.
        additivity: ``(R_joint - sum of R_u) / R_joint`` of the round's removals by prediction; far from 0, no
            one-unit score can be trusted.
    """

    reduction: Reduction
    predicted: Estimate
    measured: Estimate
    additivity: float


@dataclass(frozen=True)
class Path:
    """A nested family of circuits: ``path.at(fraction)`` for any size, the rounds in ``path.rounds``.

    Attributes:
        units: all units.
        order: unit indices in order of removal; the last is kept longest.
        rounds: from the largest circuit to the smallest.
    """

    units: Units
    order: Int[Tensor, "units"]
    rounds: tuple[Round, ...]

    def at(self, fraction: float) -> Reduction:
        """The reduction that keeps ``fraction`` of the units (at least one).

        Raises:
            ValueError: a fraction outside (0, 1].
        """
        count = kept_count(len(self.units), fraction)
        mask = torch.zeros(len(self.units), dtype=torch.bool)
        mask[self.order[len(self.units) - count :]] = True
        larger = [r for r in self.rounds if len(r.reduction.circuit) >= count]
        return (larger[-1] if larger else self.rounds[0]).reduction.with_circuit(Circuit(self.units, mask))

    def within(self, model: Model, validation: Examples, nats: float) -> Reduction:
        """The smallest round whose measured risk on ``validation`` is at most ``nats``; one risk for each round
        tried, from the smallest.

        Raises:
            ValueError: no round is within ``nats``.
        """
        lowest = float("inf")
        for step in reversed(self.rounds):
            found = risk(model, step.reduction, validation).mean
            lowest = min(lowest, found)
            if found <= nats:
                return step.reduction
        raise ValueError(f"no circuit of the path is within {nats} nats; the lowest risk is {lowest:.4g}")

    def to_frame(self) -> pd.DataFrame:
        """One row a round: ``kept, fraction, predicted, predicted_stderr, measured, measured_stderr, additivity``."""
        return pd.DataFrame(
            [
                {
                    "kept": len(r.reduction.circuit),
                    "fraction": r.reduction.circuit.fraction,
                    "predicted": r.predicted.mean,
                    "predicted_stderr": r.predicted.stderr,
                    "measured": r.measured.mean,
                    "measured_stderr": r.measured.stderr,
                    "additivity": r.additivity,
                }
                for r in self.rounds
            ]
        )

    def __repr__(self) -> str:
        last = self.rounds[-1]
        return (
            f"Path({len(self.rounds)} rounds, {len(self.units):,} to {len(last.reduction.circuit):,} units, "
            f"risk at the end {last.measured!r})"
        )


def greedy(
    linearisation: Linearisation, candidates: Bool[Tensor, "units"], count: int, *, pool: int = _POOL
) -> Int[Tensor, "count"]:
    """Remove ``count`` of the candidates one at a time, each time the unit whose removal leaves the least joint risk
    ``1/2 |b + sum a|^2``; returns them in order. No model pass.

    Up to ``pool`` candidates this is exact. Beyond, the ``pool`` cheapest are gathered, a quarter of them is picked
    one at a time with their interactions exact, and the pool is gathered anew.

    Cost: ``O(rows * units)`` a pool and ``O(pool)`` a pick.
    """
    matrix = linearisation.matrix
    residual = matrix.new_zeros(len(matrix))
    alone = matrix.square().sum(0) / 2 + linearisation.linear
    alive = candidates.to(matrix.device).clone()
    picked: list[Tensor] = []
    left = count
    while left > 0:
        cost = torch.where(alive, alone + residual @ matrix, float("inf"))
        here = cost.argsort(stable=True)[: min(pool, int(alive.sum()))].sort().values
        quota = min(left, len(here) if len(here) < pool else max(1, pool // 4))
        chosen = here[_greedy_exact(matrix[:, here], cost[here], quota)]
        alive[chosen] = False
        residual = residual + matrix[:, chosen].sum(1)
        picked.append(chosen.cpu())
        left -= quota
    return torch.cat(picked) if picked else torch.zeros(0, dtype=torch.long)


def _greedy_exact(matrix: Float[Tensor, "rows some"], cost: Float[Tensor, "some"], quota: int) -> Int[Tensor, "quota"]:
    """One at a time; ``cost`` of a unit grows by its interaction with every unit picked."""
    interactions = matrix.T @ matrix
    cost = cost.clone()
    picks = torch.empty(quota, dtype=torch.long, device=cost.device)
    for i in range(quota):
        pick = cost.argmin()
        picks[i] = pick
        cost += interactions[pick]
        cost[pick] = float("inf")
    return picks


def schedule(n: int, smallest: float, rounds: int) -> list[int]:
    """Numbers of units kept after each round: geometric from ``n`` down to ``smallest * n``, without repeats."""
    last = kept_count(n, smallest)
    sizes = [round(n * (last / n) ** (i / rounds)) for i in range(1, rounds + 1)]
    return [size for i, size in enumerate(sizes) if size < (n, *sizes)[i]]


def sparsify(
    model: Model,
    train: Examples,
    units: Units,
    *,
    rounds: int = 20,
    smallest: float = 0.01,
    probes: int = 4,
    temperature: float = 3.0,
    values: Values | None = None,
    held_out: Examples | None = None,
    metric: Metric | None = None,
    refit_steps: int = 0,
    pinned: Circuit | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Path:
    """Find a nested path of circuits by joint second-order risk, in rounds.

    Args:
        rounds: a geometric schedule of this many rounds, from all units down to ``smallest`` of them.
        probes, temperature: see :func:`probes.fisher_probes`; the temperature is for selecting only.
        values: what removed units are set to; their means over ``train`` where not given.
        held_out: where predicted and measured risk are taken; ``train`` where not given.
        metric: half its squared error instead of the KL divergence.
        refit_steps: refit the constants by this many steps after each round (needs ``held_out`` to stop early).
        pinned: units that are never removed.

    Returns:
        The path; the same one, bit for bit, for the same arguments on the same machine.

    Cost in passes over the data: per round two forward and ``probes`` backward on ``train``, and four forward and
    ``probes`` backward on ``held_out``; one forward for the means.

    Raises:
        ValueError: a model in training mode, ``rounds`` below one, ``smallest`` outside (0, 1], pinned units that
            are more than ``smallest`` leaves.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least one is needed")
    if refit_steps and held_out is None:
        raise ValueError("refit_steps needs held_out examples, on which the refit stops early")
    sizes = schedule(len(units), smallest, rounds)
    if pinned is not None and len(pinned) > (sizes[-1] if sizes else len(units)):
        raise ValueError(f"pinned holds {len(pinned)} units, smallest={smallest} leaves {sizes[-1]}: pin fewer")
    values = mean(model, train, units, batch_size=batch_size) if values is None else values
    current = Reduction(Circuit.full(units), values, fingerprint=fingerprint(model))
    free = torch.ones(len(units), dtype=torch.bool) if pinned is None else ~pinned.mask
    shared = {"probes": probes, "metric": metric, "batch_size": batch_size}
    judged = train if held_out is None else held_out
    order: list[Tensor] = []
    found: list[Round] = []
    sketch: Linearisation | None = None
    for number, size in enumerate(bar(sizes, "removing units", progress)):
        before = current if number else None
        batches = samples(model, train, current, current=before, temperature=temperature, seed=seed + number, **shared)
        sketch = linearise(batches, len(train), seed=seed + number)
        picks = greedy(sketch, current.circuit.mask & free, len(current.circuit) - size)
        removed = torch.zeros(len(units), dtype=torch.bool).index_fill(0, picks, True)
        predicted, alone = _predictions(model, judged, current, before, removed, seed + number, shared)
        current = current.with_circuit(current.circuit - Circuit(units, removed))
        if refit_steps:
            current = refit(model, current, train, judged, steps=refit_steps, metric=metric, seed=seed, progress=False)
        measured = risk(model, current, judged, metric=metric, batch_size=batch_size)
        order.append(picks)
        found.append(Round(current, predicted, measured, (predicted.mean - alone) / max(predicted.mean, 1e-12)))
    if sketch is None:
        raise ValueError(f"smallest={smallest} removes none of the {len(units)} units: choose a smaller one")
    rest = greedy(_after(sketch, order[-1]), current.circuit.mask & free, int((current.circuit.mask & free).sum()))
    order += [rest, (current.circuit.mask & ~free).nonzero().flatten()]
    return Path(units, torch.cat(order), tuple(found))


def _after(linearisation: Linearisation, picks: Int[Tensor, "some"]) -> Linearisation:
    moved = linearisation.matrix[:, picks.to(linearisation.matrix.device)].sum(1) @ linearisation.matrix
    return replace(linearisation, linear=linearisation.linear + moved)


def _predictions(
    model: Model,
    examples: Examples,
    current: Reduction,
    before: Reduction | None,
    removed: Bool[Tensor, "units"],
    seed: int,
    shared: dict[str, object],
) -> tuple[Estimate, float]:
    """The predicted joint risk of the removals, and the sum of their risks alone."""
    alone = 0.0

    def watched():  # type: ignore[no-untyped-def]
        nonlocal alone
        for part in samples(model, examples, current, current=before, temperature=1.0, seed=seed, **shared):  # type: ignore[arg-type]
            alone += float(part.effects[..., removed].double().square().sum() / 2)
            yield part

    total = joint_moments(watched(), removed)
    return Estimate.of(total, "nats"), alone / len(examples)
