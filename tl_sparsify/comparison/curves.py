"""Curves: the measures of circuits of many sizes under one kind of ablation, and the areas under them.

One go over the data measures any number of circuits: the original's answers once, the empty circuit's once, and one
forward pass for each circuit. With ``f`` the faithfulness (:func:`evaluate.evaluate`) at each fraction of units
kept, as in the Mechanistic Interpretability Benchmark (Mueller et al., 2025):

    CPR = area under f          (not capped: leaving out what acts against the task raises it; higher is better),
    CMD = area under |1 - f|    (lower is better),

by the trapezoidal rule, on the linear axis, from the smallest fraction reached to 1 exactly, where ``f = 1``; nothing
is added below that fraction, so the areas are those of one number of units only. There CPR is taken for an order by
signed scores and CMD for one by absolute scores (``scores`` and ``scores.absolute``); here both come from the one order
that is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal.ranks import totalled
from tl_sparsify.comparison.resampling import Resampled
from tl_sparsify.core.circuit import Circuit, FirstToken, Values
from tl_sparsify.core.distributions import check_pairs, checked_partners
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, check_model, in_batches, run_values
from tl_sparsify.core.intervene import Intervention, ablate, intervened
from tl_sparsify.core.metrics import Metric, by_example, correct, kl, measured_by
from tl_sparsify.core.moments import Moments
from tl_sparsify.core.reduction import Reduction, check_fingerprint
from tl_sparsify.core.units import Model, Units, check_positions
from tl_sparsify.search.constants import zero
from tl_sparsify.search.path import CircuitPath
from tl_sparsify.search.scores import Scores, kept_count

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The benchmark's fractions of units."""
Kind = Literal["mean", "zero", "counterfactual"]
_KINDS = ("mean", "zero", "counterfactual")
Interval = tuple[float, float]

RISK, ACCURACY, AGREEMENT, METRIC, LOST = range(5)
"""The columns of :func:`measured`; ``LOST`` is what the metric lost, ``m(M) - m(C)``."""
MEASURES = ("risk", "accuracy", "agreement", "metric", "faithfulness")
FULL, EMPTY, FIRST = range(3)
"""Its rows: the full model, the empty circuit, and then the circuits given."""


@dataclass(frozen=True)
class Curve:
    """How good circuits of several sizes are; the tuples hold one entry for each size.

    Attributes:
        sizes: the fractions of units kept, rising: those reached, not those asked for.
        kept: how many units that is.
        ablation: what removed units are set to: the kinds of a path's own replacements, ``mean``, ``zero``,
            ``counterfactual``, or ``shuffled`` (counterfactual ablation of examples that have none: the values on
            another example's input).
        risk: mean KL(original || ablated) in nats.
        accuracy: the share of right answers.
        agreement: the share of answers that are the original's.
        metric: its mean.
        faithfulness: see the module; NaN where full and empty model do not differ.
        original_accuracy, original_metric: of the full model.
        empty_metric: of the empty circuit.
        cpr, cmd: the areas, see the module.
        intervals: for the five measures, by name, the interval at each size.
        cpr_interval, cmd_interval: of the areas.
        n: number of examples.

    Example:
        >>> curve = tls.evaluate(model, scores, test, sizes=(0.25, 0.5, 1.0), ablation="mean", values=means)
        >>> curve.kept, curve.accuracy[-1]
        ((3, 6, 12), 1.0)
    """

    sizes: tuple[float, ...]
    kept: tuple[int, ...]
    ablation: str
    risk: tuple[float, ...]
    accuracy: tuple[float, ...]
    agreement: tuple[float, ...]
    metric: tuple[float, ...]
    faithfulness: tuple[float, ...]
    original_accuracy: float
    original_metric: float
    empty_metric: float
    cpr: float
    cmd: float
    intervals: Mapping[str, tuple[Interval, ...]]
    cpr_interval: Interval
    cmd_interval: Interval
    n: int

    def to_frame(self) -> pd.DataFrame:
        """One row a size: ``kept, fraction, ablation``, and each measure with its interval (``risk, risk_low,
        risk_high``, ...)."""
        columns: dict[str, Sequence[object]] = {"kept": self.kept, "fraction": self.sizes}
        columns["ablation"] = [self.ablation] * len(self.kept)
        for name, pairs in self.intervals.items():
            columns[name] = getattr(self, name)
            columns[f"{name}_low"] = [low for low, _ in pairs]
            columns[f"{name}_high"] = [high for _, high in pairs]
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        return (
            f"Curve({len(self.kept)} sizes from {self.kept[0]:,} to {self.kept[-1]:,} units, {self.ablation}: "
            f"CPR {self.cpr:.3f}, CMD {self.cmd:.3f} (n={self.n:,}))"
        )


