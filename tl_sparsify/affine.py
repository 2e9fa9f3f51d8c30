"""Affine replacements: a removed unit as a constant plus a linear map of kept units of its hook point.

Folded, the map goes into the rows that read the kept units: ``W_out[w] += B[u, w] W_out[u]`` (arXiv 2602.24266,
folding into neighbours), so it costs nothing when the model runs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparsify.circuit import Mixing, Reduction, Values, check_fingerprint
from tl_sparsify.examples import Examples
from tl_sparsify.intervene import batch_size_for, check_model, intervened, output, recorded, unit_positions
from tl_sparsify.measure import NONE, InterventionDistribution, drawn_interventions
from tl_sparsify.units import Model

MIXABLE = ("neuron", "direction")
"""Kinds of units that can be affine in others: those of width 1."""


def neighbours(
    model: Model,
    reduction: Reduction,
    train: Examples,
    *,
    nearest: int | None = 8,
    ridge: float = 1e-3,
    interventions: InterventionDistribution = NONE,
    batch_size: int | None = None,
    seed: int = 0,
) -> Reduction:
    """Make every removed neuron or direction affine in kept units of its hook point, by ridge regression on
    standardised values (arXiv 2602.24266, folding into neighbours). Heads and whole layers keep their constants.

    Args:
        nearest: how many of the most correlated kept units are a unit's neighbours; ``None``: all of them.
        ridge: relative to the number of samples.
        interventions: what the original model is under while values are taken. Fitted under the distribution that it
            will be judged under, the map sees partly interchanged neighbours, and holds up better there.

    One forward pass over ``train`` (one more for each ``interchange``); memory for each site is kept by all units.
    :func:`refit` afterwards fits constants and maps together on the divergence.

    Raises:
        ValueError: a model in training mode, a reduction of another model, ``nearest`` below one, a ``ridge`` that is
            not positive.
    """
    check_model(model)
    check_fingerprint(model, reduction)
    if nearest is not None and nearest < 1:
        raise ValueError(f"nearest is {nearest}; a removed unit needs at least one neighbour")
    if not ridge > 0:
        raise ValueError(f"ridge is {ridge}; it must be positive")
    kept = reduction.units.split(reduction.circuit.mask)
    affine = [
        site.kind in MIXABLE and bool(mask.any()) and not bool(mask.all())
        for site, mask in zip(reduction.units.sites, kept, strict=True)
    ]
    gathered = _covariances(model, reduction, train, affine, interventions, batch_size, seed)
    values: list[Tensor] = []
    mixing: list[Mixing | None] = []
    for c, mask, found in zip(reduction.values.tensors, kept, gathered, strict=True):
        if found is None:
            values.append(c)
            mixing.append(None)
            continue
        centre, covariance, deviation = found
        weights = _regressed(covariance, deviation, mask, nearest, ridge)
        removed = (~mask).nonzero().flatten()
        constant = (centre - weights.of(centre[None, None, :, None])[0, 0, :, 0])[removed]
        values.append(c.clone().index_copy_(0, removed.to(c.device), constant[:, None].to(c)))
        mixing.append(replace(weights, weights=weights.weights.to(c)))
    affine_part = tuple(mixing) if any(part is not None for part in mixing) else None
    new = Values(reduction.units, tuple(values), "neighbours")
    return replace(reduction, values=new, kind=new.kind, reference=reduction.baseline, mixing=affine_part)


def _covariances(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    wanted: list[bool],
    interventions: InterventionDistribution,
    batch_size: int | None,
    seed: int,
) -> list[tuple[Tensor, Tensor, Tensor] | None]:
    """For each wanted site the mean, the covariance ``[kept, units]`` and the deviation of its units, in float64."""
    kept = reduction.units.split(reduction.circuit.mask)
    sums: list[list[Tensor]] = [[] for _ in wanted]
    with torch.no_grad():
        for index, batch in examples.batches(batch_size_for(model, examples, batch_size)):
            drawn = drawn_interventions(interventions, model, reduction, examples, index, seed)
            here = reduction.for_examples(index).units
            with intervened(model, *drawn), recorded(model, here) as recording:
                output(model, batch)
            for number, (site, v) in enumerate(zip(here.sites, recording.read(), strict=True)):
                if not wanted[number]:
                    continue
                rows = v[unit_positions(model, batch, site, v)][..., 0].double()
                new = [
                    torch.tensor(float(len(rows))),
                    rows.sum(0),
                    rows[:, kept[number]].T @ rows,
                    rows.square().sum(0),
                ]
                sums[number] = new if not sums[number] else [a + b for a, b in zip(sums[number], new, strict=True)]
    found: list[tuple[Tensor, Tensor, Tensor] | None] = []
    for part, mask in zip(sums, kept, strict=True):
        if not part:
            found.append(None)
            continue
        n, total, square, own = part
        centre = total / n
        covariance = square / n - torch.outer(centre[mask], centre)
        found.append((centre, covariance, (own / n - centre.square()).clamp_min(0).sqrt()))
    return found


def _regressed(
    covariance: Float[Tensor, "kept units"],
    deviation: Float[Tensor, "units"],
    mask: Bool[Tensor, "units"],
    nearest: int | None,
    ridge: float,
) -> Mixing:
    """Ridge regression of each removed unit on its neighbours, all of a site in one batched solve."""
    kept, removed = mask.nonzero().flatten(), (~mask).nonzero().flatten()
    scale = deviation.clamp_min(1e-12)
    correlation = covariance / scale[kept][:, None] / scale
    inside, across = correlation[:, kept], correlation[:, removed]  # [kept, kept], [kept, removed]
    dead = deviation[kept] <= 1e-12
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
    return Mixing(len(mask), rows.flatten().cpu(), columns.flatten().cpu(), weights.flatten())
