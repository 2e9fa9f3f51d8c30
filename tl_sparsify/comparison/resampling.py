"""Resampling: what other examples from the same source would have given.

A measure's interval comes from the Poisson bootstrap (Hanley and MacGibbon, 2006; Chamandy et al., 2012): in every
replicate each example counts a random number of times, drawn from the Poisson distribution of mean 1. That number is a
function of (seed, example, replicate), so sums over batches are all that is kept, and a ratio of means is resampled as
a ratio. :func:`stability` says whether a *circuit* would have been another: the method runs anew on resampled examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import check_call
from tl_sparsify.core.units import Model, Units
from tl_sparsify.search.path import CircuitPath
from tl_sparsify.search.scores import Scores, kept_count

Method = Callable[..., Scores | CircuitPath]
"""A scorer, or a search such as :func:`tl_sparsify.sparsify`: ``(model, examples, units, *, seed, ...)``."""
_TOGETHER = 256  # examples whose weights are drawn at once
_POISSON = torch.tensor([1 / math.factorial(k) for k in range(20)], dtype=torch.float64).cumsum(0) / math.e


@checked
def check_bootstrap(replicates: int, level: float) -> None:
    """Refuse a negative number of replicates, and a level outside (0, 1)."""
    if replicates < 0:
        raise ValueError(f"bootstrap is {replicates}; give the number of replicates, 0 for no intervals")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it lies between 0 and 1")


@checked
def weights(index: Int[Tensor, "batch"], replicates: int, seed: int) -> Float[Tensor, "batch replicates"]:
    """How often each of the examples ``index`` counts in each replicate: independent draws from the Poisson
    distribution of mean 1. No model pass."""
    draws = _random.uniform(seed, 71, index[:, None], torch.arange(replicates))
    return torch.bucketize(draws, _POISSON, right=True).double()


@dataclass(frozen=True, eq=False)
class Resampled:
    """Weighted sums of samples in every replicate of the bootstrap; ``+`` merges those of two batches.

    Attributes:
        n: number of samples.
        weight: how often examples count, together.
        total: the weighted sum of the samples.
    """

    n: int
    weight: Float[Tensor, "replicates"]
    total: Float[Tensor, "replicates *shape"]

    @staticmethod
    def of(samples: Float[Tensor, "n *shape"], index: Int[Tensor, "n"], replicates: int, seed: int) -> Resampled:
        """The sums of one sample for each of the examples ``index``. ``O(n * replicates)`` operations."""
        samples = samples.detach().double().cpu()
        weight = torch.zeros(replicates, dtype=torch.float64)
        total = torch.zeros(replicates, *samples.shape[1:], dtype=torch.float64)
        for some in torch.arange(len(samples)).split(_TOGETHER):
            drawn = weights(index[some], replicates, seed)
            weight = weight + drawn.sum(0)
            total = total + torch.einsum("nr,n...->r...", drawn, samples[some])
        return Resampled(len(samples), weight, total)

    def __add__(self, other: Resampled) -> Resampled:
        return Resampled(self.n + other.n, self.weight + other.weight, self.total + other.total)

    @property
    def means(self) -> Float[Tensor, "replicates *shape"]:
        """The weighted mean in every replicate; NaN in one in which no example counts."""
        return self.total / self.weight.view(-1, *[1] * (self.total.ndim - 1))

    def interval(self, values: Float[Tensor, "replicates *shape"], level: float) -> Float[Tensor, "two *shape"]:
        """The percentile interval of a quantity computed in every replicate: the middle ``level`` of its values, those
        that are NaN left out. NaN without replicates, and for a single sample, which says nothing about others."""
        if not len(values) or self.n < 2:
            return torch.full((2, *values.shape[1:]), float("nan"), dtype=torch.float64)
        ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        return values.nanquantile(ends, dim=0)


@dataclass(frozen=True, eq=False)
class Stability:
    """How much a method's circuit depends on the examples that it saw and on its seed.

    Attributes:
        circuits: one for each draw of examples and seed, all of one size.

    Example:
        >>> found = tls.stability(tls.score.variance, model, train, units, fraction=0.25, draws=3)
        >>> len(found.circuits), len(found.circuits[0])
        (3, 3)
    """

    circuits: tuple[Circuit, ...]

    @cached_property
    def jaccard(self) -> Float[Tensor, "pairs"]:
        """For each two of the circuits, the units in both over those in either."""
        masks = torch.stack([circuit.mask.cpu().double() for circuit in self.circuits])
        both = masks @ masks.T
        either = masks.sum(1)[:, None] + masks.sum(1) - both
        first, second = torch.triu_indices(len(masks), len(masks), 1)
        return (both / either)[first, second]

    @property
    def mean(self) -> float:
        """The mean Jaccard index over all pairs."""
        return float(self.jaccard.mean())

    @property
    def min(self) -> float:
        """That of the two circuits which differ most."""
        return float(self.jaccard.min())

    @property
    def max(self) -> float:
        """That of the two circuits which differ least."""
        return float(self.jaccard.max())

    @property
    def chance(self) -> float:
        """That of random circuits of this size, in expectation."""
        return expected_jaccard(len(self.circuits[0].units), len(self.circuits[0]))

    @cached_property
    def frequency(self) -> Float[Tensor, "units"]:
        """The share of the circuits that each unit is in."""
        return torch.stack([circuit.mask.cpu().double() for circuit in self.circuits]).mean(0)

    def to_frame(self) -> pd.DataFrame:
        """One row a unit: ``unit, kind, layer, index, frequency``."""
        units = self.circuits[0].units
        return pd.DataFrame(
            {
                "unit": units.names,
                "kind": units.kinds,
                "layer": units.layers.numpy(),
                "index": [site.number(i) for site in units.sites for i in range(site.size)],
                "frequency": self.frequency.numpy(),
            }
        )

    def __repr__(self) -> str:
        first = self.circuits[0]
        return (
            f"Stability({len(first):,} of {len(first.units):,} units, {len(self.circuits)} draws: Jaccard "
            f"{self.mean:.3f} ({self.min:.3f} to {self.max:.3f}), of random circuits {self.chance:.3f})"
        )


@checked
def expected_jaccard(n: int, k: int) -> float:
    """The expected Jaccard index of two independent random sets of ``k`` out of ``n`` units:
    ``sum_i P(i) i / (2 k - i)`` with the number ``i`` of common units hypergeometric. ``O(k)`` operations.

    Raises:
        ValueError: ``k`` outside 1 to ``n``.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; it lies between 1 and the number of units, {n}")
    common = torch.arange(max(0, 2 * k - n), k + 1, dtype=torch.float64)
    ways = -((common + 1).lgamma() + 2 * (k - common + 1).lgamma() + (n - 2 * k + common + 1).lgamma())
    return float((ways.softmax(0) * common / (2 * k - common)).sum())


