"""Constants: what a removed unit is replaced by.

``mean``, ``zero``, ``curvature_weighted`` and ``newton`` give a value for every unit, each unit on its own.
``neighbours`` and ``refit`` take a reduction: the one makes its removed units affine in kept units of their hook point,
the other fits all its replacements together in the ablated model. None of them varies by example or position, so they
fold. ``counterfactual`` is the exception: no constants, but what each unit is on the paired input.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count, check_positive, check_temperature
from tl_sparsify._internal.progress import progress as bar
from tl_sparsify._internal.ranks import share, summed, totalled
from tl_sparsify.core.circuit import REFIT, REFITTED_NEIGHBOURS, Circuit, NeighbourMap, Values
from tl_sparsify.core.distributions import NONE, InterventionDistribution, counterfactual, drawn_interventions
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import (
    answer_logits,
    batch_size_for,
    check_call,
    frozen,
    halving,
    shared_batches,
    unit_positions,
)
from tl_sparsify.core.intervene import ablate, intervened, recorded
from tl_sparsify.core.measure import Known, known_of, known_risk
from tl_sparsify.core.metrics import Metric, cross_entropy_slope, divergence, output_probes
from tl_sparsify.core.moments import mean_of, unit_moments
from tl_sparsify.core.probes import pulled
from tl_sparsify.core.reduction import Reduction, check_fingerprint, fingerprint
from tl_sparsify.core.units import Model, Units
from tl_sparsify.search.affine import neighbours

_FALL = 0.02  # of the validation risk: less does not count as progress

__all__ = [
    "counterfactual",
    "curvature_weighted",
    "mean",
    "mean_of",
    "neighbours",
    "newton",
    "reduced",
    "refit",
    "unit_moments",
    "zero",
]


@checked
def mean(model: Model, examples: Examples, units: Units, *, batch_size: int | None = None) -> Values:
    """Every unit's mean value (see :func:`unit_moments` for over what). One forward pass.

    Example:
        >>> tls.constants.mean(model, train, units)
        Values(constant for Units(12: 12 heads))
    """
    return mean_of(unit_moments(model, examples, units, batch_size=batch_size), model, units)


@checked
def zero(model: Model, examples: Examples, units: Units) -> Values:
    """Zero for every unit, of the width that the model shows. One forward pass of one example.

    Example:
        >>> tls.constants.zero(model, train, units).tensors[0].abs().max().item()
        0.0
    """
    shown = mean_of(unit_moments(model, examples[:1], units, batch_size=1), model, units)
    return Values(units, tuple(map(torch.zeros_like, shown.tensors)), "zero")


def reduced(model: Model, circuit: Circuit, values: Values, kind: str | None = None) -> Reduction:
    """The reduction of ``model`` to a circuit of the user's own, bound to the model by its fingerprint; ``kind`` is
    that of the values where not given.

    Example:
        >>> tls.constants.reduced(model, tls.Circuit.of(units, ["L0H2", "L1H0"]), means)
        Reduction(Circuit(2 of 12 units: 2 heads), mean values)
    """
    values = values if kind is None else replace(values, kind=kind)
    return Reduction(circuit, values, fingerprint=fingerprint(model))


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
    learning_rate: float = 0.05,
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

    With ``patience`` the learning rate stays as it is, and the fit ends early when the validation risk, taken every
    ``patience / 10`` steps, has not fallen by two percent in so many steps.

    A step is on ``per_step`` examples (``None``: all of ``train``), ``batch_size`` of them at a time (as many as fit
    where not given): the numbers do not depend on that. ``known`` may come from an earlier refit of the same model on
    the same examples and units (:func:`measure.known_of`); the reduction is then not checked to be the model's.

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
    check_call(model, train, seed=seed, batch_size=batch_size)
    if known is None:
        check_fingerprint(model, reduction)
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
    start = reduction.values.tensors
    clean = interventions == NONE
    size = len(train) if per_step is None else min(per_step, len(train))
    many = steps * size > len(train)
    if known is None:
        known = known_of(model, train, reduction.units, clean=clean, many=many, batch_size=batch_size)
    deviations, logits = known.deviations, known.logits if many else None
    sites = reduction.units.sites
    scales = [
        (s * site.by_row(gone)[:, None].to(s)).to(v)
        for site, s, gone, v in zip(sites, deviations, reduction.units.split(removed), start, strict=True)
    ]
    mixing = reduction.mixing or (None,) * len(start)
    slopes = [None if part is None else _slope_scale(part, s[:, 0]) for part, s in zip(mixing, deviations, strict=True)]
    theta = [torch.zeros_like(v).requires_grad_() for v in start]
    theta += [torch.zeros_like(part.weights).requires_grad_() for part in mixing if part is not None]

    def at(parameters: list[Float[Tensor, "..."]]) -> Reduction:
        moved = tuple(v + s.to(v) * t for v, s, t in zip(start, scales, parameters, strict=False))
        rest = iter(parameters[len(start) :])
        mixed = tuple(
            None if part is None or scale is None else replace(part, weights=part.weights + scale * next(rest))
            for part, scale in zip(mixing, slopes, strict=True)
        )
        kept_affine = None if reduction.mixing is None else mixed
        values = Values(reduction.units, moved, REFIT if reduction.mixing is None else REFITTED_NEIGHBOURS)
        return replace(reduction, values=values, reference=reduction.baseline, mixing=kept_affine)

    judging: dict[str, Any] = {"metric": metric, "interventions": interventions, "seed": seed}
    judging |= {"batch_size": batch_size, "recall": known.recall}

    def validated(parameters: list[Float[Tensor, "..."]]) -> float:
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

    optimizer = torch.optim.Adam(theta, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 0.0 if patience is None else learning_rate)
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


def _slope_scale(mixing: NeighbourMap, deviation: Float[Tensor, "units"]) -> Float[Tensor, "entries"]:
    """The natural size of a change in a map's weights: the removed unit's deviation over the kept one's, shared among
    the removed unit's neighbours."""
    shared = torch.bincount(mixing.rows, minlength=mixing.size).double().sqrt()[mixing.rows]
    scale = deviation[mixing.rows] / deviation[mixing.columns].clamp_min(1e-12) / shared.to(deviation)
    return torch.where(deviation[mixing.columns] > 0, scale, 0.0).to(mixing.weights)


