"""Compensating search: the order in which units leave when those that stay take over their work.

With affine replacements a removed unit costs only what its neighbours cannot predict of it. For one hook point let
``P`` be the precision matrix of the units that are left and ``M = E[g g']`` the second moments of what reads them. To
second order, with positions taken as independent, removing ``u`` costs

    1/2 M[u, u] / P[u, u]        (what reads it, times the variance that the others leave unexplained),

and then the units that are left are read with ``g[w] + b[w] g[u]``, ``b[w] = -P[u, w] / P[u, u]``: a rank-two change
of ``M`` and a rank-one change of ``P``. This is the optimal-brain-surgeon order (Hassibi and Stork, 1992) in the Fisher
metric, exact within a hook point. Between rounds everything is taken anew in the reduced model, where units that are
left are read with what their maps take over: ``g[w] + sum_u B[u, w] g[u]`` over the units ``u`` that are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count, check_positive, check_temperature
from tl_sparsify._internal.progress import progress as bar
from tl_sparsify._internal.ranks import agreed, summed
from tl_sparsify.core.circuit import Circuit, NeighbourMap
from tl_sparsify.core.distributions import NONE, InterventionDistribution, drawn_interventions
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, check_call, check_held_out, frozen, shared_batches, unit_positions
from tl_sparsify.core.intervene import ablate, intervened, recorded
from tl_sparsify.core.measure import computed, remembering, risk
from tl_sparsify.core.memory import SHARE_OF_A_MACHINE, physical
from tl_sparsify.core.metrics import Metric, output_probes
from tl_sparsify.core.moments import Estimate
from tl_sparsify.core.probes import pulled
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model, Units
from tl_sparsify.search.affine import MIXABLE, neighbours
from tl_sparsify.search.constants import mean, reduced
from tl_sparsify.search.path import CircuitPath, Round
from tl_sparsify.search.scores import kept_count


@dataclass
class _Bank:
    """One hook point's units while a round removes some of them; changed in place, seen by nobody else.

    Attributes:
        alone: the cost of units that cannot be compensated (heads, edges, whole layers), else ``None``.
        readers, precision: ``M`` and ``P`` of the module's text.
        alive: the units that are left and may leave.
    """

    alone: Float[Tensor, "units"] | None
    readers: Float[Tensor, "units some"]
    precision: Float[Tensor, "units some"]
    alive: Bool[Tensor, "units"]

    def costs(self) -> Float[Tensor, "units"]:
        """What each unit costs next (nats); infinite for one that is gone or always kept."""
        cost = self.alone
        if cost is None:
            # 1 / P[u, u] is the variance of u that the units left cannot explain: the error of the affine replacement.
            cost = self.readers.diagonal() / self.precision.diagonal().clamp_min(1e-300) / 2
        return torch.where(self.alive, cost, float("inf"))

    def remove(self, unit: int) -> None:
        """Let the others take over the work of ``unit``."""
        self.alive[unit] = False
        if self.alone is not None:
            return
        # The regression of u on the others has the coefficients -P[u, w] / P[u, u]. What reads u now reads that sum,
        # and the precision of the others alone is a Schur complement.
        row = self.precision[unit] / self.precision[unit, unit]
        takeover, read = -row, self.readers[unit].clone()
        takeover[unit] = 0
        shared = torch.outer(takeover, read)
        self.readers += shared + shared.T + self.readers[unit, unit] * torch.outer(takeover, takeover)
        self.precision -= torch.outer(row, row) * self.precision[unit, unit]
        self.readers[unit], self.readers[:, unit] = 0, 0
        self.precision[unit], self.precision[:, unit] = 0, 0
        self.precision[unit, unit] = 1


@checked
def sparsify_affine(
    model: Model,
    train: Examples,
    units: Units,
    *,
    sizes: Sequence[float] = (0.5, 0.2, 0.1, 0.05, 0.02),
    held_out: Examples | None = None,
    probes: int = 4,
    temperature: float = 3.0,
    metric: Metric | None = None,
    interventions: InterventionDistribution = NONE,
    ridge: float = 1e-3,
    always_keep: Circuit | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> CircuitPath:
    """Find a nested path of circuits whose removed neurons and directions are affine in the kept ones of their hook
    point (:func:`affine.neighbours`, all kept units); heads, edges and whole layers get constants.

    Args:
        sizes: the fraction kept after each round, falling.
        held_out: where the measured risk is taken; ``train`` where not given.
        interventions: what both models are under, in the search, in the fits and where risk is measured.

    Returns:
        A path; ``round.reduction`` holds the fitted maps, ``path.at`` gives circuits with constants (fit neighbours
        anew for a size between rounds). ``predicted`` is what the rounds' removals sum to, at temperature 1 and on the
        examples that ``measured`` is taken on.

    Cost in passes over the data: per round three forward and twice ``probes`` backward on ``train``, two forward and
    ``probes`` backward on ``held_out`` (fewer backward where fewer probes are exact; on ``train`` two forward and
    ``probes`` backward less without neurons and directions, which alone are mapped). Once one forward and ``probes``
    backward on ``train`` for the order of the units that are left at the end, one forward for the means, and one on
    ``held_out`` for the original's answers: under ``interventions`` in every round, and then two forward more on
    ``train`` and three on ``held_out`` for each ``interchange``, at the end one on ``train``. ``O(size**2)`` memory and
    ``O(size**3)`` operations for each hook point.

    Raises:
        ValueError: a model in training mode, sizes that are not falling fractions, units to be kept always that are
            others or more than the smallest size keeps, more units of one hook point than this machine's memory holds.

    Example:
        >>> tls.sparsify_affine(model, train, tls.neurons(model), sizes=(0.5, 0.2), progress=False)
        CircuitPath(2 rounds, 768 to 154 units, risk at the end ... nats (n=64))
    """
    check_call(model, train, units, seed=seed, batch_size=batch_size)
    check_held_out(units, held_out, train)
    check_count("probes", probes, most=MOST)
    check_temperature(temperature)
    check_positive("ridge", ridge)
    if not sizes or list(sizes) != sorted(sizes, reverse=True):
        raise ValueError(f"sizes is {list(sizes)}; it must name falling fractions")
    _check_memory(units)
    if always_keep is not None and always_keep.units != units:
        raise ValueError(f"always_keep is a circuit over {always_keep.units!r}, not over {units!r}")
    if always_keep is not None and len(always_keep) > (least := kept_count(len(units), sizes[-1], "sizes")):
        raise ValueError(f"always_keep comes to {len(always_keep)}, the smallest size leaves {least}: keep fewer")
    constant = reduced(model, Circuit.full(units), mean(model, train, units, batch_size=batch_size))
    current, judged = constant, train if held_out is None else held_out
    settings = {"probes": probes, "temperature": temperature, "metric": metric, "seed": seed}
    plain = settings | {"temperature": 1.0}
    recall = remembering() if interventions == NONE else computed
    order: list[Int[Tensor, "picked"]] = []
    rounds: list[Round] = []
    total = 0.0

    def banks(on: Examples, probing: dict[str, Any]) -> list[_Bank]:
        return _banks(model, on, current, always_keep, interventions, ridge, batch_size, probing)

    for size in bar(list(sizes), "removing units", progress):
        count = len(current.circuit) - kept_count(len(units), size, "sizes")
        picks = _removed(banks(train, settings), units, count)  # without a name: gone when the next are made
        total += _cost(banks(judged, plain), units, picks)
        mask = current.circuit.mask.index_fill(0, picks, False)
        constant = constant.with_circuit(Circuit(units, mask))
        fit = settings | {"ridge": ridge, "interventions": interventions, "batch_size": batch_size}
        current = neighbours(model, constant, train, nearest=None, **fit)
        under = {"interventions": interventions, "batch_size": batch_size, "seed": seed, "recall": recall}
        measured = risk(model, current, judged, metric=metric, **under)
        order.append(picks)
        rounds.append(Round(current, Estimate(total, float("nan"), len(judged), measured.unit), measured, float("nan")))
    held = 0 if always_keep is None else len(always_keep)
    order.append(_removed(banks(train, settings), units, len(current.circuit) - held))
    left = torch.ones(len(units), dtype=torch.bool).index_fill(0, torch.cat(order), False)
    return CircuitPath(units, torch.cat([*order, left.nonzero().flatten()]), tuple(rounds), values=constant.values)


def _check_memory(units: Units) -> None:
    """Refuse units whose covariances would not fit: two matrices of each hook point, five more of the largest."""
    largest, every = 0, 0
    for site in units.sites:
        square = site.size**2 if site.kind in MIXABLE else 0
        largest, every = max(largest, square), every + square
    needed, there = torch.float64.itemsize * (2 * every + 5 * largest), physical()
    if needed > SHARE_OF_A_MACHINE * there:
        most = max(site.size for site in units.sites if site.kind in MIXABLE)
        raise ValueError(
            f"units has up to {most:,} neurons or directions of one hook point, whose "
            f"covariances take about {needed / 1e9:.1f} GB, and this machine has {there / 1e9:.1f} GB: "
            "give fewer of them, or search with sparsify, whose memory grows with the units alone"
        )


def _removed(banks: list[_Bank], units: Units, count: int) -> Int[Tensor, "count"]:
    """The next ``count`` units, cheapest first over all hook points."""
    costs = [bank.costs() for bank in banks]
    picks: list[int] = []
    for _ in range(count):
        lowest = [float(cost.min()) for cost in costs]
        site = min(range(len(banks)), key=lowest.__getitem__)
        unit = int(costs[site].argmin())
        banks[site].remove(unit)
        costs[site] = banks[site].costs()
        picks.append(units.offsets[site] + unit)
    return torch.tensor(picks, dtype=torch.long)


def _cost(banks: list[_Bank], units: Units, picks: Int[Tensor, "count"]) -> float:
    """What it costs to remove these units one after the other (nats where the probes are at temperature 1)."""
    total = 0.0
    for pick in picks.tolist():
        site = next(i for i, part in enumerate(units.slices) if pick < part.stop)
        unit = pick - units.offsets[site]
        total += float(banks[site].costs()[unit])
        banks[site].remove(unit)
    return total


def _banks(
    model: Model,
    examples: Examples,
    current: Reduction,
    always_keep: Circuit | None,
    interventions: InterventionDistribution,
    ridge: float,
    batch_size: int | None,
    settings: dict[str, Any],
) -> list[_Bank]:
    """The units' statistics in the reduced model. One forward and the probes' backward passes; one forward more for
    each ``interchange``."""
    free = current.circuit.mask if always_keep is None else current.circuit.mask & ~always_keep.mask
    mixable = [site.kind in MIXABLE for site in current.units.sites]
    shapes = [(site.size, site.size if m else 1) for site, m in zip(current.units.sites, mixable, strict=True)]
    readers, squares = ([torch.zeros(shape).double() for shape in shapes] for _ in range(2))
    sums, counts = [torch.zeros(size).double() for size, _ in shapes], torch.zeros(len(shapes)).double()
    with agreed(f"the statistics of {len(examples)} examples"):
        for index, batch in shared_batches(model, examples, batch_size):
            here = current.for_examples(index, examples.spans)
            with torch.no_grad(), intervened(model, ablate(here)):
                drawn = drawn_interventions(interventions, model, current, examples, index, settings["seed"])
            with frozen(model), torch.enable_grad(), intervened(model, *drawn, ablate(here)):
                with recorded(model, here.units, gradients=True) as recording:
                    logits = answer_logits(model, batch)
                gradients = list(pulled(recording, logits, output_probes(logits.detach(), batch, index, **settings)))
            parts = zip(here.units.sites, recording.read(), here.values.tensors, mixable, strict=True)
            for number, (site, v, c, mixes) in enumerate(parts):
                where, v = unit_positions(model, batch, site, v), v.detach().double()
                for found in gradients:
                    g = (found[number] * where.to(found[number])[..., None, None]).double()
                    if mixes:
                        rows = g[where][..., 0].cpu()
                        readers[number] += rows.T @ rows / len(examples)
                    else:
                        effect = site.along(g, c.to(v) - v).cpu()
                        readers[number] += effect.square().sum(0)[:, None] / len(examples)
                if mixes:
                    rows = v[where][..., 0].cpu()
                    squares[number] += rows.T @ rows
                    sums[number] += rows.sum(0)
                    counts[number] += len(rows)
    parts = (readers, squares, sums, [counts])
    readers, squares, sums, (counts,) = (list(summed([part], len(examples))) for part in parts)
    banks: list[_Bank] = []
    for number, alive in enumerate(current.units.split(free)):
        kept = current.units.split(current.circuit.mask)[number]
        if not mixable[number]:
            banks.append(_Bank(readers[number][:, 0] / 2, readers[number], squares[number], alive.clone()))
            continue
        centre = sums[number] / counts[number]
        covariance = squares[number] / counts[number] - torch.outer(centre, centre)  # in float64: a difference
        read = _with_takeovers(readers[number], None if current.mixing is None else current.mixing[number])
        banks.append(_Bank(None, read, _precision(covariance, kept, ridge), alive.clone()))
    return banks


def _with_takeovers(readers: Float[Tensor, "units units"], mixing: NeighbourMap | None) -> Float[Tensor, "units units"]:
    """``M`` of the kept units, from that of all units each on its own: what reads a removed one reads its map of kept
    ones."""
    if mixing is None:
        return readers
    shares = mixing.matrix(readers).to_dense()
    shares.diagonal().add_(1)
    return shares.T @ readers @ shares


def _precision(
    covariance: Float[Tensor, "units units"], kept: Bool[Tensor, "units"], ridge: float
) -> Float[Tensor, "units units"]:
    """The inverse of the kept units' covariance, its diagonal raised by ``ridge``; the identity elsewhere."""
    # Ridge on correlations: rescaling a neuron and its reader must change no choice.
    scale = covariance.diagonal().clamp_min(1e-24).sqrt()
    correlation = covariance / scale / scale[:, None]
    correlation = torch.where(kept & kept[:, None], correlation, 0.0)
    correlation.diagonal().copy_(1 + ridge * kept.double())
    return torch.linalg.inv(correlation) / scale / scale[:, None]