@checked
def stability(
    method: Method,
    model: Model,
    examples: Examples,
    units: Units,
    *,
    fraction: float = 0.1,
    draws: int = 5,
    seed: int = 0,
    **settings: Any,
) -> Stability:
    """How far a method finds the same circuit again: it runs ``draws`` times, each time on as many examples drawn with
    replacement and with a seed of its own, and the circuits of ``fraction`` of the units are compared.

    Args:
        method: a scorer or a search: ``(model, examples, units, *, seed, ...)`` to ``Scores`` or a ``CircuitPath``.
        settings: further arguments of the method (``progress=False``, ``held_out=validation``, ...).

    Cost: ``draws`` times the method's.

    Raises:
        ValueError: fewer than two draws, a fraction outside (0, 1], a method that returns something else; what the
            method raises.

    Example:
        >>> tls.stability(tls.score.variance, model, train, units, fraction=0.25, draws=3)
        Stability(3 of 12 units, 3 draws: Jaccard ...)
    """
    check_call(model, examples, units, seed=seed)
    check_count("draws", draws, least=None, most=MOST)
    if draws < 2:
        raise ValueError(f"draws is {draws}; circuits are compared in pairs, so give at least 2")
    kept_count(len(units), fraction)
    circuits: list[Circuit] = []
    n = len(examples)
    for draw in range(draws):
        index = (_random.uniform(seed, 73, draw, torch.arange(n)) * n).long()
        own = int(_random.bits(seed, 79, draw)) % 2**31
        found = method(model, examples[index], units.for_examples(index, examples.spans), seed=own, **settings)
        if not isinstance(found, Scores | CircuitPath):
            raise ValueError(
                f"method returned {type(found).__name__}; stability needs one that returns Scores or a CircuitPath"
            )
        circuit = found.top(fraction) if isinstance(found, Scores) else found.at(fraction).circuit
        circuits.append(Circuit(units, circuit.mask))
    return Stability(tuple(circuits))
