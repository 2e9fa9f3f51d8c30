"""ACDC: edges leave one at a time, wherever the divergence grows by less than a threshold (Conmy et al., arXiv
2304.14997)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.progress import progress as bar
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.edges import prune
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import check_call
from tl_sparsify.core.measure import Recall, known_risk, remembering
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model, Units
from tl_sparsify.search.constants import mean
from tl_sparsify.search.scores import Scores

_MOST = 100_000  # forward passes


@checked
def acdc(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    thresholds: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1),
    values: Values | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Scores:
    """ACDC, for edges: from the logits backwards each edge is removed if the mean KL(original || circuit) grows by less
    than a threshold, and with a head or MLP that nothing reads any more go all edges into it.

    An edge's score is the largest of ``thresholds`` (nats) at which it stays, 0 where it stays at none: many are equal,
    and circuits of sizes between those of the thresholds are cut among equals by the order of the units.

    Args:
        values: what removed edges carry (the published method's is the other run's value): the writers' means over
            ``examples`` where not given.

    One forward pass for each threshold and edge at most, one for the original's answers, and one for the means.

    Raises:
        ValueError: units that are no edges; thresholds that are none, negative or not finite; more than 100,000 forward
            passes.

    Example:
        >>> coarse = tls.edges(model, "layer")
        >>> tls.baselines.acdc(model, test, coarse, thresholds=[0.1], progress=False).measured_in
        'nats'
    """
    check_call(model, examples, seed=seed, batch_size=batch_size)
    if any(site.kind != "edge" for site in units.sites):
        raise ValueError(f"units are {units!r}, not all of them edges: tls.edges(model) gives some")
    if not thresholds or not all(math.isfinite(t) and t >= 0 for t in thresholds):
        raise ValueError(f"thresholds is {thresholds!r}: give some numbers of nats, none of them negative")
    if len(units) * len(thresholds) > _MOST:
        raise ValueError(
            f"units holds {len(units):,} edges and thresholds {len(thresholds)}, a forward pass for each: "
            f"more than {_MOST:,}; take fewer thresholds, tls.edges(model, 'layer'), or baselines that are cheaper"
        )
    constants = mean(model, examples, units, batch_size=batch_size) if values is None else values
    recall, scores, passes = remembering(), torch.zeros(len(units), dtype=torch.float64), 1 + (values is None)
    for threshold in sorted(thresholds):
        kept, tried = _sweep(model, examples, units, constants, threshold, recall, batch_size, progress)
        scores[kept] = threshold
        passes += tried
    unknown = torch.full_like(scores, float("nan"))
    return Scores(units, scores, unknown, "ACDC", "nats", passes, 0)


def _sweep(
    model: Model,
    examples: Examples,
    units: Units,
    values: Values,
    threshold: float,
    recall: Recall,
    batch_size: int | None,
    progress: bool,
) -> tuple[Bool[Tensor, "units"], int]:
    """The edges that stay at a threshold, and how many were tried."""
    kept = torch.ones(len(units), dtype=torch.bool)
    now, tried = 0.0, 0
    readers = [
        range(part.start + number * site.rows, part.start + (number + 1) * site.rows)
        for site, part in zip(units.sites, units.slices, strict=True)
        for number in range(len(site.readers))
    ]
    for reader in bar(readers[::-1], f"ACDC at {threshold:g} nats", progress):
        kept = prune(Circuit(units, kept)).mask
        for edge in reversed(reader):
            if not kept[edge]:
                continue
            trial = kept.clone()
            trial[edge] = False
            without = Reduction(Circuit(units, trial), values)
            then = known_risk(model, without, examples, recall=recall, batch_size=batch_size).mean
            tried += 1
            if then - now < threshold:
                kept, now = trial, then
    return prune(Circuit(units, kept)).mask, tried
