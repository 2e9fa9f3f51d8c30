"""Evaluation: the measures of a reduction, or of a path or scores, on held-out examples.

With ``m(C)`` the metric's mean with everything outside ``C`` ablated, faithfulness is
``(m(C) - m(0)) / (m(M) - m(0))`` for the full model ``M`` and the empty circuit ``0`` under the reduction's own kind
of ablation: a ratio of means, never a mean of ratios. Completeness is the same for the complement of ``C``.

Where the true units are known, :func:`auroc` and :func:`average_precision` hold scores against them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify.comparison.curves import (
    ACCURACY,
    AGREEMENT,
    FIRST,
    FULL,
    RISK,
    SIZES,
    Ablation,
    Curve,
    Interval,
    Kind,
    ablated,
    circuit_of,
    curve,
    measured,
    removal,
    shares,
)
from tl_sparsify.comparison.resampling import check_bootstrap
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.distributions import InterventionDistribution, drawn_interventions, lone, source_batch
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, check_call, check_model, in_batches, run_values
from tl_sparsify.core.intervene import intervened
from tl_sparsify.core.metrics import Metric, by_example, kl, log_odds
from tl_sparsify.core.moments import Estimate, Moments
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model
from tl_sparsify.search.path import CircuitPath
from tl_sparsify.search.scores import Scores

__all__ = ["SIZES", "Curve", "Evaluation", "auroc", "average_precision", "evaluate"]

_RESAMPLED = ("risk", "accuracy", "agreement", "faithfulness", "completeness")
_TOGETHER = 64  # circuits measured in one go, for minimality


@dataclass(frozen=True)
class Evaluation:
    """How good a reduction is.

    Attributes:
        kept, fraction: units kept.
        kind: of ablation; part of every number (``shuffled``: counterfactual ablation of examples that have none, to
            the values on another example's input).
        risk: mean KL(original || reduced) in nats, without interventions.
        accuracy, original_accuracy: the share of right answers of the reduced and the original model.
        agreement: the share of answers that are the same in both.
        faithfulness, completeness: see the module; NaN where full and empty model do not differ.
        minimality: the least drop in faithfulness from removing one kept unit more (``None`` unless asked for).
        interchange_risk, interchange_agreement: under random interchange of kept units with ``probability``, over the
            ``interchange_risk.n`` examples that have a partner of their own length (NaN where none has).
        intervals: of risk, accuracy, agreement, faithfulness and completeness, by name.

    Example:
        >>> found = tls.evaluate(model, reduction, test, bootstrap=0)
        >>> found.kept, found.kind, found.original_accuracy
        (6, 'mean', 1.0)
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
    intervals: Mapping[str, Interval]

    def to_dict(self) -> dict[str, float | int | str | None]:
        """Plain numbers: risks with their standard errors, and at the end the intervals (``risk_low``, ...)."""
        flat: dict[str, float | int | str | None] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Estimate):
                flat |= {field.name: value.mean, f"{field.name}_stderr": value.stderr}
            elif field.name != "intervals":
                flat[field.name] = value
        for name, (low, high) in self.intervals.items():
            flat |= {f"{name}_low": low, f"{name}_high": high}
        return flat

    def __repr__(self) -> str:
        return (
            f"Evaluation({self.kept:,} units, {self.kind}: risk {self.risk!r}, accuracy {self.accuracy:.3f}, "
            f"faithfulness {self.faithfulness:.3f}, completeness {self.completeness:.3f})"
        )