@dataclass(frozen=True, eq=False)
class Ablation:
    """What is put in the place of removed units.

    Attributes:
        kind: part of every number.
        replacement: constants, or for each example the input in whose run removed units take their values.
        first_token: at which first tokens removed units are left alone.
    """

    kind: str
    replacement: Values | Examples
    first_token: FirstToken = "bos"

    def values(
        self, model: Model, units: Units, index: Int[Tensor, "batch"], spans: Mapping[str, Int[Tensor, "n 2"]] | None
    ) -> Values:
        """The replacements for the examples ``index``. One forward pass for values of a run, none for constants."""
        here = units.for_examples(index, spans)
        if isinstance(self.replacement, Values):
            return Values(here, self.replacement.tensors)
        return run_values(model, self.replacement[index], here)

    @staticmethod
    def of(
        kind: Kind,
        model: Model,
        examples: Examples,
        units: Units,
        *,
        values: Values | None = None,
        baseline: Values | None = None,
        seed: int = 0,
    ) -> Ablation:
        """The ablation of a kind: to the means ``values`` (or the ``baseline`` of what is evaluated), to zero, or to
        the values on each example's counterfactual input (where there are none, on another example's, drawn by
        ``seed``).

        One forward pass of one example for ``zero``.

        Raises:
            ValueError: an unknown kind; ``mean`` without means, since the means over the examples evaluated on would be
                fitted to them; values of other units, of a run, or beside another kind; examples without a
                counterfactual of which one has no other of its length.
        """
        if kind not in _KINDS:
            raise ValueError(f"ablation is {kind!r}; it is {', '.join(_KINDS[:-1])} or {_KINDS[-1]}")
        if values is not None and kind != "mean":
            raise ValueError(f"values are given, and ablation is {kind!r}: they are the means of ablation='mean'")
        if kind == "zero":
            return Ablation("zero", zero(model, examples, units))
        if kind == "counterfactual":
            if examples.counterfactual_tokens is not None:
                check_pairs(examples)
                return Ablation("counterfactual", replace(examples, tokens=examples.counterfactual_tokens))
            if len(examples) == 1:
                raise ValueError("examples holds one, and no counterfactual_tokens: there is no other input")
            return Ablation("shuffled", examples[checked_partners(examples, seed, 83)])
        means = baseline if values is None else values
        if means is None:
            raise ValueError("ablation='mean' needs values: give constants.mean(model, train, units)")
        if means.units != units or not means.constant:
            raise ValueError(f"values are {means!r}; ablation='mean' needs a constant for each of {units!r}")
        return Ablation("mean", means)


def circuit_of(kept: Circuit | Reduction) -> Circuit:
    """The circuit, of a reduction its circuit."""
    return kept.circuit if isinstance(kept, Reduction) else kept


