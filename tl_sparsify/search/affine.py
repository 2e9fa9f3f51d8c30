"""Affine replacements: a removed unit as a constant plus a linear map of kept units of its hook point.

Folded, the map goes into the rows that read the kept units: ``W_out[w] += B[u, w] W_out[u]`` (arXiv 2602.24266,
folding into neighbours), so it costs nothing when the model runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count, check_temperature
from tl_sparsify._internal.ranks import agreed, summed
from tl_sparsify.core.circuit import NeighbourMap, Values
from tl_sparsify.core.distributions import NONE, InterventionDistribution, drawn_interventions
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, check_call, frozen, output, shared_batches, unit_positions
from tl_sparsify.core.intervene import intervened, recorded
from tl_sparsify.core.metrics import Metric, output_probes
from tl_sparsify.core.moments import Moments
from tl_sparsify.core.probes import pulled
from tl_sparsify.core.reduction import Reduction, check_fingerprint
from tl_sparsify.core.units import Model

MIXABLE = ("neuron", "direction")
"""Kinds of units that can be affine in others: those of width 1."""
Weighting = Literal["curvature", "uniform"]
_EVEN = 3.0  # times the mean weight, added to every sample's own: maps are used in a model that has changed


@checked
def neighbours(
    model: Model,
    reduction: Reduction,
    train: Examples,
    *,
    nearest: int | None = 8,
    ridge: float = 1e-3,
    weighting: Weighting = "curvature",
    probes: int = 4,
    temperature: float = 3.0,
    metric: Metric | None = None,
    interventions: InterventionDistribution = NONE,
    draws: int = 1,
    batch_size: int | None = None,
    seed: int = 0,
) -> Reduction:
    """Make every removed neuron or direction affine in kept units of its hook point, by ridge regression on
    standardised values (arXiv 2602.24266, folding into neighbours). Heads and whole layers keep their constants.

    Each unit's own error becomes smaller; the sum of them need not. ``sparsify`` looks for units whose errors with
    constants undo each other, and in such a circuit maps can do worse than the constants: measure, or take the circuit
    from :func:`sparsify_affine`, which counts on maps.

    Args:
        nearest: how many of the most correlated kept units are a unit's neighbours; ``None``: all of them.
        ridge: relative to the number of samples.
        weighting: what an example's position counts. ``curvature``: as much as the output depends there on the site's
            removed units (the norm of the probes' gradients along their standard deviations), and three times the mean
            of that; ``uniform``: all the same, as published, also where nothing reads the units.
        probes, temperature, metric: of the probes that ``curvature`` is measured with.
        interventions: what the original model is under while values are taken. Fitted under the distribution that it
            will be judged under, the map sees partly interchanged neighbours, and holds up better there.
        draws: how often they are drawn for each example.

    Cost in passes over ``train``: one forward for each draw, and one more for each ``interchange``; with ``curvature``
    also ``probes`` backward for each draw, and one forward. Memory for each site is kept by all units. :func:`refit`
    afterwards fits constants and maps together on the divergence.

    Raises:
        ValueError: a model in training mode, a reduction of another model, ``nearest`` or ``draws`` below one, a
            ``ridge`` that is not positive, an unknown ``weighting``.

    Example:
        >>> kept = tls.score.variance(model, train, tls.neurons(model)).top(0.5)
        >>> half = tls.constants.reduced(model, kept, tls.constants.mean(model, train, kept.units))
        >>> tls.constants.neighbours(model, half, train)
        Reduction(Circuit(384 of 768 units: 384 neurons), neighbours values)
    """
    check_call(model, train, reduction.units, seed=seed, batch_size=batch_size)
    check_fingerprint(model, reduction)
    check_count("draws", draws, least=None, most=MOST)
    check_count("probes", probes, most=MOST)
    check_temperature(temperature)
    if nearest is not None and nearest < 1:
        raise ValueError(f"nearest is {nearest}; a removed unit needs at least one neighbour")
    if draws < 1:
        raise ValueError(f"draws is {draws}; interventions are drawn at least once")
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge is {ridge}; it must be positive")
    if weighting not in get_args(Weighting):
        raise ValueError(f"weighting is {weighting!r}; it is {' or '.join(get_args(Weighting))}")
    if reduction.values.paired:
        raise ValueError("reduction's values are those of counterfactual inputs: give one with constants")
    kept = reduction.units.split(reduction.circuit.mask)
    affine = [
        site.kind in MIXABLE and bool(mask.any()) and not bool(mask.all())
        for site, mask in zip(reduction.units.sites, kept, strict=True)
    ]
    passes = {"interventions": interventions, "draws": draws, "batch_size": batch_size, "seed": seed}
    settings = {"probes": probes, "temperature": temperature, "metric": metric} if weighting == "curvature" else None
    gathered = _covariances(model, reduction, train, affine, settings, passes)
    values: list[Tensor] = []
    mixing: list[NeighbourMap | None] = []
    for c, mask, found in zip(reduction.values.tensors, kept, gathered, strict=True):
        if found is None:
            values.append(c)
            mixing.append(None)
            continue
        centre, covariance, deviation = found
        weights = _regressed(covariance, deviation, mask, nearest, ridge)
        removed = (~mask).nonzero().flatten()
        # A regression passes through the means: the constant is what is left of the unit's own mean.
        constant = (centre - weights.of(centre[None, None, :, None])[0, 0, :, 0])[removed]
        values.append(c.clone().index_copy_(0, removed.to(c.device), constant[:, None].to(c)))
        mixing.append(replace(weights, weights=weights.weights.to(c)))
    affine_part = tuple(mixing) if any(part is not None for part in mixing) else None
    new = Values(reduction.units, tuple(values), "neighbours")
    return replace(reduction, values=new, reference=reduction.baseline, mixing=affine_part)


def _covariances(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    wanted: list[bool],
    probing: dict[str, Any] | None,
    passes: dict[str, Any],
) -> list[tuple[Tensor, Tensor, Tensor] | None]:
    """For each wanted site the mean, the covariance ``[kept, units]`` and the deviation of its units, in float64, over
    samples weighted by curvature (where there are settings of its probes)."""
    kept = reduction.units.split(reduction.circuit.mask)
    if not any(wanted):
        return [None for _ in wanted]
    spread: list[Tensor | None] = [None for _ in wanted]
    if probing is not None:
        once = passes | {"interventions": NONE, "draws": 1}
        moments: dict[int, Moments] = {}
        with agreed(f"the values of {len(examples)} examples"):
            for number, rows, _ in _rows(model, reduction, examples, wanted, None, spread, once):
                new = Moments.of(rows)
                moments[number] = moments[number] + new if number in moments else new
        moments = {number: Moments.over([part], len(examples)) for number, part in moments.items()}
        spread = [moments[number].variance.sqrt() if number in moments else None for number in range(len(wanted))]
    sums = _totals(_rows(model, reduction, examples, wanted, probing, spread, passes), kept, len(examples))
    found: list[tuple[Tensor, Tensor, Tensor] | None] = []
    for part, mask in zip(sums, kept, strict=True):
        if part is None:
            found.append(None)
            continue
        centre = part.values / part.weight
        found.append((centre, part.products / part.weight - torch.outer(centre[mask], centre), part.deviation))
    return found


@dataclass(frozen=True)
class _Totals:
    """Weighted sums over samples: of the weights, the units' values, their products with kept ones', their squares."""

    weight: Float[Tensor, ""]
    values: Float[Tensor, "units"]
    products: Float[Tensor, "kept units"]
    squares: Float[Tensor, "units"]

    @staticmethod
    def of(
        rows: Float[Tensor, "samples units"], weights: Float[Tensor, "samples"], kept: Bool[Tensor, "units"]
    ) -> _Totals:
        weighted = rows * weights[:, None]
        return _Totals(weights.sum(), weighted.sum(0), weighted[:, kept].T @ rows, (weighted * rows).sum(0))

    def plus(self, other: _Totals, times: float | Float[Tensor, ""] = 1.0) -> _Totals:
        return _Totals(
            self.weight + times * other.weight,
            self.values + times * other.values,
            self.products + times * other.products,
            self.squares + times * other.squares,
        )

    @property
    def deviation(self) -> Float[Tensor, "units"]:
        return (self.squares / self.weight - (self.values / self.weight).square()).clamp_min(0).sqrt()


def _totals(
    batches: Iterator[tuple[int, Float[Tensor, "samples units"], Float[Tensor, "samples"] | None]],
    kept: tuple[Bool[Tensor, "_"], ...],
    n: int,
) -> list[_Totals | None]:
    """Each site's sums over ``n`` examples, shared by all processes. Every sample has ``_EVEN`` mean weights more, and
    all have the same where none is above 0."""
    even: dict[int, _Totals] = {}
    weighted: dict[int, _Totals] = {}
    with agreed(f"the values of {n} examples"):
        for number, rows, weights in batches:
            for sums, some in ((even, torch.ones_like(rows[:, 0])), (weighted, weights)):
                if some is not None:
                    new = _Totals.of(rows, some, kept[number])
                    sums[number] = sums[number].plus(new) if number in sums else new
    for sums in (even, weighted):
        for number, part in sums.items():
            sums[number] = _Totals(*summed([(part.weight, part.values, part.products, part.squares)], n))
    for number, part in weighted.items():
        share = part.weight / even[number].weight
        if bool(share > 0):
            even[number] = part.plus(even[number], _EVEN * share)
    return [even.get(number) for number in range(len(kept))]


def _rows(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    wanted: list[bool],
    probing: dict[str, Any] | None,
    spread: list[Float[Tensor, "units"] | None],
    passes: dict[str, Any],
) -> Iterator[tuple[int, Float[Tensor, "samples units"], Float[Tensor, "samples"] | None]]:
    """For each batch of this process's share and wanted site its number, the values of all its units and the weight of
    each sample, which is an example's position; no weights without probes."""
    kept = reduction.units.split(reduction.circuit.mask)
    for draw in range(passes["draws"]):
        seed = passes["seed"] + draw
        for index, batch in shared_batches(model, examples, passes["batch_size"]):
            with torch.no_grad():
                drawn = drawn_interventions(passes["interventions"], model, reduction, examples, index, seed)
            here = reduction.for_examples(index, examples.spans).units
            gradients: list[tuple[Tensor, ...]] = []
            if probing is None:
                with torch.no_grad(), intervened(model, *drawn), recorded(model, here) as recording:
                    output(model, batch)
            else:
                with frozen(model), torch.enable_grad(), intervened(model, *drawn):
                    with recorded(model, here, gradients=True) as recording:
                        logits = answer_logits(model, batch)
                    vectors = output_probes(logits.detach(), batch, index, seed=seed, **probing)
                    gradients = list(pulled(recording, logits, vectors))
            for number, (site, v) in enumerate(zip(here.sites, recording.read(), strict=True)):
                if not wanted[number]:
                    continue
                where = unit_positions(model, batch, site, v)
                rows = v.detach()[where][..., 0].double()
                weights, scale = None, spread[number]
                if scale is not None:
                    scale = scale * ~kept[number].to(scale.device)  # of removed units alone
                    effects = (g[number].detach()[where][..., 0].double() * scale for g in gradients)
                    weights = sum((effect.square().sum(1) for effect in effects), torch.zeros_like(rows[:, 0])).sqrt()
                yield number, rows, weights


def _regressed(
    covariance: Float[Tensor, "kept units"],
    deviation: Float[Tensor, "units"],
    mask: Bool[Tensor, "units"],
    nearest: int | None,
    ridge: float,
) -> NeighbourMap:
    """Ridge regression of each removed unit on its neighbours, all of a site in one batched solve."""
    kept, removed = mask.nonzero().flatten(), (~mask).nonzero().flatten()
    scale = deviation.clamp_min(1e-12)
    # Standardised, so that rescaling a neuron changes neither its neighbours nor how strongly ridge pulls.
    correlation = covariance / scale[kept][:, None] / scale
    inside, across = correlation[:, kept], correlation[:, removed]  # [kept, kept], [kept, removed]
    dead = deviation[kept] <= 1e-12  # what never varies explains nothing, and would be divided by 0
    across = across.masked_fill(dead[:, None], 0.0)
    count = len(kept) if nearest is None else min(nearest, len(kept))
    if count == len(kept):
        system = inside.masked_fill(dead[:, None] | dead, 0.0) + ridge * torch.eye(len(kept)).to(inside)
        solved = torch.linalg.solve(system, across).T
        chosen = torch.arange(len(kept)).expand(len(removed), -1)
    else:
        chosen = across.abs().T.topk(count, 1).indices
        system = inside[chosen[:, :, None], chosen[:, None, :]] + ridge * torch.eye(count).to(inside)
        solved = torch.linalg.solve(system, across.T.gather(1, chosen))
    columns = kept.to(chosen.device)[chosen]
    weights = solved * scale[removed][:, None] / scale[columns]
    rows = removed[:, None].expand_as(columns)
    return NeighbourMap(len(mask), rows.flatten().cpu(), columns.flatten().cpu(), weights.flatten())
