"""Curvature: is variance a fair score for this model and task, and for which units is it not?

A unit's risk is its curvature times its variance: ``risk[u] = kappa[u] / 2 * variance[u]`` defines ``kappa[u]``, the
curvature of the divergence along that unit's values, weighted by how they vary. Ordering units by variance is ordering
them by risk where ``kappa`` is the same for all of them (arXiv 2602.24266, the variance special case). Here it is
taken to pieces: how much ``kappa`` varies, and where it turns the order round. Both are scores of single units: a fair
order of them is still no order for removing many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify.core.circuit import Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.metrics import Metric
from tl_sparsify.core.units import Model, Units
from tl_sparsify.search import score
from tl_sparsify.search.scores import Scores

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, eq=False)
class Uniformity:
    """How far from uniform the curvature is.

    Attributes:
        risk: second-order risk of each unit.
        variance: the variance that is to stand for it.

    Example:
        >>> found = tls.curvature.uniformity(model, train, units, temperature=3.0)
        >>> found.rank_correlation, found.variation  # of variance and risk; of curvature
        (..., ...)
    """

    risk: Scores
    variance: Scores

    @property
    def units(self) -> Units:
        """The units."""
        return self.risk.units

    @property
    def curvature(self) -> Float[Tensor, "units"]:
        """``kappa = 2 risk / variance``: 0 where the output does not depend on a unit, NaN where a unit is constant."""
        varies = self.variance.scores > 0
        return torch.where(varies, 2 * self.risk.scores / self.variance.scores, float("nan"))

    @property
    def _compared(self) -> Bool[Tensor, "units"]:
        return (self.variance.scores > 0) & (self.risk.scores > 0)

    @property
    def unread(self) -> int:
        """How many units vary without any effect on the output: curvature 0, left out of quantiles and variation."""
        return int(((self.variance.scores > 0) & (self.risk.scores == 0)).sum())

    @property
    def quantiles(self) -> dict[float, float]:
        """Of the curvature, at 5, 25, 50, 75 and 95 % (NaN without any unit that varies and has an effect)."""
        kappa = self.curvature[self._compared].double()
        at = torch.tensor(QUANTILES, dtype=torch.float64, device=kappa.device)
        # Between two units the quantile is interpolated; curvature spans orders of magnitude, hence on its logarithm.
        found = kappa.log().quantile(at).exp().tolist() if len(kappa) else [float("nan")] * len(QUANTILES)
        return dict(zip(QUANTILES, found, strict=True))

    @property
    def spread(self) -> float:
        """The 95 % quantile of the curvature over the 5 % quantile: 1 where it is uniform."""
        return self.quantiles[0.95] / self.quantiles[0.05]

    @property
    def variation(self) -> float:
        """The curvature's coefficient of variation (standard deviation over mean): 0 where it is uniform."""
        kappa = self.curvature[self._compared].double()
        return float(kappa.std(correction=0) / kappa.mean()) if len(kappa) else float("nan")

    @property
    def rank_correlation(self) -> float:
        """Spearman's, of variance with risk: 1 where variance orders the units right."""
        return self.variance.rank_correlation(self.risk)

    def overrated(self, k: int = 5) -> tuple[str, ...]:
        """The ``k`` units that variance ranks furthest above where risk does: they vary, and little reads it."""
        return self._furthest(k, above=True)

    def underrated(self, k: int = 5) -> tuple[str, ...]:
        """The ``k`` units that variance ranks furthest below where risk does: small, and read with large weights."""
        return self._furthest(k, above=False)

    def _furthest(self, k: int, above: bool) -> tuple[str, ...]:
        ranks = self.to_frame().overrated.tolist()
        wrong = [(-by if above else by, i) for i, by in enumerate(ranks) if (by > 0 if above else by < 0)]
        return tuple(self.units.names[i] for _, i in sorted(wrong)[:k])

    def to_frame(self) -> pd.DataFrame:
        """One row a unit: ``unit, kind, layer, index, variance, risk, curvature, variance_rank, risk_rank,
        overrated``; rank 1 is the most needed, and ``overrated`` the number of ranks that variance puts it too high."""
        variance, risk = (pd.Series(scores.scores.tolist()) for scores in (self.variance, self.risk))
        ranks = variance.rank(ascending=False), risk.rank(ascending=False)
        return pd.DataFrame(
            {
                **{name: column for name, column in self.risk.to_frame().items() if name not in ("score", "stderr")},
                "variance": variance,
                "risk": risk,
                "curvature": self.curvature.tolist(),
                "variance_rank": ranks[0],
                "risk_rank": ranks[1],
                "overrated": ranks[1] - ranks[0],
            }
        )

    def __repr__(self) -> str:
        wrong = [f"{name} {', '.join(found)}" for name, found in
                 (("overrates", self.overrated(2)), ("underrates", self.underrated(2))) if found]  # fmt: skip
        return (
            f"Uniformity(curvature of {len(self.units):,} units: factor {self.spread:.3g} from 5 to 95 %, "
            f"CV {self.variation:.2g}; {self.variance.name} and {self.risk.name}: rank correlation "
            f"{self.rank_correlation:.2f}{''.join('; ' + part for part in wrong)})"
        )


@checked
def uniformity(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    against: Callable[..., Scores] = score.variance,
    values: Values | None = None,
    probes: int = 4,
    temperature: float = 1.0,
    metric: Metric | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Uniformity:
    """How far from uniform the curvature is on this model and task, and which units variance therefore ranks wrongly.

    Args:
        against: the variance that is to stand for risk: ``score.variance``, or ``score.scaled_variance``.
        values, probes, temperature, metric: of :func:`score.risk`.

    One forward and ``probes`` backward passes over the data for the risk (fewer backward where fewer probes are exact;
    one forward more where :func:`score.risk` takes its means apart), two forward for the variance.

    Raises:
        ValueError: as :func:`score.risk` and ``against``.

    Example:
        >>> tls.curvature.uniformity(model, train, units, temperature=3.0)
        Uniformity(curvature of 12 units: factor ...)
    """
    shared = {"seed": seed, "batch_size": batch_size}
    settings = {"values": values, "probes": probes, "temperature": temperature, "metric": metric}
    return Uniformity(
        score.risk(model, examples, units, **settings, **shared), against(model, examples, units, **shared)
    )
