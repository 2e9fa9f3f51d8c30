"""Scores: one number for every unit that says how much is lost by removing it alone.

Every scorer is a function ``(model, examples, units, *, seed, ...) -> Scores``; larger means needed more. A one-unit
score cannot see redundancy or cancellation: :func:`tl_sparsify.sparsify` selects jointly.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify.circuit import Circuit, Reduction, Values
from tl_sparsify.constants import mean, unit_moments
from tl_sparsify.examples import Examples
from tl_sparsify.measure import Metric
from tl_sparsify.moments import Moments
from tl_sparsify.probes import samples
from tl_sparsify.units import Model, Units


@dataclass(frozen=True, eq=False)
class Scores:
    """A score for every unit.

    Attributes:
        units: the units.
        scores: larger = needed more, in ``measured_in``.
        stderr: the standard error over examples (NaN where the method has none).
        name: the method.
        measured_in: ``nats``, ``squared units``, ...
        forward_passes: over the data.
        backward_passes: over the data.
    """

    units: Units
    scores: Float[Tensor, "units"]
    stderr: Float[Tensor, "units"]
    name: str
    measured_in: str
    forward_passes: int
    backward_passes: int

    @property
    def order(self) -> Int[Tensor, "units"]:
        """Unit indices from the least to the most needed (ties in flat order)."""
        return self.scores.argsort(stable=True)

    def top(self, fraction: float) -> Circuit:
        """The circuit of the best ``fraction`` of the units."""
        mask = torch.zeros(len(self.units), dtype=torch.bool)
        mask[self.order[len(self.units) - kept_count(len(self.units), fraction) :].cpu()] = True
        return Circuit(self.units, mask)

    def to_frame(self) -> pd.DataFrame:
        """One row a unit: ``unit, kind, layer, index, score, stderr``."""
        return pd.DataFrame(
            {
                "unit": self.units.names,
                "kind": self.units.kinds,
                "layer": self.units.layers.numpy(),
                "index": [i for site in self.units.sites for i in range(site.size)],
                "score": self.scores.cpu().double().numpy(),
                "stderr": self.stderr.cpu().double().numpy(),
            }
        )

    def __repr__(self) -> str:
        best = self.units[int(self.order[-1])].name
        return f"Scores({self.name}, {self.measured_in}: {len(self.units):,} units, largest {best})"


def kept_count(n: int, fraction: float, name: str = "fraction") -> int:
    """How many of ``n`` units a fraction keeps: at least one. ``name`` is what the caller calls it.

    Raises:
        ValueError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"{name} is {fraction}; it must lie in (0, 1]")
    return max(1, round(fraction * n))


def risk(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    values: Values | None = None,
    probes: int = 4,
    temperature: float = 1.0,
    metric: Metric | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Scores:
    """Second-order risk of removing each unit alone, ``1/2 E[a[u]^2]`` (arXiv 2602.24266, second-order expansion,
    against the original output): nats, or half squared units of ``metric``.

    One forward and ``probes`` backward passes over the data for all units together (fewer backward passes where
    fewer probes are exact), and one forward pass for the means where ``values`` are not given. With ``temperature``
    other than 1 the score is ``temperature**2`` times the risk at that temperature.

    Raises:
        ValueError: a model in training mode, NaN or infinite activations, wrong ``probes`` or ``temperature``.
    """
    given = values is not None
    values = values if values is not None else mean(model, examples, units, batch_size=batch_size)
    settings = {"probes": probes, "temperature": temperature, "metric": metric}
    removal = Reduction(Circuit.full(units), values)
    parts: list[Moments] = []
    backward = 0
    for part in samples(model, examples, removal, seed=seed, batch_size=batch_size, **settings):
        parts.append(Moments.of(part.effects.double().square().sum(0) / 2))
        backward = len(part.effects)
    total = Moments.merge(parts)
    unit = "squared units" if metric is not None else "nats" if temperature == 1 else f"{temperature:g}^2 nats"
    return Scores(units, total.mean, total.stderr, "risk", unit, 1 if given else 2, backward)


def variance(model: Model, examples: Examples, units: Units, *, seed: int = 0, batch_size: int | None = None) -> Scores:
    """The variance of each unit's value over examples and positions, summed over its width (activation units
    squared): risk if curvature were the same everywhere, which rescaling a unit fools. One forward pass."""
    moments = unit_moments(model, examples, units, batch_size=batch_size)
    scores = torch.cat([part.variance.sum(-1) for part in moments])
    return Scores(units, scores, torch.full_like(scores, float("nan")), "variance", "activation variance", 1, 0)
