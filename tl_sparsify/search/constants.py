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
from jaxtyping import Bool
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count, check_temperature
from tl_sparsify._internal.ranks import summed, totalled
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.distributions import counterfactual
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import (
    answer_logits,
    answer_rows,
    check_call,
    frozen,
    shared_batches,
    unit_positions,
)
from tl_sparsify.core.intervene import recorded
from tl_sparsify.core.metrics import Metric, cross_entropy_slope, output_probes
from tl_sparsify.core.moments import mean_of, unit_moments
from tl_sparsify.core.probes import pulled
from tl_sparsify.core.reduction import Reduction, fingerprint
from tl_sparsify.core.units import Model, Units
from tl_sparsify.search.affine import neighbours
from tl_sparsify.search.refitting import refit

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
    first = units.for_examples(torch.arange(1))
    shown = mean_of(unit_moments(model, examples[:1], first, batch_size=1), model, first)
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

    Two forward and ``probes`` backward passes over the data (fewer backward where fewer probes are exact).

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
    cross-entropy, of an example the mean over its answers (arXiv 2602.24266 v1, closed-form replacement). ``damping``
    is relative to the unit's largest ``h``, and pulls to the mean; ``clip`` keeps the constant in the range of the
    data.

    In a well-trained model ``h`` vanishes faster than the gradients average out. Undamped and unclipped
    (``damping=0, clip=False``) these constants destroy the model; a warning says how many left the data's range. Use
    :func:`refit`.

    Two forward and ``probes + 1`` backward passes over the data (fewer backward where fewer probes are exact).

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
    the cross-entropy) the gradients per site, zero where a unit is not meant or left alone, and per site the positions
    that hold input."""
    check_call(model, examples, units, seed=settings["seed"], batch_size=batch_size)
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
                example = answer_rows(batch)[0]
                answers = torch.bincount(example)[example].to(logits)[:, None]
                vectors = [*vectors, cross_entropy_slope(logits.detach(), batch) / answers]
            values = tuple(v.detach() for v in recording.read())
            where = [unit_positions(model, batch, site, v) for site, v in zip(here.sites, values, strict=True)]
            found = [
                tuple(g * mask.to(g)[..., None, None] for g, mask in zip(part, where, strict=True))
                for part in pulled(recording, logits, vectors)
            ]
        yield values, found, where