@overload
def evaluate(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    *,
    ablation: Kind | None = None,
    values: Values | None = None,
    metric: Metric = log_odds,
    probability: float = 0.1,
    minimality: bool = False,
    bootstrap: int = 1000,
    level: float = 0.95,
    batch_size: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """The measures of one reduction.

    Example:
        >>> tls.evaluate(model, reduction, test, bootstrap=0).accuracy
        1.0
        >>> tls.evaluate(model, path, test, sizes=(0.5, 0.75), bootstrap=0).kept
        (6, 9)
    """
    ...


@overload
def evaluate(
    model: Model,
    reduction: CircuitPath | Scores,
    examples: Examples,
    *,
    ablation: Kind | None = None,
    sizes: Sequence[float] = SIZES,
    values: Values | None = None,
    metric: Metric = log_odds,
    bootstrap: int = 1000,
    level: float = 0.95,
    batch_size: int | None = None,
    seed: int = 0,
) -> Curve:
    """The measures of circuits of several sizes.

    Example:
        >>> tls.evaluate(model, reduction, test, bootstrap=0).accuracy
        1.0
        >>> tls.evaluate(model, path, test, sizes=(0.5, 0.75), bootstrap=0).kept
        (6, 9)
    """
    ...


@checked
def evaluate(
    model: Model,
    reduction: Reduction | CircuitPath | Scores,
    examples: Examples,
    *,
    ablation: Kind | None = None,
    sizes: Sequence[float] = SIZES,
    values: Values | None = None,
    metric: Metric = log_odds,
    probability: float = 0.1,
    minimality: bool = False,
    bootstrap: int = 1000,
    level: float = 0.95,
    batch_size: int | None = None,
    seed: int = 0,
) -> Evaluation | Curve:
    """Risk, accuracy, faithfulness and more: of a reduction (with completeness and interchange agreement), or of the
    circuits of several ``sizes`` of a path or scores (with the areas CPR and CMD, :class:`curves.Curve`).

    Args:
        reduction: a reduction; a path, whose circuits are ``path.at(size)``; or scores, whose circuits are
            ``scores.top(size)`` (``scores.absolute`` for an order by the size of signed effects).
        ablation: what removed units are set to. ``None``: the reduction's or path's own replacements, with faithfulness
            measured from ``reduction.baseline``; ``mean``: ``values``, or where not given that baseline; ``zero``;
            ``counterfactual``: their values on the example's counterfactual input, or where the examples have none on
            another example's input, drawn by ``seed`` (the kind is then called ``shuffled``). Scores need one.
        sizes: fractions of the units, for a path or scores; those that come to one number of units count once.
        values: the means of ``ablation="mean"``, from training examples; scores need them.
        metric: one number for each labelled position; an example's is their mean.
        probability: of the interchange of each kept unit, for a reduction.
        minimality: measure it, for a reduction.
        bootstrap: replicates of the Poisson bootstrap over examples for the percentile intervals
            (:mod:`tl_sparsify.comparison.resampling`); 0: none, intervals are then NaN.
        level: of the intervals.

    Cost in forward passes over the data: eight for a reduction, three more under counterfactual ablation, and with
    ``minimality`` one more for each kept unit and two for every 64 of them (three, if counterfactual); for a path or
    scores two and one for each size below 1, one more under counterfactual ablation. Memory does not grow with the
    number of examples.

    Raises:
        ValueError: a model in training mode, a reduction of another model, NaN or infinite activations; scores without
            ablation, ``mean`` of scores without ``values``, ``values`` without ``mean``; a size outside (0, 1];
            ``minimality`` of a path or scores, or of a reduction with affine replacements; a negative ``bootstrap``.

    Example:
        >>> tls.evaluate(model, reduction, test, bootstrap=0).accuracy
        1.0
        >>> tls.evaluate(model, path, test, sizes=(0.5, 0.75), bootstrap=0).kept
        (6, 9)
    """
    check_call(model, examples, seed=seed, batch_size=batch_size)
    check_bootstrap(bootstrap, level)
    if not isinstance(reduction, Reduction | CircuitPath | Scores):
        what = type(reduction).__name__
        raise ValueError(
            f"reduction is a {what}: give a Reduction (constants.reduced makes one), a CircuitPath or Scores"
        )
    if not isinstance(reduction, Reduction):
        if minimality:
            raise ValueError("minimality is that of one circuit: evaluate path.at(size), or a reduction of your own")
        return curve(
            model,
            reduction,
            examples,
            kind=ablation,
            values=values,
            sizes=sizes,
            metric=metric,
            bootstrap=bootstrap,
            level=level,
            batch_size=batch_size,
            seed=seed,
        )
    if tuple(sizes) != SIZES:
        raise ValueError(f"sizes is {list(sizes)}; a reduction has one size: evaluate a path or scores")
    check_model(model)
    interchange = InterventionDistribution.interchange(probability)
    (kept,), by = ablated(model, [reduction], examples, ablation, values, seed)
    settings: dict[str, Any] = {"metric": metric, "batch_size": batch_size, "seed": seed}
    moments, resampled = measured(model, [kept, ~reduction.circuit], by, examples, bootstrap=bootstrap, **settings)
    here, drawn = moments.mean.cpu(), resampled.means
    faithfulness, completeness = shares(here).tolist()
    swapped = _interchanged(model, reduction, kept, by, examples, interchange, batch_size, seed)
    spread = torch.cat([drawn[:, FIRST, RISK : AGREEMENT + 1], shares(drawn)], 1)
    ends = resampled.interval(spread, level).T.tolist()
    return Evaluation(
        kept=len(reduction.circuit),
        fraction=reduction.circuit.fraction,
        kind=by.kind,
        risk=_estimate(moments, (FIRST, RISK)),
        accuracy=float(here[FIRST, ACCURACY]),
        original_accuracy=float(here[FULL, ACCURACY]),
        agreement=float(here[FIRST, AGREEMENT]),
        faithfulness=faithfulness,
        completeness=completeness,
        minimality=_minimality(model, kept, by, examples, faithfulness, settings) if minimality else None,
        interchange_risk=_estimate(swapped, (0,)),
        interchange_agreement=float(swapped.mean[1]),
        probability=probability,
        intervals={name: (low, high) for name, (low, high) in zip(_RESAMPLED, ends, strict=True)},
    )


def _interchanged(
    model: Model,
    reduction: Reduction,
    kept: Circuit | Reduction,
    by: Ablation,
    examples: Examples,
    interchange: InterventionDistribution,
    batch_size: int | None,
    seed: int,
) -> Moments:
    """The moments of risk and agreement under random interchange of kept units: each model takes its own values of the
    partners' inputs; of the examples that have a partner of their length. Four forward passes over the data, six where
    removed units take their values from runs."""
    if interchange.probability > 0 and bool((alone := lone(examples)).any()):
        paired = (~alone).nonzero().flatten()
        if not len(paired):
            none = torch.zeros(2, dtype=torch.float64)
            return Moments(none, none + float("nan"), none)
        examples, reduction = examples[paired], reduction.for_examples(paired)
        kept = kept.for_examples(paired) if isinstance(kept, Reduction) else kept
        by = replace(by, replacement=by.replacement[paired]) if isinstance(by.replacement, Examples) else by

    def of(index: Int[Tensor, "batch"], batch: Examples) -> Moments:
        values = by.values(model, reduction.units, index, examples.spans)
        removed = there = removal(kept, index, values, by.first_token, examples.spans)
        if isinstance(by.replacement, Examples):  # on a partner's input, to the values that belong to that input
            partners = source_batch(interchange, by.replacement, index, seed)
            taken = run_values(model, partners, values.units)
            there = removal(kept, index, taken, by.first_token, examples.spans)
        same = (interchange, model, reduction, examples, index, seed)
        with intervened(model, *drawn_interventions(*same)):
            original = answer_logits(model, batch)
        with intervened(model, there):
            drawn = drawn_interventions(*same)
        with intervened(model, *drawn, removed):
            reduced = answer_logits(model, batch)
        columns = [kl(original, reduced), original.argmax(1) == reduced.argmax(1)]
        return Moments.of(torch.stack([by_example(column.double(), batch) for column in columns]).T)

    with torch.no_grad():
        return Moments.over(in_batches(of, model, examples, batch_size), len(examples))


def _minimality(
    model: Model,
    kept: Circuit | Reduction,
    by: Ablation,
    examples: Examples,
    faithfulness: float,
    settings: dict[str, Any],
) -> float:
    """The least drop in faithfulness from removing one kept unit more; NaN where none is kept."""
    circuit = circuit_of(kept)
    numbers = torch.arange(len(circuit.units))
    less = [Circuit(circuit.units, circuit.mask & (numbers != i)) for i in circuit.mask.nonzero().flatten()]
    least = float("nan")
    for start in range(0, len(less), _TOGETHER):
        some = [kept.with_circuit(part) if isinstance(kept, Reduction) else part for part in less[start:][:_TOGETHER]]
        moments, _ = measured(model, some, by, examples, bootstrap=0, **settings)
        drop = faithfulness - float(shares(moments.mean.cpu()).max())
        least = drop if not start else min(least, drop)
    return least


def _estimate(moments: Moments, at: tuple[int, ...]) -> Estimate:
    return Estimate.of(Moments(moments.count[at], moments.mean[at], moments.spread[at]), "nats")


@checked
def auroc(scores: Float[Tensor, "units"], truth: Circuit) -> float:
    """The probability that a true unit has a higher score than another one, ties counted half (the area under the
    receiver operating characteristic); NaN where all or none are true.

    Raises:
        ValueError: scores of another length than the circuit's units, or with NaN among them.
    """
    true = _truth(scores, truth)
    if true.all() or not true.any():
        return float("nan")
    order = scores.double().cpu()
    _, inverse, counts = order.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts.double() - 1) / 2)[inverse]  # ties share the mean of their ranks
    n = int(true.sum())
    return float((ranks[true].sum() - n * (n + 1) / 2) / (n * (len(order) - n)))


@checked
def average_precision(scores: Float[Tensor, "units"], truth: Circuit) -> float:
    """The precision among all units with at least a true unit's score, averaged over the true units; NaN where none
    is true.

    Raises:
        ValueError: scores of another length than the circuit's units, or with NaN among them.
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
    if bool(scores.isnan().any()):
        raise ValueError(f"scores holds {int(scores.isnan().sum())} NaN, which have no place in an order")
    return truth.mask.cpu()
