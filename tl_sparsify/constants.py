"""Constants: what a removed unit is replaced by.

``mean`` and ``zero`` give a value for every unit; ``refit`` takes a reduction and fits the values of all its removed
units together in the ablated model. All of them are constants over examples and positions, so they fold.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparsify import _random
from tl_sparsify._progress import progress as bar
from tl_sparsify.circuit import Circuit, Reduction, Values, check_fingerprint, fingerprint
from tl_sparsify.examples import Examples
from tl_sparsify.intervene import (
    ablate,
    answer_logits,
    batch_size_for,
    check_model,
    frozen,
    intervened,
    output,
    recorded,
    valid_positions,
)
from tl_sparsify.measure import Metric, divergence, risk
from tl_sparsify.moments import Moments
from tl_sparsify.units import Model, Units


def unit_moments(
    model: Model, examples: Examples, units: Units, *, batch_size: int | None = None
) -> tuple[Moments, ...]:
    """Per site the moments ``[units, width]`` of the units' values over examples and positions that are neither
    padding nor the beginning-of-sequence token (and, for units at positions, only there). One forward pass.

    Raises:
        ValueError: a model in training mode; NaN or infinite activations, with the hook point's name.
    """
    check_model(model)
    totals: list[Moments] | None = None
    with torch.no_grad():
        for index, batch in examples.batches(batch_size_for(model, examples, batch_size)):
            with recorded(model, units) as recording:
                output(model, batch)
            valid = valid_positions(model, batch)
            parts: list[Moments] = []
            for site, v in zip(units.for_examples(index).sites, recording.read(), strict=True):
                if not bool(torch.isfinite(v).all()):
                    raise ValueError(f"activations at hook point {site.hook} are NaN or infinite")
                wanted = valid if valid.shape == v.shape[:2] else torch.ones(v.shape[:2], dtype=torch.bool)
                where = site.position_mask(*v.shape[:2])
                wanted = wanted if where is None else wanted & where
                parts.append(Moments.of(v[wanted.to(v.device)]))
            totals = parts if totals is None else [a + b for a, b in zip(totals, parts, strict=True)]
    return tuple(totals or ())


def mean(model: Model, examples: Examples, units: Units, *, batch_size: int | None = None) -> Values:
    """Every unit's mean value (see :func:`unit_moments` for over what). One forward pass."""
    return mean_of(unit_moments(model, examples, units, batch_size=batch_size), model, units)


def mean_of(moments: tuple[Moments, ...], model: Model, units: Units) -> Values:
    """The means in ``moments``, in the model's precision (float32 at least)."""
    dtype = next(iter(model.parameters())).dtype
    dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    return Values(units, tuple(part.mean.to(dtype) for part in moments))


def zero(model: Model, examples: Examples, units: Units) -> Values:
    """Zero for every unit, of the width that the model shows. One forward pass of one example."""
    return Values(units, tuple(torch.zeros_like(tensor) for tensor in mean(model, examples[:1], units).tensors))


def reduced(model: Model, circuit: Circuit, values: Values, kind: str = "mean") -> Reduction:
    """The reduction of ``model`` to a circuit of the user's own, bound to the model by its fingerprint."""
    return Reduction(circuit, values, kind, fingerprint=fingerprint(model))


def refit(
    model: Model,
    reduction: Reduction,
    train: Examples,
    validation: Examples,
    *,
    steps: int = 300,
    learning_rate: float = 0.05,
    metric: Metric | None = None,
    batch_size: int | None = 512,
    seed: int = 0,
    progress: bool = True,
) -> Reduction:
    """Fit the constants of all removed units together, on the divergence from the original output, in the ablated
    model.

    Adam on the values in units of each one's standard deviation over ``train`` (so that rescaling a neuron and its
    reader changes nothing), with a cosine schedule; the values that do best on ``validation`` are returned, never
    worse there than the values given. The kept units' entries and ``baseline`` stay what they were.

    About ``steps * batch_size`` examples of two forward and one backward pass, one forward pass over ``train`` and
    22 over ``validation``.

    Raises:
        ValueError: a model in training mode, a reduction of another model, fewer than one step.
    """
    check_model(model)
    check_fingerprint(model, reduction)
    if steps < 1:
        raise ValueError(f"steps is {steps}; refit needs at least one")
    removed = (~reduction.circuit).mask
    if not bool(removed.any()):
        return replace(reduction, kind="refit", reference=reduction.baseline)
    start = reduction.values.tensors
    spread = [m.variance.mean(-1, keepdim=True).sqrt() for m in unit_moments(model, train, reduction.units)]
    scales = [
        (s * gone[:, None].to(s)).to(v)
        for s, gone, v in zip(spread, reduction.units.split(removed), start, strict=True)
    ]
    theta = [torch.zeros_like(v).requires_grad_() for v in start]

    def at(parameters: list[Float[Tensor, "..."]]) -> Reduction:
        moved = tuple(v + s.to(v) * t for v, s, t in zip(start, scales, parameters, strict=True))
        return replace(reduction, values=Values(reduction.units, moved), kind="refit", reference=reduction.baseline)

    def validated(parameters: list[Float[Tensor, "..."]]) -> float:
        return risk(model, at(parameters), validation, metric=metric).mean

    best, lowest = [t.detach().clone() for t in theta], validated([t.detach() for t in theta])
    size = batch_size_for(model, train, None if batch_size is None else min(batch_size, len(train)))
    per_epoch = max(1, len(train) // size)
    every = max(1, steps // 10)
    optimizer = torch.optim.Adam(theta, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with frozen(model):
        for step in bar(range(steps), "refitting constants", progress):
            order = _random.permutation(len(train), seed, 41, step // per_epoch)
            batch = train[order[(step % per_epoch) * size :][:size].sort().values]
            with torch.no_grad():
                original = answer_logits(model, batch)
            with torch.enable_grad(), intervened(model, ablate(at(theta))):
                loss = divergence(original, answer_logits(model, batch), batch, metric).mean()
            gradients = torch.autograd.grad(loss, theta, allow_unused=True)
            for parameter, gradient in zip(theta, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            if (step + 1) % every == 0 or step + 1 == steps:
                found = validated([t.detach() for t in theta])
                if found < lowest:
                    best, lowest = [t.detach().clone() for t in theta], found
    return at(best)