def removal(
    kept: Circuit | Reduction,
    index: Int[Tensor, "batch"],
    values: Values,
    first_token: FirstToken,
    spans: Mapping[str, Int[Tensor, "n 2"]] | None,
) -> Intervention:
    """What removes the units outside a circuit: a reduction brings its own replacements, a circuit gets ``values``."""
    if isinstance(kept, Reduction):
        return ablate(kept.for_examples(index, spans))
    return Intervention(values.units, kept.mask.float(), values, first_token=first_token)


def measured(
    model: Model,
    circuits: Sequence[Circuit | Reduction],
    by: Ablation,
    examples: Examples,
    *,
    metric: Metric,
    bootstrap: int,
    batch_size: int | None,
    seed: int,
) -> tuple[Moments, Resampled]:
    """The moments and the resampled sums, ``[circuits + 2, 5]``, of five measures (the columns) of the full model, the
    empty circuit and all ``circuits`` (the rows). Circuits are ablated by ``by``, reductions by what they bring.

    One forward pass over the data for the model, the empty circuit, each circuit that is not full, and the run that
    values are taken from.
    """
    empty = Circuit.empty(circuits[0].units)
    check_positions(empty.units, len(examples))

    def of(index: Int[Tensor, "batch"], batch: Examples) -> tuple[Moments, Resampled]:
        values = by.values(model, empty.units, index, examples.spans)
        original = answer_logits(model, batch)
        before = measured_by(metric, original, batch).double()
        rows = [_row(original, original, before, before, batch)]
        for kept in (empty, *circuits):
            reduced = original
            if not bool(circuit_of(kept).mask.all()):
                with intervened(model, removal(kept, index, values, by.first_token, examples.spans)):
                    reduced = answer_logits(model, batch)
            rows.append(_row(original, reduced, before, measured_by(metric, reduced, batch).double(), batch))
        samples = torch.stack(rows).movedim(2, 0)  # every sum then runs over its own line: the same for equal rows
        return Moments.of(samples), Resampled.of(samples, index, bootstrap, seed)

    with torch.no_grad():
        parts = in_batches(of, model, examples, batch_size)
        return totalled(parts, lambda one, other: (one[0] + other[0], one[1] + other[1]), len(examples))


def _row(
    original: Float[Tensor, "rows choices"],
    reduced: Float[Tensor, "rows choices"],
    before: Float[Tensor, "rows"],
    after: Float[Tensor, "rows"],
    batch: Examples,
) -> Float[Tensor, "measures batch"]:
    same = original.argmax(1) == reduced.argmax(1)
    columns = [kl(original, reduced), correct(reduced, batch), same, after, before - after]
    return torch.stack([by_example(column.double(), batch) for column in columns])


def shares(means: Float[Tensor, "*some rows measures"]) -> Float[Tensor, "*some circuits"]:
    """Faithfulness of each circuit, ``1 - (m(M) - m(C)) / (m(M) - m(0))``; NaN where the denominator is 0."""
    lost = means[..., LOST]
    whole = torch.where(lost[..., EMPTY] == 0, float("nan"), lost[..., EMPTY])
    return 1 - lost[..., FIRST:] / whole[..., None]


