"""Refit: all replacements of a reduction fitted together, on the divergence from the original's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count, check_positive
from tl_sparsify._internal.progress import progress as bar
from tl_sparsify._internal.ranks import share, summed
from tl_sparsify.core.circuit import REFIT, REFITTED_NEIGHBOURS, NeighbourMap, Values
from tl_sparsify.core.distributions import NONE, InterventionDistribution, drawn_interventions
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, batch_size_for, check_call, frozen, halving
from tl_sparsify.core.intervene import ablate, intervened
from tl_sparsify.core.measure import Known, computed, known_of, known_risk
from tl_sparsify.core.metrics import Metric, divergence
from tl_sparsify.core.reduction import Reduction, check_fingerprint
from tl_sparsify.core.units import Model

_RATE, _MANY = 0.05, 4096  # standard deviations a step; where constants are more numbers than that, less
_FALL = 0.02  # of the validation risk: less does not count as progress
Parameters = list[Float[Tensor, "..."]]


@checked
@torch.enable_grad()
def refit(
    model: Model,
    reduction: Reduction,
    train: Examples,
    validation: Examples,
    *,
    steps: int = 300,
    patience: int | None = None,
    learning_rate: float | None = None,
    metric: Metric | None = None,
    interventions: InterventionDistribution = NONE,
    per_step: int | None = 512,
    batch_size: int | None = None,
    seed: int = 0,
    known: Known | None = None,
    progress: bool = True,
) -> Reduction:
    """Fit the replacements of all removed units together, on the divergence from the original output, in the ablated
    model: their constants and, where there are any, the weights of their affine maps.

    Adam on the values in units of each one's standard deviation over ``train`` (so that rescaling a neuron and its
    reader changes nothing), with a cosine schedule; what does best on ``validation`` is returned, never worse there
    than what was given. The kept units' entries and ``baseline`` stay what they were. Both models are under the same
    ``interventions``, drawn anew in every step.

    The learning rate is .05 where it is not given, and less in proportion where constants are more than 4,096 numbers:
    all of them move in every step, and what they move adds up (``benchmarks/refit_rates.py``).

    With ``patience`` the learning rate stays as it is, and the fit ends early when the validation risk, taken every
    ``patience / 10`` steps, has not fallen by two percent in so many steps.

    A step is on ``per_step`` examples (``None``: all of ``train``), ``batch_size`` of them at a time (as many as fit
    where not given): the numbers do not depend on that. ``known`` may come from an earlier refit of the same model on
    the same examples and units (:func:`measure.known_of`); the reduction is then not checked to be the model's. Under
    ``interventions`` the original's logits in it are not used.

    About ``steps * per_step`` examples of one forward and one backward pass, two forward passes over ``train`` and 12
    over ``validation``. Where the original's logits are more than 2**24 numbers, under ``interventions``, and in less
    than a pass over ``train`` they are computed anew: two forward passes then, and 22 over ``validation``; two more for
    each ``interchange`` in the distribution.

    Raises:
        ValueError: a model in training mode, a reduction of another model, fewer than one step or example in it.

    Example:
        >>> fitted = tls.constants.refit(model, reduction, train, validation, steps=20, progress=False)
        >>> tls.risk(model, fitted, train).mean < tls.risk(model, reduction, train).mean
        True
    """
    check_call(model, train, reduction.units, seed=seed, batch_size=batch_size)
    if known is None:
        check_fingerprint(model, reduction)
    if learning_rate is not None:
        check_positive("learning_rate", learning_rate)
    if steps < 1:
        raise ValueError(f"steps is {steps}; refit needs at least one")
    if patience is not None:
        check_count("patience", patience, most=MOST)
    if per_step is not None and per_step < 1:
        raise ValueError(f"per_step is {per_step}; a step needs at least one example")
    if reduction.values.paired:
        raise ValueError(
            "reduction sets removed units to their values on counterfactual inputs: there is nothing to fit"
        )
    removed = (~reduction.circuit).mask
    if not bool(removed.any()):
        values = replace(reduction.values, kind=REFIT)
        return replace(reduction, values=values, reference=reduction.baseline)
    clean = interventions == NONE
    size = len(train) if per_step is None else min(per_step, len(train))
    many = steps * size > len(train)
    if known is None:
        known = known_of(model, train, reduction.units, clean=clean, many=many, batch_size=batch_size)
    logits, recall = (known.logits if many else None, known.recall) if clean else (None, computed)
    theta, at, moving = _movable(reduction, removed, known.deviations)

    judging: dict[str, Any] = {"metric": metric, "interventions": interventions, "seed": seed}
    judging |= {"batch_size": batch_size, "recall": recall}

    def validated(parameters: Parameters) -> float:
        return known_risk(model, at(parameters), validation, **judging).mean

    best, lowest = [t.detach().clone() for t in theta], validated([t.detach() for t in theta])
    together, per_epoch = batch_size_for(model, train, batch_size), max(1, len(train) // size)
    every = max(1, min(steps, patience or steps) // 10)
    fell, mark = 0, lowest  # after how many steps the validation risk last fell clearly

    def gradients(step: int, index: Int[Tensor, "some"]) -> Iterator[list[Tensor]]:
        def of(part: Int[Tensor, "batch"], batch: Examples) -> list[Tensor]:
            here = at(theta).for_examples(part, train.spans)
            same = (interventions, model, reduction, train, part, seed + step)
            with torch.no_grad():
                with intervened(model, *drawn_interventions(*same)):
                    original = answer_logits(model, batch) if logits is None else logits(part)
                with intervened(model, ablate(here)):
                    drawn = drawn_interventions(*same)
            with torch.enable_grad(), intervened(model, *drawn, ablate(here)):
                loss = divergence(original, answer_logits(model, batch), batch, metric).sum() / len(index)
            found = torch.autograd.grad(loss, theta, allow_unused=True)
            return [torch.zeros_like(t) if g is None else g for t, g in zip(theta, found, strict=True)]

        for part in index[share(len(index))].split(together):
            yield from halving(of, part, train[part], batch_size)

    # all of many constants must not go further together than all of few
    rate = _RATE * min(1.0, _MANY / max(1, moving)) if learning_rate is None else learning_rate
    optimizer = torch.optim.Adam(theta, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 0.0 if patience is None else rate)
    with frozen(model):
        for step in bar(range(steps), "refitting constants", progress):
            order = _random.permutation(len(train), seed, 41, step // per_epoch)
            index = order[(step % per_epoch) * size :][:size].sort().values
            for parameter, gradient in zip(theta, summed(gradients(step, index), len(index)), strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            if (step + 1) % every == 0 or step + 1 == steps:
                judged = validated([t.detach() for t in theta])
                if judged < lowest:
                    best, lowest = [t.detach().clone() for t in theta], judged
                if judged < mark * (1 - _FALL):
                    fell, mark = step + 1, judged
                if patience is not None and step + 1 - fell >= patience:
                    break
    return at(best)


def _movable(
    reduction: Reduction, removed: Bool[Tensor, "units"], deviations: Sequence[Float[Tensor, "..."]]
) -> tuple[Parameters, Callable[[Parameters], Reduction], int]:
    """What a refit moves, at zero: for each site how far the removed units' constants are from the reduction's, and how
    far the weights of their maps, each in its natural size; the reduction that is so far off; and how many numbers of
    the constants can move. Weights do not count there: their size shares out a step among a unit's weights."""
    units, start = reduction.units, reduction.values.tensors
    scales = [
        (s * site.by_row(gone)[:, None].to(s)).to(v)
        for site, s, gone, v in zip(units.sites, deviations, units.split(removed), start, strict=True)
    ]
    mixing = reduction.mixing or (None,) * len(start)
    slopes = [None if part is None else _slope_scale(part, s[:, 0]) for part, s in zip(mixing, deviations, strict=True)]
    zeros = [torch.zeros_like(v).requires_grad_() for v in start]
    zeros += [torch.zeros_like(part.weights).requires_grad_() for part in mixing if part is not None]

    def at(parameters: Parameters) -> Reduction:
        moved = tuple(v + s.to(v) * t for v, s, t in zip(start, scales, parameters, strict=False))
        rest = iter(parameters[len(start) :])
        mixed = tuple(
            None if part is None or scale is None else replace(part, weights=part.weights + scale * next(rest))
            for part, scale in zip(mixing, slopes, strict=True)
        )
        kept_affine = None if reduction.mixing is None else mixed
        values = Values(units, moved, REFIT if reduction.mixing is None else REFITTED_NEIGHBOURS)
        return replace(reduction, values=values, reference=reduction.baseline, mixing=kept_affine)

    moving = sum(int((scale.expand_as(value) != 0).sum()) for value, scale in zip(start, scales, strict=True))
    return zeros, at, moving


def _slope_scale(mixing: NeighbourMap, deviation: Float[Tensor, "units"]) -> Float[Tensor, "entries"]:
    """The natural size of a change in a map's weights: the removed unit's deviation over the kept one's, shared among
    the removed unit's neighbours."""
    shared = torch.bincount(mixing.rows, minlength=mixing.size).double().sqrt()[mixing.rows]
    scale = deviation[mixing.rows] / deviation[mixing.columns].clamp_min(1e-12) / shared.to(deviation)
    return torch.where(deviation[mixing.columns] > 0, scale, 0.0).to(mixing.weights)
