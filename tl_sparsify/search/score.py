"""Scores: one number for every unit that says how much is lost by removing it alone.

Every scorer is a function ``(model, examples, units, *, seed, ...) -> Scores``; larger means needed more. A one-unit
score cannot see redundancy or cancellation: :func:`additivity` says how much that matters, and
:func:`tl_sparsify.sparsify` selects jointly.

==================  =====================================================  ====================================
score               what it is                                             forward + backward passes
==================  =====================================================  ====================================
``risk``            divergence to second order                             1 + ``probes``
``variance``        of the unit's value                                    2 + 0
``scaled_variance`` of what the unit writes                                2 + 0
``gradient``        a metric's drop to first order, signed                 2 + 1
``integrated``      the same along the line to every unit removed          1 + ``steps``, ``steps``
``exact``           divergence, or a metric's drop, by removing the unit   2 + number of units, 0
==================  =====================================================  ====================================
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count, check_temperature
from tl_sparsify._internal.ranks import gathered, summed
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.distributions import NONE, InterventionDistribution
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import check_call, fitting, output, shared_batches, unit_positions
from tl_sparsify.core.intervene import recorded
from tl_sparsify.core.memory import device_of, dtype_of
from tl_sparsify.core.metrics import Metric
from tl_sparsify.core.moments import Estimate, Moments, unit_moments
from tl_sparsify.core.probes import samples
from tl_sparsify.core.reduction import Reduction, check_fingerprint
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Model, Units
from tl_sparsify.gradients.backward import Name, Rules, modified, named
from tl_sparsify.search.alone import alone
from tl_sparsify.search.attribution import exact, gradient, integrated
from tl_sparsify.search.constants import mean
from tl_sparsify.search.scores import Scores, kept_count

__all__ = [
    "Scores",
    "additivity",
    "exact",
    "gradient",
    "integrated",
    "kept_count",
    "risk",
    "scaled_variance",
    "variance",
]


@checked
def risk(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    values: Values | None = None,
    probes: int = 4,
    temperature: float = 1.0,
    metric: Metric | None = None,
    interventions: InterventionDistribution = NONE,
    backward: Name | Rules = "true",
    seed: int = 0,
    batch_size: int | None = None,
) -> Scores:
    """Second-order risk of removing each unit alone, ``1/2 E[a[u]^2]`` (arXiv 2602.24266, second-order expansion,
    against the original output): nats, or half squared units of ``metric``. With ``interventions`` both models are
    under them (a unit that is itself interchanged is removed from the value that it then has). With ``backward`` other
    than ``true`` probes are differentiated by those rules (:mod:`tl_sparsify.gradients.backward`), and the score is no
    expansion of the divergence any more.

    One forward and ``probes`` backward passes over the data for all units together (fewer backward passes where
    fewer probes are exact). Where ``values`` are not given the means come from the same pass; from one more under
    ``interventions``, and for very many wide units (:mod:`tl_sparsify.search.alone`). One forward pass more for each
    ``interchange`` in the distribution. With ``temperature`` other than 1 the score is ``temperature**2`` times the
    risk at that temperature.

    Raises:
        ValueError: a model in training mode, NaN or infinite activations, wrong ``probes`` or ``temperature``.

    Example:
        >>> scores = tls.score.risk(model, train, units, temperature=3.0, seed=0)
        >>> scores.measured_in, scores.top(0.25).names
        ('3^2 nats', ('L0H2', 'L1H0', 'L1H1'))
    """
    check_call(model, examples, units, seed=seed, batch_size=batch_size)
    check_count("probes", probes, least=None, most=MOST)
    check_temperature(temperature)
    settings: dict[str, Any] = {"probes": probes, "temperature": temperature, "metric": metric}
    unit = "squared units" if metric is not None else "nats" if temperature == 1 else f"{temperature:g}^2 nats"
    forward = 1
    edges = any(site.kind == "edge" for site in units.sites)  # as many slopes as entries of a value: not kept
    if values is None and interventions == NONE and not edges and probes >= 1 and temperature > 0:

        def run(size: int) -> tuple[Values, Moments | None, int]:
            with modified(model, backward):
                return alone(model, examples, units, batch_size=size, seed=seed, **settings)

        values, found, pulls = fitting(run, model, examples, batch_size)
        if found is not None:
            return Scores(units, found.mean, found.stderr, named("risk", backward), unit, 1, pulls)
        forward = 2
    elif values is None:
        values, forward = mean(model, examples, units, batch_size=batch_size), 2
    settings |= {"interventions": interventions}
    removal = Reduction(Circuit.full(units), values)
    pulls = 0

    def parts() -> Iterator[Moments]:
        nonlocal pulls
        for part in samples(model, examples, removal, seed=seed, batch_size=batch_size, **settings):
            pulls = len(part.effects)
            yield Moments.of(part.effects.double().square().sum(0) / 2)

    with modified(model, backward):
        total = Moments.over(parts(), len(examples))
    return Scores(units, total.mean, total.stderr, named("risk", backward), unit, forward, pulls)


@checked
def variance(model: Model, examples: Examples, units: Units, *, seed: int = 0, batch_size: int | None = None) -> Scores:
    """The variance of each unit's value over examples and positions, summed over its width (activation units
    squared): risk if curvature were the same everywhere, which rescaling a unit fools. Edges from one writer are all
    alike: their value is what it writes.

    Two forward passes: the means, and the deviations with their standard error over examples.

    Raises:
        ValueError: a model in training mode, NaN or infinite activations.

    Example:
        >>> tls.score.variance(model, train, units).top(0.25).names
        ('L0H2', 'L1H0', 'L1H1')
    """
    check_call(model, examples, units, seed=seed, batch_size=batch_size)
    same = tuple(torch.ones(site.rows, dtype=torch.float64) for site in units.sites)
    scores, stderr = _spread(model, examples, units, same, batch_size)
    return Scores(units, scores, stderr, "variance", "activation variance", 2, 0)


@checked
def scaled_variance(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    readers: Mapping[str, Float[Tensor, "..."]] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Scores:
    """The variance of what each unit writes, ``trace(D' Cov(v) D)`` with ``D`` the map that reads the unit; for a
    scalar unit ``Var(v) |D|^2`` (arXiv 2602.24266, the rule for a last hidden layer; squared units of what is
    written). The cheapest score that rescaling a unit and its reader cannot fool. Whether the output depends on what
    is written it does not see.

    ``D`` is the head's block of ``W_O``, the neuron's row of ``W_out``, the identity for whole layers and for edges
    (whose value is what their writer writes), and for directions their columns in the activation (1 for orthonormal
    ones). A norm between that and the stream (Gemma's) is not part of it.

    Args:
        readers: for other models, or to say otherwise: hook name to ``[units, width, out]`` or, for units of one
            number, ``[units, out]``.

    Two forward passes: the means, and the deviations with their standard error over examples.

    Raises:
        ValueError: a model in training mode, NaN or infinite activations, units whose reader is not known, readers
            of another shape or of a hook point that has no units here.

    Example:
        >>> tls.score.scaled_variance(model, train, units).top(0.25).names
        ('L0H2', 'L1H0', 'L1H1')
    """
    check_call(model, examples, units, seed=seed, batch_size=batch_size)
    readers = readers or {}
    hooks = {site.hook for site in units.sites}
    for hook in readers:
        if hook not in hooks:
            raise ValueError(f"readers names {hook!r}; the units lie at {', '.join(sorted(hooks))}")
    found = tuple(_reader(model, site, readers.get(site.hook)) for site in units.sites)
    scores, stderr = _spread(model, examples, units, found, batch_size)
    return Scores(units, scores, stderr, "scaled variance", "written variance", 2, 0)


@checked
def additivity(
    model: Model,
    examples: Examples,
    reduction: Reduction,
    *,
    probes: int = 4,
    metric: Metric | None = None,
    interventions: InterventionDistribution = NONE,
    seed: int = 0,
    batch_size: int | None = None,
) -> Estimate:
    """How far scores of single units add up for the removed units: ``(R_joint - sum_u R_u) / R_joint``, both to
    second order at the original model, at temperature 1.

    0: the sum of the single risks is the joint risk. Towards 1: units that each look harmless are not harmless
    together (backups). Below 0: removals cancel. Far from 0 no one-unit score can be trusted, and rounds are needed
    (:func:`tl_sparsify.sparsify`). The standard error is that of a ratio of means over examples.

    One forward and ``probes`` backward passes over the data; one forward pass more for each ``interchange`` in the
    distribution.

    Raises:
        ValueError: a model in training mode, a reduction of another model, with affine replacements or of no unit.

    Example:
        >>> tls.score.additivity(model, train, reduction).mean < 0.5  # these heads nearly add up
        True
    """
    check_call(model, examples, reduction.units, seed=seed, batch_size=batch_size)
    check_count("probes", probes, least=None, most=MOST)
    check_fingerprint(model, reduction)
    if reduction.mixing is not None:
        raise ValueError("reduction has affine replacements: additivity is that of units set to constants")
    removed = ~reduction.circuit.mask
    if not bool(removed.any()):
        raise ValueError(f"reduction removes none of {reduction.units!r}: there is nothing to add up")
    settings = {"probes": probes, "metric": metric, "interventions": interventions}

    def risks(effects: Float[Tensor, "probes batch units"]) -> Float[Tensor, "two batch"]:
        gone = effects[..., removed.to(effects.device)].double()
        return torch.stack([gone.sum(2).square().sum(0), gone.square().sum((0, 2))]) / 2

    parts = samples(model, examples, reduction, seed=seed, batch_size=batch_size, **settings)
    joint, alone = torch.cat(gathered((risks(part.effects) for part in parts), len(examples)), 1)
    if not bool(alone.any()):
        return Estimate(0.0, 0.0, len(examples))  # nothing reads these units
    # A ratio of means, its error by the delta method: a mean of ratios would be ruled by examples of tiny risk.
    ratio = alone.mean() / joint.mean()
    scatter = Moments.of((alone - ratio * joint) / joint.mean())
    return Estimate(float(1 - ratio), float(scatter.stderr), len(examples))


def _spread(
    model: Model,
    examples: Examples,
    units: Units,
    readers: tuple[Float[Tensor, "..."], ...],
    batch_size: int | None,
) -> tuple[Float[Tensor, "units"], Float[Tensor, "units"]]:
    """The variance over examples and positions of every unit as its reader (:func:`_reader`) sees it, and its standard
    error: of a ratio, since examples may differ in how many positions they have."""
    means = [part.mean for part in unit_moments(model, examples, units, batch_size=batch_size)]
    nothing = torch.zeros(5, len(units), dtype=torch.float64, device=means[0].device)

    def parts() -> Iterator[tuple[Tensor]]:
        for index, batch in shared_batches(model, examples, batch_size):
            here = units.for_examples(index, examples.spans)
            with recorded(model, here) as recording:
                output(model, batch)
            q: list[Float[Tensor, "batch some"]] = []
            n: list[Float[Tensor, "batch some"]] = []
            for site, v, m, reader in zip(here.sites, recording.read(), means, readers, strict=True):
                where = unit_positions(model, batch, site, v).double()
                squares = torch.einsum("bp,bpu->bu", where, _seen(site, v.double() - m, reader.to(m)))
                q.append(squares.repeat(1, len(site.readers) or 1).to(nothing))  # an edge's value is its writer's
                n.append(where.sum(1, keepdim=True).expand(-1, site.size).to(nothing))
            total, count = torch.cat(q, 1), torch.cat(n, 1)
            products = (total, count, total * total, total * count, count * count)
            yield (torch.stack([product.sum(0) for product in products]),)

    with torch.no_grad():
        (sums,) = summed(parts(), len(examples))
    q1, n1, qq, qn, nn = sums  # squares, positions, and the second moments of both: what the delta method needs
    n1 = n1.clamp_min(1)
    scores = q1 / n1
    # the sum over examples of (q - score n)^2, multiplied out, so that one pass is enough; then n / (n - 1)
    scatter = (qq - 2 * scores * qn + scores.square() * nn).clamp_min(0) / (1 - 1 / max(2, len(examples)))
    return scores, (scatter.sqrt() / n1).masked_fill(torch.tensor(len(examples) == 1), float("inf"))


def _seen(
    site: Site, deviation: Float[Tensor, "batch pos some width"], reader: Float[Tensor, "..."]
) -> Float[Tensor, "batch pos some"]:
    """The squared length of each unit's deviation after its reader."""
    if reader.ndim == 1:
        return deviation.square().sum(-1) * reader
    if reader.shape[2] != deviation.shape[-1]:
        raise ValueError(
            f"readers of {site.hook} take units of width {reader.shape[2]}, there they have width "
            f"{deviation.shape[-1]}: give [{site.rows}, {deviation.shape[-1]}, out]"
        )
    return torch.einsum("bpuw,urw->bpur", deviation, reader).square().sum(-1)


def _reader(model: Any, site: Site, given: Float[Tensor, "..."] | None) -> Float[Tensor, "..."]:
    """What a site's units are read by, as far as lengths go: a factor ``[units]`` on their squares, or the triangular
    factor ``[units, rows, width]`` of the map, which keeps lengths and has at most ``width`` rows."""
    match = re.fullmatch(r"blocks\.(\d+)\.(attn\.hook_z|mlp\.hook_post)", site.hook)
    if given is None and site.kind in ("head", "neuron") and match is not None and hasattr(model, "blocks"):
        block = model.blocks[int(match[1])]
        part, weight, last = (block.attn, "W_O", "o") if site.kind == "head" else (block.mlp, "W_out", "out")
        given = _written(model, part, weight, last, site.size)
    if given is not None:
        if given.ndim not in (2, 3) or len(given) != site.rows:
            raise ValueError(
                f"readers of {site.hook} have shape {tuple(given.shape)}; it must be [{site.rows}, width, out] "
                f"or [{site.rows}, out]"
            )
        wide = given.detach().double()
        return torch.linalg.qr((wide if wide.ndim == 3 else wide[:, None]).mT, mode="r").R
    if site.basis is not None and site.kind != "error":
        return site.basis.detach().double().square().sum(0)
    if site.kind in ("mlp", "attention", "residual", "error", "edge"):
        return torch.ones(site.rows, dtype=torch.float64)
    raise ValueError(
        f"readers has no entry for {site.hook!r}, and what reads its {site.kind} units is not known: "
        f"give readers={{{site.hook!r}: weights [{site.size}, width, out] or [{site.size}, out]}}"
    )


def _written(model: Any, part: Any, weight: str, last: str, size: int) -> Float[Tensor, "units *width out"]:
    """The weights that write a layer's units to the stream; where they are packed or elsewhere (quantised, offloaded)
    what its last map makes of each of its inputs."""
    try:
        return getattr(part, weight)
    except (NotImplementedError, RuntimeError, ValueError):
        linear = getattr(part, last).original_component
    width = getattr(linear, "in_features", getattr(linear, "nx", 0))  # nx: transformers' Conv1D
    with torch.no_grad():
        like = {"dtype": dtype_of(model), "device": device_of(model)}
        rows = linear(torch.eye(width, **like)) - linear(torch.zeros(1, width, **like))  # less the bias
    return rows if size == width else rows.view(size, width // size, -1)
