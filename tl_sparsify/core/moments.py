"""Moments: count, mean and spread as an additive statistic in float64.

Partial statistics of any split of the data add up to the whole's (Chan, Golub and LeVeque, 1979), so results do not
depend on batches or processes, and memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal.checks import all_finite
from tl_sparsify._internal.ranks import totalled
from tl_sparsify.core.circuit import Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import in_batches, output, unit_positions
from tl_sparsify.core.intervene import recorded
from tl_sparsify.core.memory import dtype_of
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Model, Units, check_positions


@dataclass(frozen=True, eq=False)
class Moments:
    """Number, mean and summed squared deviation of samples; ``+`` merges two of them.

    Attributes:
        count: number of samples (may differ by entry), broadcastable to ``mean``.
        mean: their mean.
        spread: the sum of squared deviations from the mean.

    Example:
        >>> total = tls.Moments.of(torch.arange(4.0)) + tls.Moments.of(torch.arange(4.0, 10.0))
        >>> total.mean.item(), total.variance.item()
        (4.5, 8.25)
    """

    count: Float[Tensor, "..."]
    mean: Float[Tensor, "..."]
    spread: Float[Tensor, "..."]

    @staticmethod
    def of(samples: Float[Tensor, "n *shape"], weights: Float[Tensor, "n *shape"] | None = None) -> Moments:
        """The moments of ``samples`` over their first dimension; ``weights`` of 0 and 1 leave samples out."""
        samples = samples.detach().double()
        if weights is None:
            count = torch.full(samples.shape[1:], float(len(samples)), dtype=torch.float64, device=samples.device)
            mean = samples.mean(0) if len(samples) else samples.new_zeros(samples.shape[1:])
            return Moments(count, mean, (samples - mean).square().sum(0))
        weights = weights.to(samples).expand_as(samples)
        count = weights.sum(0)
        mean = (weights * samples).sum(0) / count.clamp_min(1e-300)  # where nothing is counted it is 0, and weighs 0
        return Moments(count, mean, (weights * (samples - mean).square()).sum(0))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        share = other.count / count.clamp_min(1e-300)
        step = other.mean - self.mean  # the means' distance adds to the spread what lies between the groups
        spread = self.spread + other.spread + step.square() * self.count * share
        return Moments(count, self.mean + step * share, spread)

    def __getitem__(self, index: slice) -> Moments:
        """The moments of some entries of the first dimension."""
        return Moments(self.count[index], self.mean[index], self.spread[index])

    @staticmethod
    def merge(parts: Iterable[Moments]) -> Moments:
        """The moments of everything that the parts were taken of."""
        return reduce(Moments.__add__, parts)

    @property
    def variance(self) -> Float[Tensor, "..."]:
        """The population variance (divided by ``count``)."""
        return self.spread / self.count.clamp_min(1e-300)

    @property
    def stderr(self) -> Float[Tensor, "..."]:
        """The standard error of the mean: sample deviation over the root of ``count``; infinite for one sample."""
        # spread / (count - 1) estimates the variance without bias; a mean of count samples varies count times less
        several = (self.spread / (self.count - 1).clamp_min(1) / self.count.clamp_min(1)).sqrt()
        return torch.where(self.count > 1, several, float("inf"))

    @staticmethod
    def over(parts: Iterable[Moments], n: int) -> Moments:
        """:meth:`merge` over all processes, of which each has made the parts of its share of ``n`` examples."""
        return totalled(parts, Moments.__add__, n)

    def all_reduce(self) -> Moments:
        """The moments over all processes of ``torch.distributed``'s default group (itself where there is none)."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        packed = torch.stack(torch.broadcast_tensors(self.count, self.mean, self.spread))
        parts = [torch.empty_like(packed) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, packed)
        return Moments.merge(Moments(*part) for part in parts)


@dataclass(frozen=True)
class Estimate:
    """A mean over examples with its standard error: ``0.031 ± 0.002 nats (n=512)``.

    Example:
        >>> tls.Estimate(0.031, 0.002, 512, "nats")
        0.031 ± 0.002 nats (n=512)
    """

    mean: float
    stderr: float
    n: int
    unit: str = ""

    @staticmethod
    def of(moments: Moments, unit: str = "") -> Estimate:
        """The estimate that scalar moments stand for."""
        return Estimate(float(moments.mean), float(moments.stderr), int(moments.count), unit)

    def __float__(self) -> float:
        return self.mean

    def __repr__(self) -> str:
        return f"{self.mean:.4g} ± {self.stderr:.2g} {self.unit}{' ' if self.unit else ''}(n={self.n:,})"


def unit_moments(
    model: Model, examples: Examples, units: Units, *, batch_size: int | None = None
) -> tuple[Moments, ...]:
    """Per site the moments ``[units, width]`` of the units' values over examples and positions that are neither
    padding nor the beginning-of-sequence token (and, for units at positions, only there). One forward pass.

    Raises:
        ValueError: a model in training mode; NaN or infinite activations, with the hook point's name.

    Example:
        >>> [tuple(site.mean.shape) for site in tls.constants.unit_moments(model, train, units)]
        [(4, 16), (4, 16), (4, 16)]
    """
    check_positions(units, len(examples))

    def of(index: Int[Tensor, "batch"], batch: Examples) -> tuple[Moments, ...]:
        return batch_moments(model, batch, units.for_examples(index, examples.spans))

    return totalled(in_batches(of, model, examples, batch_size), added, len(examples))


def batch_moments(model: Model, batch: Examples, units: Units) -> tuple[Moments, ...]:
    """The moments of one batch, as :func:`unit_moments`. One forward pass."""
    with torch.no_grad(), recorded(model, units) as recording:
        output(model, batch)
    parts: list[Moments] = []
    values = list(zip(units.sites, recording.read(), strict=True))
    writers: dict[Any, Moments] = {}  # edges' writers begin alike: once for all at the same positions
    for site, v in sorted(values, key=lambda pair: pair[0].rows, reverse=True):
        where = (site.suffix, id(site.positions))
        if site.kind == "edge" and where not in writers:
            writers[where] = _of_site(model, batch, site, v)
    for site, v in values:
        whole = writers.get((site.suffix, id(site.positions))) if site.kind == "edge" else None
        parts.append(_of_site(model, batch, site, v) if whole is None else whole[: site.rows])
    return tuple(parts)


def added(one: tuple[Moments, ...], other: tuple[Moments, ...]) -> tuple[Moments, ...]:
    """The moments of both, for each site."""
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _of_site(model: Model, batch: Examples, site: Site, v: Float[Tensor, "batch pos some width"]) -> Moments:
    if not all_finite(v):
        raise ValueError(f"activations at hook point {site.hook} are NaN or infinite")
    return Moments.of(v[unit_positions(model, batch, site, v)])


def mean_of(moments: tuple[Moments, ...], model: Model, units: Units) -> Values:
    """The means in ``moments``, in the model's precision (float32 at least).

    Example:
        >>> parts = [tls.constants.unit_moments(model, part, units) for part in (train[:32], train[32:])]
        >>> merged = tuple(tls.Moments.merge(site) for site in zip(*parts))
        >>> torch.allclose(tls.constants.mean_of(merged, model, units).tensors[0], means.tensors[0])
        True
    """
    dtype = dtype_of(model)
    dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    return Values(units, tuple(part.mean.to(dtype) for part in moments), "mean")
