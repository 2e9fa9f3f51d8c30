"""Scores: one number for every unit, as a value. What makes them is in :mod:`tl_sparsify.search.score`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import check_count
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.units import Units


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

    Raises:
        ValueError: scores or errors that are not one for each unit.

    Example:
        >>> scores.top(0.25).names
        ('L0H2', 'L1H0', 'L1H1')
        >>> scores.to_frame().columns.tolist()
        ['unit', 'kind', 'layer', 'index', 'score', 'stderr']
    """

    units: Units
    scores: Float[Tensor, "units"]
    stderr: Float[Tensor, "units"]
    name: str
    measured_in: str
    forward_passes: int
    backward_passes: int

    def __post_init__(self) -> None:
        for name, numbers in (("scores", self.scores), ("stderr", self.stderr)):
            if numbers.shape != (len(self.units),):
                raise ValueError(
                    f"{name} has shape {tuple(numbers.shape)}, and units holds {len(self.units):,}: give one number "
                    "for each unit"
                )

    @property
    def order(self) -> Int[Tensor, "units"]:
        """Unit indices from the least to the most needed (ties in flat order).

        Raises:
            ValueError: a score that is NaN, which has no place.
        """
        if bool((unknown := self.scores.isnan()).any()):
            first = self.units.names[int(unknown.nonzero()[0])]
            raise ValueError(
                f"the score of {first} (and of {int(unknown.sum()) - 1} other units) is NaN, which has no place in an "
                "order: look at what it is made of (the metric, the values, the model's output)"
            )
        return self.scores.argsort(stable=True)

    @property
    def absolute(self) -> Scores:
        """The same without signs: for signed scores an order by the size of the effect."""
        return replace(self, scores=self.scores.abs(), name=f"{self.name} (absolute)")

    def top(self, fraction: float) -> Circuit:
        """The circuit of the best ``fraction`` of the units."""
        mask = torch.zeros(len(self.units), dtype=torch.bool, device="cpu")
        mask[self.order[len(self.units) - kept_count(len(self.units), fraction) :].cpu()] = True
        return Circuit(self.units, mask)

    @checked
    def rank_correlation(self, other: Scores) -> float:
        """Spearman's rank correlation with other scores of the same units (ties share a rank); NaN where either is the
        same for all units.

        Raises:
            ValueError: scores of other units.
        """
        if self.units != other.units:
            raise ValueError(f"other scores {other.units!r}, these score {self.units!r}: ranks need the same units")
        ranks = [pd.Series(scores.scores.tolist()).rank().tolist() for scores in (self, other)]
        mine, theirs = (rank - rank.mean() for rank in torch.tensor(ranks, dtype=torch.float64, device="cpu"))
        return float(mine @ theirs / (mine.norm() * theirs.norm()))

    def to_frame(self) -> pd.DataFrame:
        """One row a unit: ``unit, kind, layer, index, score, stderr``."""
        return pd.DataFrame(
            {
                "unit": self.units.names,
                "kind": self.units.kinds,
                "layer": self.units.layers.numpy(),
                "index": [site.number(i) for site in self.units.sites for i in range(site.size)],
                "score": self.scores.cpu().double().numpy(),
                "stderr": self.stderr.cpu().double().numpy(),
            }
        )

    def __repr__(self) -> str:
        best = self.units[int(self.scores.where(~self.scores.isnan(), float("-inf")).argmax())].name
        return f"Scores({self.name}, {self.measured_in}: {len(self.units):,} units, largest {best})"


def kept_count(n: int, fraction: float, name: str = "fraction") -> int:
    """How many of ``n`` units a fraction keeps: at least one. ``name`` is what the caller calls it.

    Raises:
        ValueError: a fraction outside (0, 1], a number of units that is none.

    Example:
        >>> tls.score.kept_count(780, 0.1), tls.score.kept_count(780, 0.0001)
        (78, 1)
    """
    if isinstance(fraction, bool) or not isinstance(fraction, Real) or not 0 < fraction <= 1:
        raise ValueError(f"{name} is {fraction!r}; it must lie in (0, 1]")
    check_count("n", n)
    return max(1, round(fraction * n))


def check_sizes(sizes: Sequence[float]) -> None:
    """Raise ``ValueError`` unless these are fractions that fall, one at least."""
    for size in sizes:
        kept_count(1, size, "sizes")
    if not sizes or list(sizes) != sorted(sizes, reverse=True):
        raise ValueError(f"sizes is {list(sizes)}; it must name falling fractions")
