"""Evaluation: the measures of a reduction on held-out examples.

With ``m(C)`` the metric's mean with everything outside ``C`` ablated, faithfulness is
``(m(C) - m(0)) / (m(M) - m(0))`` for the full model ``M`` and the empty circuit ``0`` under the reduction's own kind
of ablation: a ratio of means, never a mean of ratios. Completeness is the same for the complement of ``C``.

Where the true units are known, :func:`auroc` and :func:`average_precision` hold scores against them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparsify.circuit import Circuit, Reduction
from tl_sparsify.examples import Examples
from tl_sparsify.measure import (
    NONE,
    InterventionDistribution,
    Metric,
    by_example,
    compared,
    correct,
    kl,
    log_odds,
)
from tl_sparsify.moments import Estimate, Moments
from tl_sparsify.units import Model


@dataclass(frozen=True)
class Evaluation:
    """How good a reduction is.

    Attributes:
        kept, fraction: units kept.
        kind: of ablation; part of every number.
        risk: mean KL(original || reduced) in nats, without interventions.
        accuracy, original_accuracy: the share of right answers of the reduced and the original model.
        agreement: the share of answers that are the same in both.
        faithfulness, completeness: see the module; NaN where full and empty model do not differ.
        minimality: the least drop in faithfulness from removing one kept unit more (``None`` unless asked for).
        interchange_risk, interchange_agreement: under random interchange of kept units with ``probability``.
    """

    kept: int
    fraction: float
    kind: str
    risk: Estimate
    accuracy: float
    original_accuracy: float
    agreement: float
    faithfulness: float
    completeness: float
    minimality: float | None
    interchange_risk: Estimate
    interchange_agreement: float
    probability: float

    def to_dict(self) -> dict[str, float | int | str | None]:
        """Plain numbers, risks with their standard errors."""
        flat: dict[str, float | int | str | None] = {}
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                flat |= {name: value["mean"], f"{name}_stderr": value["stderr"]}
            else:
                flat[name] = value
        return flat

    def __repr__(self) -> str:
        return (
            f"Evaluation({self.kept:,} units, {self.kind}: risk {self.risk!r}, accuracy {self.accuracy:.3f}, "
            f"faithfulness {self.faithfulness:.3f}, completeness {self.completeness:.3f})"
        )


def evaluate(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    *,
    metric: Metric = log_odds,
    probability: float = 0.1,
    minimality: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Risk, accuracy, faithfulness, completeness and interchange agreement of a reduction.

    Ten forward passes over the data; ``minimality`` takes two more for each kept unit.

    Raises:
        ValueError: a model in training mode, a reduction of another model, NaN or infinite activations.
    """

    def measured(of: Reduction, interventions: InterventionDistribution = NONE) -> Moments:
        def compare(
            original: Float[Tensor, "rows choices"], reduced: Float[Tensor, "rows choices"], batch: Examples
        ) -> Float[Tensor, "batch measures"]:
            columns = [
                kl(original, reduced),
                correct(reduced, batch),
                correct(original, batch),
                (original.argmax(1) == reduced.argmax(1)).to(original.dtype),
                metric(reduced, batch),
                metric(original, batch),
            ]
            return torch.stack([by_example(column.double(), batch) for column in columns], 1)

        settings = {"interventions": interventions, "batch_size": batch_size, "seed": seed}
        return compared(model, of, examples, compare, **settings)

    here = measured(reduction)
    swapped = measured(reduction, InterventionDistribution.interchange(probability))
    baseline = replace(reduction, values=reduction.baseline, mixing=None)
    empty = measured(baseline.with_circuit(Circuit.empty(reduction.units)))
    complement = measured(baseline.with_circuit(~reduction.circuit))
    m0, m1 = float(empty.mean[4]), float(empty.mean[5])

    def share(moments: Moments) -> float:
        return (float(moments.mean[4]) - m0) / (m1 - m0) if m1 != m0 else float("nan")

    least = None
    if minimality:
        drops = [share(here) - share(measured(_without(reduction, i))) for i in _kept(reduction)]
        least = min(drops, default=float("nan"))
    return Evaluation(
        kept=len(reduction.circuit),
        fraction=reduction.circuit.fraction,
        kind=reduction.kind,
        risk=_column(here, 0),
        accuracy=float(here.mean[1]),
        original_accuracy=float(here.mean[2]),
        agreement=float(here.mean[3]),
        faithfulness=share(here),
        completeness=share(complement),
        minimality=least,
        interchange_risk=_column(swapped, 0),
        interchange_agreement=float(swapped.mean[3]),
        probability=probability,
    )


def _kept(reduction: Reduction) -> list[int]:
    return reduction.circuit.mask.nonzero().flatten().tolist()


def _without(reduction: Reduction, unit: int) -> Reduction:
    mask = reduction.circuit.mask.clone()
    mask[unit] = False
    return reduction.with_circuit(Circuit(reduction.units, mask))


def _column(moments: Moments, i: int) -> Estimate:
    return Estimate.of(Moments(moments.count[i], moments.mean[i], moments.spread[i]), "nats")


def auroc(scores: Float[Tensor, "units"], truth: Circuit) -> float:
    """The probability that a true unit has a higher score than another one, ties counted half (the area under the
    receiver operating characteristic); NaN where all or none are true.

    Raises:
        ValueError: scores of another length than the circuit's units.
    """
    true = _truth(scores, truth)
    if true.all() or not true.any():
        return float("nan")
    order = scores.double().cpu()
    _, inverse, counts = order.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts.double() - 1) / 2)[inverse]  # ties share the mean of their ranks
    n = int(true.sum())
    return float((ranks[true].sum() - n * (n + 1) / 2) / (n * (len(order) - n)))


def average_precision(scores: Float[Tensor, "units"], truth: Circuit) -> float:
    """The precision among all units with at least a true unit's score, averaged over the true units; NaN where none
    is true.

    Raises:
        ValueError: scores of another length than the circuit's units.
    """
    true = _truth(scores, truth)
    if not true.any():
        return float("nan")
    order = scores.double().cpu()
    here = order[true]
    above = (order[None, :] >= here[:, None]).double()
    return float((above[:, true].sum(1) / above.sum(1)).mean())


def _truth(scores: Float[Tensor, "units"], truth: Circuit) -> Bool[Tensor, "units"]:
    if len(scores) != len(truth.units):
        raise ValueError(f"scores holds {len(scores)} numbers for {len(truth.units)} units")
    return truth.mask.cpu()
