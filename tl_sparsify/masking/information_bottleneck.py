"""The information bottleneck: each unit lets through as little of its value as the answer needs, and noise instead.

With ``mu`` and ``sigma`` the mean and the deviation of each of its numbers over the data, a unit's value becomes

    z = lambda v + (1 - lambda) e,      e ~ N(mu, sigma^2),      lambda = sigmoid(logit),

and what is left of ``v`` in ``z`` is at most the divergence of ``z`` given ``v`` from ``N(mu, sigma^2)``, for a number

    KL = ((1 - lambda)^2 + lambda^2 (v - mu)^2 / sigma^2 - 1) / 2 - log(1 - lambda)

(Schulz et al., *Restricting the Flow*, arXiv 2001.00396; for circuits IBCircuit, Bian et al., 2025, whose code was not
at hand, here at the level of units). ``lambda`` is the unit's own, so that the mean over the data, where ``(v - mu)^2``
is ``sigma^2``, needs no data: ``lambda^2 - lambda - log(1 - lambda)``. Each number of a unit has noise of its own,
without covariance.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.arguments import checked
from tl_sparsify.core.circuit import Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import check_call, run_values
from tl_sparsify.core.metrics import Metric
from tl_sparsify.core.moments import Moments, mean_of, unit_moments
from tl_sparsify.core.units import Model, Units
from tl_sparsify.masking.training import PER_STEP, Replacements, trained
from tl_sparsify.search.scores import Scores

_START = 5.0  # of the logits, as in Schulz et al.: 0.7 % noise


@checked
def information_bottleneck(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    steps: int | None = None,
    learning_rate: float = 0.15,
    beta: float = 1.0,
    per_step: int = PER_STEP,
    held_out: Examples | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Scores:
    """Gates between each unit's value and noise, ``lambda v + (1 - lambda) e``, trained by Adam on the divergence from
    the original output plus ``beta`` times the information that they let through. A unit's score is its gate's logit.

    The noise is normal, with the mean and the variance of each of the unit's numbers over the examples, and drawn anew
    for every step, example, position and number. The information is the mean over units of what a number of the unit
    lets through at a position, ``lambda^2 - lambda - log(1 - lambda)`` nats; a head counts as much as a neuron. All
    logits start at 5, where ``lambda`` is 0.993.

    Args:
        steps, learning_rate, per_step, metric, batch_size: as in :func:`hard_concrete`.
        beta: nats of divergence that a nat of information may cost. It sets how much is let through: tune it.
        held_out: as in :func:`hard_concrete`; the circuits that are judged there have means in place of other units.

    By default 81 forward and 80 backward passes over the data, in general ``steps per_step / n`` of both and one for
    the original's logits; where these are more than 2^24 numbers, they are made in each step, by as many passes again;
    one forward pass more for means and variances, one of one example, and at most 51 over ``held_out``. A random number
    for each number of the units at each position of a step.

    Raises:
        ValueError: a model in training mode; ``steps`` or ``per_step`` below one; a ``beta`` that is negative; a
            ``learning_rate`` that is not positive.

    Example:
        >>> tls.baselines.information_bottleneck(model, train, units, steps=3, progress=False).top(0.25)
        Circuit(3 of 12 units: 3 heads)
    """
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta is {beta}; it must not be negative")
    check_call(model, examples, units, seed=seed, batch_size=batch_size)
    moments = unit_moments(model, examples, units, batch_size=batch_size)

    def gates(logits: Float[Tensor, "units"], index: Int[Tensor, "batch"], step: int) -> Float[Tensor, "batch units"]:
        return logits.sigmoid().expand(len(index), -1)

    def let_through(logits: Float[Tensor, "units"]) -> Float[Tensor, ""]:
        return beta * information(logits).mean()

    start = torch.full((len(units),), _START)
    settings = {"steps": steps, "learning_rate": learning_rate, "per_step": per_step, "held_out": held_out}
    settings |= {"values": mean_of(moments, model, units), "replaced": _noise(model, examples, units, moments, seed)}
    settings |= {"metric": metric, "seed": seed, "batch_size": batch_size, "progress": progress}
    name = "information bottleneck"
    found = trained(model, examples, units, start, gates, let_through, name=name, **settings)
    return replace(found, forward_passes=found.forward_passes + 1)


def information(logits: Float[Tensor, "units"]) -> Float[Tensor, "units"]:
    """What a number of each unit lets through at a position, in nats, on average over the data."""
    gate = logits.sigmoid()
    return gate * (gate - 1) + torch.nn.functional.softplus(logits)  # softplus: -log(1 - gate)


def _noise(model: Model, examples: Examples, units: Units, moments: tuple[Moments, ...], seed: int) -> Replacements:
    """Noise for the examples of a step. It depends on an input's own positions, not on padding before or behind it."""
    first = torch.zeros(1, dtype=torch.long)
    one = run_values(model, examples[first], units.for_examples(first, examples.spans))
    shapes = [v.shape[1:] for v in one.tensors]

    def noise(index: Int[Tensor, "batch"], here: Units, step: int) -> Values:
        mask = examples.attention_mask
        made: list[Tensor] = []
        for number, (moment, (positions, *entries)) in enumerate(zip(moments, shapes, strict=True)):
            place = torch.arange(1, positions + 1).expand(len(index), -1)
            if mask is not None and mask.shape[1] == positions:
                place = mask[index].cpu().long().cumsum(1)  # padding in front shares a place, and is not read
            entry = torch.arange(entries[0] * entries[1])
            drawn = _random.normal(seed, 101, step, number, index[:, None, None], place[..., None], entry)
            deviation = moment.variance.sqrt()
            made.append(moment.mean + deviation * drawn.view(*place.shape, *entries).to(deviation))
        return Values(here, tuple(made))

    return noise