@checked
def curvature_weighted(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    probes: int = 4,
    temperature: float = 1.0,
    metric: Metric | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Values:
    """The constant that is best for each unit alone to second order: the curvature-weighted mean
    ``(E[g g'])^+ E[g g' v]`` over examples and positions (arXiv 2602.24266, closed form). Where the output does not
    depend on a unit it is the mean.

    Best one by one is not best together: used for many units at once these were measured to be worse than means.

    Two forward and ``probes`` backward passes over the data.

    Raises:
        ValueError: a model in training mode, NaN or infinite activations.

    Example:
        >>> tls.constants.curvature_weighted(model, train, units, temperature=3.0)
        Values(constant for Units(12: 12 heads))
    """
    settings = {"probes": probes, "temperature": temperature, "metric": metric, "seed": seed}

    def parts() -> Iterator[list[Tensor]]:
        for values, gradients, _ in _gradients("curvature_weighted", model, examples, units, batch_size, settings):
            g = [torch.cat([probe[site].flatten(0, 1) for probe in gradients]).double() for site in range(len(values))]
            v = [value.flatten(0, 1).double().repeat(len(gradients), 1, 1) for value in values]
            outer = [torch.einsum("suw,sux->uwx", a, a) for a in g]
            yield [*outer, *(torch.einsum("suw,su->uw", a, (a * b).sum(-1)) for a, b in zip(g, v, strict=True))]

    sums = summed(parts(), len(examples))
    square, weighted = sums[: len(units.sites)], sums[len(units.sites) :]
    means = mean(model, examples, units, batch_size=batch_size)
    found: list[Tensor] = []
    for a, b, m in zip(square, weighted, means.tensors, strict=True):
        width = a.shape[-1]
        # Where the output does not depend on a unit the system is singular, and any constant is optimal: take the mean.
        ridge = 1e-6 * a.diagonal(dim1=1, dim2=2).mean(1)[:, None] + 1e-300
        damped = a + torch.diag_embed(ridge.expand(-1, width))
        found.append(torch.linalg.solve(damped, b + ridge * m.double()).to(m))
    return Values(units, tuple(found), "curvature")


@checked
def newton(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    damping: float = 1e-3,
    clip: bool = True,
    probes: int = 4,
    seed: int = 0,
    batch_size: int | None = None,
) -> Values:
    """The published Newton constant, against the labels: ``c = (sum h v - sum g) / (sum h + damping)`` for each
    entry of each unit, with ``g`` the gradient and ``h`` the (Gauss-Newton) diagonal of the Hessian of the
    cross-entropy (arXiv 2602.24266 v1, closed-form replacement). ``damping`` is relative to the unit's largest ``h``,
    and pulls to the mean; ``clip`` keeps the constant in the range of the data.

    In a well-trained model ``h`` vanishes faster than the gradients average out. Undamped and unclipped
    (``damping=0, clip=False``) these constants destroy the model; a warning says how many left the data's range. Use
    :func:`refit`.

    Three forward and ``probes + 1`` backward passes over the data.

    Raises:
        ValueError: a negative ``damping``, a model in training mode, NaN or infinite activations.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # they leave the data's range, as they do in most trained models
        ...     tls.constants.newton(model, train, units, probes=1)
        Values(constant for Units(12: 12 heads))
    """
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping is {damping}; it must not be negative, and finite")
    settings = {"probes": probes, "temperature": 1.0, "metric": None, "seed": seed, "labels": True}

    def parts() -> Iterator[list[list[Tensor]]]:
        for values, gradients, where in _gradients("newton", model, examples, units, batch_size, settings):
            sites: list[list[Tensor]] = []
            for site, value in enumerate(values):
                v = value.double()
                h = torch.stack([g[site].double().square() for g in gradients[:-1]]).sum(0)
                seen = v[where[site]]
                low, high = seen.amin(0), seen.amax(0)
                slope = gradients[-1][site].double().sum((0, 1))
                sites.append([(h * v).sum((0, 1)), slope, h.sum((0, 1)), h.amax((0, 1)), low, high])
            yield sites

    joined = (torch.add, torch.add, torch.add, torch.maximum, torch.minimum, torch.maximum)

    def both(olds: list[list[Tensor]], news: list[list[Tensor]]) -> list[list[Tensor]]:
        return [
            [join(a, b) for join, a, b in zip(joined, old, new, strict=True)]
            for old, new in zip(olds, news, strict=True)
        ]

    totals = totalled(parts(), both, len(examples))
    means = mean(model, examples, units, batch_size=batch_size)
    found: list[Tensor] = []
    outside = 0
    for (hv, g, h, top, low, high), m in zip(totals, means.tensors, strict=True):
        extra = damping * len(examples) * top.amax(-1, keepdim=True)  # h is a sum over the examples
        bottom = h + extra
        c = torch.where(bottom > 0, (hv - g + extra * m.double()) / bottom.clamp_min(1e-300), m.double())
        outside += int(((c < low) | (c > high)).any(-1).sum())
        found.append((c.clamp(low, high) if clip else c).to(m))
    if outside:
        done = "clipped to it" if clip else "and were left there: expect the model to be destroyed"
        warnings.warn(
            f"Newton constants of {outside} of {len(units)} units left the data's range, {done}", stacklevel=3
        )
    return Values(units, tuple(found), "newton")


def _gradients(
    what: str, model: Model, examples: Examples, units: Units, batch_size: int | None, settings: dict[str, Any]
) -> Iterator[tuple[tuple[Tensor, ...], list[tuple[Tensor, ...]], list[Bool[Tensor, "batch pos"]]]]:
    """For each batch of this process's share the units' values per site, for each probe (with ``labels`` at last for
    the cross-entropy) the gradients per site, zero at positions where a unit is not meant, and per site the positions
    that hold input."""
    check_call(model, examples, seed=settings["seed"], batch_size=batch_size)
    check_count("probes", settings["probes"], most=MOST)
    check_temperature(settings["temperature"])
    labels = settings.pop("labels", False)
    if any(site.kind == "edge" for site in units.sites):
        raise ValueError(f"{what} gives each unit a constant; edges from one writer share theirs: take mean()")
    for index, batch in shared_batches(model, examples, batch_size):
        here = units.for_examples(index, examples.spans)
        with frozen(model), torch.enable_grad(), recorded(model, here, gradients=True) as recording:
            logits = answer_logits(model, batch)
            vectors = output_probes(logits.detach(), batch, index, **settings)
            if labels:
                vectors = [*vectors, cross_entropy_slope(logits.detach(), batch)]
            masks = [site.position_mask(*v.shape[:2]) for site, v in zip(here.sites, recording.read(), strict=True)]
            found = [
                tuple(
                    g if mask is None else g * mask.to(g)[..., None, None] for g, mask in zip(part, masks, strict=True)
                )
                for part in pulled(recording, logits, vectors)
            ]
        values = tuple(v.detach() for v in recording.read())
        yield values, found, [unit_positions(model, batch, s, v) for s, v in zip(here.sites, values, strict=True)]