def curve(
    model: Model,
    source: CircuitPath | Scores,
    examples: Examples,
    *,
    kind: Kind | None,
    values: Values | None,
    sizes: Sequence[float],
    metric: Metric,
    bootstrap: int,
    level: float,
    batch_size: int | None,
    seed: int,
) -> Curve:
    """What :func:`tl_sparsify.evaluate` does with a path or scores; arguments, cost and errors are written there."""
    check_model(model)
    counts = {kept_count(len(source.units), size, "sizes"): size for size in sizes}
    if not counts:
        raise ValueError("sizes is empty: name at least one fraction of the units")
    fractions = [counts[k] for k in sorted(counts)]
    if isinstance(source, CircuitPath):
        kept, by = ablated(model, [source.at(size) for size in fractions], examples, kind, values, seed)
    elif kind is None:
        raise ValueError("scores carry no replacements: name the ablation (mean with values, zero, counterfactual)")
    else:
        by = Ablation.of(kind, model, examples, source.units, values=values, seed=seed)
        kept = [source.top(size) for size in fractions]
    reached = [len(circuit_of(circuit)) for circuit in kept]
    x = torch.tensor(reached, dtype=torch.float64) / len(source.units)
    settings = {"metric": metric, "batch_size": batch_size, "seed": seed}
    moments, resampled = measured(model, kept, by, examples, bootstrap=bootstrap, **settings)
    mean = moments.mean.cpu()
    here, drawn = _summary(mean, x), _summary(resampled.means, x)
    ends = {name: resampled.interval(part, level) for name, part in drawn.items()}
    return Curve(
        sizes=tuple(x.tolist()),
        kept=tuple(reached),
        ablation=by.kind,
        **{name: tuple(here[name].tolist()) for name in MEASURES},
        original_accuracy=float(mean[FULL, ACCURACY]),
        original_metric=float(mean[FULL, METRIC]),
        empty_metric=float(mean[EMPTY, METRIC]),
        cpr=float(here["cpr"]),
        cmd=float(here["cmd"]),
        intervals={name: tuple(zip(*ends[name].tolist(), strict=True)) for name in MEASURES},
        cpr_interval=pair(ends["cpr"]),
        cmd_interval=pair(ends["cmd"]),
        n=len(examples),
    )


def pair(ends: Float[Tensor, "two"]) -> Interval:
    """Both ends of an interval, as numbers."""
    return float(ends[0]), float(ends[1])


def ablated(
    model: Model,
    reductions: Sequence[Reduction],
    examples: Examples,
    kind: Kind | None,
    values: Values | None,
    seed: int,
) -> tuple[Sequence[Circuit | Reduction], Ablation]:
    """The circuits to measure under a kind of ablation, and what they are ablated by: the reductions as they are, with
    their baseline for the empty circuit, where the kind is ``None``.

    Raises:
        ValueError: reductions of another model or with several baselines; ``values`` without a kind; as
            :meth:`Ablation.of`.
    """
    first = reductions[0]
    check_fingerprint(model, first)
    others = [part.baseline for part in reductions if part.baseline is not first.baseline]
    if values is None and kind in (None, "mean") and any(baseline != first.baseline for baseline in others):
        raise ValueError("the path's reductions have several baselines, so m(0) is not one number: name the ablation")
    if kind is not None:
        none = "zero" in (first.kind, first.baseline.kind) or first.baseline.paired
        baseline = None if none else first.baseline
        by = Ablation.of(kind, model, examples, first.units, values=values, baseline=baseline, seed=seed)
        return [part.circuit for part in reductions], replace(by, first_token=first.first_token)
    if values is not None:
        raise ValueError("values are given, and no ablation: a reduction has its own, or give ablation='mean'")
    if first.values.paired:
        if examples.counterfactual_tokens is None:
            raise ValueError("reduction takes its values from counterfactual inputs, and examples have none: give them")
        by = Ablation.of("counterfactual", model, examples, first.units)
        return [part.circuit for part in reductions], replace(by, first_token=first.first_token)
    kinds = ", ".join(dict.fromkeys(part.kind for part in reductions))
    return reductions, Ablation(kinds, first.baseline, first.first_token)


def _summary(means: Float[Tensor, "*some rows measures"], x: Float[Tensor, "circuits"]) -> dict[str, Tensor]:
    """The five measures by circuit, and both areas; of the means, or of those in every replicate."""
    f = shares(means)
    named = dict(zip(MEASURES, (*means[..., FIRST:, :LOST].unbind(-1), f), strict=True))
    if x[-1] != 1:  # the area always ends at the full model
        x, f = torch.cat([x, torch.ones(1).to(x)]), torch.cat([f, torch.ones_like(f[..., :1])], -1)
    return named | {"cpr": torch.trapezoid(f, x), "cmd": torch.trapezoid((1 - f).abs(), x)}
