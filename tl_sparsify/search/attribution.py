"""Attribution: what removing a unit does to a metric, to first order, along a line, or by doing it.

All three are the one primitive, with a unit at ``value + keep * (v - value)`` and ``m(keep)`` the metric:

    gradient[u]    d m / d keep[u]  at the clean run (keep = 1 everywhere): attribution patching;
    integrated[u]  the same, averaged over the line on which all units have the same keep, from 0 to 1:
                   sum_u integrated[u] = m(clean) - m(every unit removed);
    exact[u]       m(clean) - m(unit u alone removed), or the KL divergence between the two.

Signed: a positive score says that removing the unit *lowers* the metric. A first-order effect says little about large
steps, and a metric's drop nothing about outputs that the metric does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count
from tl_sparsify._internal.layouts import narrows
from tl_sparsify._internal.progress import progress as bar
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.distributions import NONE, InterventionDistribution, drawn_interventions, source_batch
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, check_call, frozen, in_batches, run_values, shared_batches
from tl_sparsify.core.intervene import Intervention, intervened
from tl_sparsify.core.measure import with_slopes
from tl_sparsify.core.memory import keep_dtype_of, rows_for
from tl_sparsify.core.metrics import Metric, by_example, kl, log_odds, measured_by
from tl_sparsify.core.moments import Moments
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model, Unit, Units, select
from tl_sparsify.gradients.backward import Name, Rules, modified, named
from tl_sparsify.search.constants import mean
from tl_sparsify.search.scores import Scores

Source = Literal["constant", "counterfactual", "shuffled"]
"""What replaces a unit: a constant, or its value on the counterfactual or on another input of the split."""
_SOURCES = ("constant", "counterfactual", "shuffled")


@checked
def gradient(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    values: Values | None = None,
    source: Source = "constant",
    metric: Metric = log_odds,
    backward: Name | Rules = "true",
    seed: int = 0,
    batch_size: int | None = None,
) -> Scores:
    """First-order drop of ``metric`` when a unit is removed, ``sum_t (dm/dv . (v - value))`` at the clean run
    (attribution patching): signed, in units of the metric.

    Args:
        values: the constants that replace units; their means over the examples where not given.
            :func:`constants.counterfactual` is ``source="counterfactual"``.
        source: take the replacement from another run instead. With ``counterfactual`` the score is *minus*
            TransformerLens's ``attribution_patch(model, clean=counterfactuals, corrupt=tokens)``, which also takes
            the gradient at ``tokens`` but reports the change; others take the gradient at the counterfactual run.
        metric: one number for each labelled position; an example's is their mean.
        backward: how the metric is differentiated (:mod:`tl_sparsify.gradients.backward`): ``true``, ``gim``, ``relp``.
        seed: draws the partners for ``shuffled``.

    One forward and one backward pass over the data; one forward more for the means or the other run.

    Raises:
        ValueError: a model in training mode, values of other units or of a run, values together with another source, an
            unknown source or one that the examples do not have, a metric that gives not one number for each row.

    Example:
        >>> found = tls.score.gradient(model, train, units)
        >>> found.absolute.top(0.25).names  # signed: an order by size takes `absolute`
        ('L0H2', 'L1H1', 'L1H2')
    """
    replacement, passes = replaced_by(model, examples, units, values, source, seed, batch_size)
    total = _line(model, examples, units, replacement, (1.0,), metric, backward, batch_size)
    return Scores(units, total.mean, total.stderr, named("gradient", backward), "units of the metric", 1 + passes, 1)


@checked
def integrated(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    steps: int = 5,
    values: Values | None = None,
    source: Source = "constant",
    metric: Metric = log_odds,
    backward: Name | Rules = "true",
    seed: int = 0,
    batch_size: int | None = None,
) -> Scores:
    """Integrated gradients over units: :func:`gradient` averaged over the line from every unit replaced
    (``keep = 0``) to the clean run (``keep = 1``), at the midpoints of ``steps`` equal parts. Its sum over all units
    tends to the metric's drop when all of them are removed (completeness; exact for a metric linear in the units).

    Arguments and errors as in :func:`gradient`, and ``ValueError`` for ``steps`` below one.

    ``steps`` forward and backward passes over the data; one forward more for the means or the other run.

    Example:
        >>> tls.score.integrated(model, train, units, steps=3).absolute.top(0.25).names
        ('L0H0', 'L0H2', 'L1H1')
    """
    check_count("steps", steps, least=None, most=MOST)
    if steps < 1:
        raise ValueError(f"steps is {steps}; integrated needs at least one")
    replacement, passes = replaced_by(model, examples, units, values, source, seed, batch_size)
    levels = tuple((step + 0.5) / steps for step in range(steps))  # midpoints: exact where the slope is linear in keep
    total = _line(model, examples, units, replacement, levels, metric, backward, batch_size)
    return Scores(
        units, total.mean, total.stderr, named("integrated", backward), "units of the metric", steps + passes, steps
    )


@checked
def exact(
    model: Model,
    examples: Examples,
    units: Units | Sequence[Unit],
    *,
    values: Values | None = None,
    source: Source = "constant",
    metric: Metric | None = None,
    interventions: InterventionDistribution = NONE,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Scores:
    """What removing each unit alone does, by doing it (activation patching): the KL divergence from the original
    output in nats, or with ``metric`` its signed drop. With ``interventions`` both models are under them, as in
    :func:`tl_sparsify.search.score.risk`.

    Arguments and errors as in :func:`gradient`; ``units`` may also be some single ones, ``[units["L1H3"], ...]``: then
    only these are removed, and the score of the others at their hook points is NaN. Several units share a forward pass,
    each with a copy of the batch: ``batch_size`` is the number of rows of a pass, copies included (as many as fit where
    not given).

    One forward pass over the data for each unit that is scored and one for the original; one more for the means or the
    other run. With ``interventions`` one more for each ``interchange``, and one for their means where those are not
    what replaces the units.

    Example:
        >>> tls.score.exact(model, train, units, values=means, progress=False).top(0.25).names
        ('L0H2', 'L1H0', 'L1H1')
    """
    units, mask = (units, torch.ones(len(units))) if isinstance(units, Units) else _some(units)
    wanted = mask.nonzero().flatten()
    replacement, passes = replaced_by(model, examples, units, values, source, seed, batch_size)
    rows = rows_for(model, examples, narrow=narrows(model), units=units) if batch_size is None else batch_size
    batches = list(shared_batches(model, examples, min(rows, len(examples))))
    whole = None
    if interventions != NONE:
        own = values is None and source == "constant"  # what replaces the units are the interventions' means too
        means = replacement(wanted) if own else mean(model, examples, units, batch_size=batch_size)
        whole = Reduction(Circuit.full(units), means)
        passes += (not own) + sum(part.kind == "interchange" for _, part in interventions.components)

    def alone(number: int, index: Int[Tensor, "batch"], batch: Examples) -> Moments:
        together = max(1, rows // len(index))
        firsts = range(0, len(wanted), together)
        effects: list[Float[Tensor, "batch some"]] = []
        with torch.no_grad():
            values_here = replacement(index)
            drawn = () if whole is None else drawn_interventions(interventions, model, whole, examples, index, seed)
            with intervened(model, *drawn):
                original = answer_logits(model, batch)
            for first in bar(firsts, f"removing units one by one, batch {number + 1} of {len(batches)}", progress):
                some = wanted[first : first + together]
                copies = index.repeat(len(some))
                here = units.for_examples(copies, examples.spans)
                again = (_copied(part, copies) for part in drawn)
                with intervened(model, *again, _each_alone(here, values_here, some, len(index))):
                    removed = answer_logits(model, examples[copies])
                drop = _drop(original.repeat(len(some), 1), removed, examples[copies], metric)
                effects.append(drop.double().view(len(some), len(index)).T)
        return Moments.of(torch.cat(effects, 1))

    total = Moments.over((alone(number, *part) for number, part in enumerate(batches)), len(examples))
    measured_in = "nats" if metric is None else "units of the metric"
    scores, stderr = (
        torch.full((len(units),), float("nan"), dtype=part.dtype, device=part.device).index_copy(
            0, wanted.to(part.device), part
        )
        for part in (total.mean, total.stderr)
    )
    return Scores(units, scores, stderr, "exact", measured_in, len(wanted) + 1 + passes, 0)


def _some(chosen: Sequence[Unit]) -> tuple[Units, Bool[Tensor, "units"]]:
    if not len(chosen) or not all(isinstance(unit, Unit) for unit in chosen):
        raise ValueError(f'units is {chosen!r}; give Units, or at least one of them: [units["L1H3"], ...]')
    return select(chosen)


def _drop(
    original: Float[Tensor, "rows choices"],
    removed: Float[Tensor, "rows choices"],
    batch: Examples,
    metric: Metric | None,
) -> Float[Tensor, "batch"]:
    if metric is None:
        return by_example(kl(original, removed), batch)
    return by_example(measured_by(metric, original, batch) - measured_by(metric, removed, batch), batch)


def _copied(drawn: Intervention, copies: Int[Tensor, "rows"]) -> Intervention:
    """The same interventions for every copy of the batch."""
    times = len(copies) // len(drawn.keep)
    here = drawn.units.for_examples(torch.arange(len(drawn.keep)).repeat(times))
    tiled = tuple(v if v.ndim == 2 else v.repeat(times, 1, 1, 1) for v in drawn.values.tensors)
    return replace(drawn, units=here, keep=drawn.keep.repeat(times, 1), values=Values(here, tiled))


def _each_alone(units: Units, values: Values, some: Int[Tensor, "some"], size: int) -> Intervention:
    """In the first copy of the batch of ``size`` remove the first of ``some`` alone, in the next copy the next, ..."""
    touched = [i for i, part in enumerate(units.slices) if bool(((some >= part.start) & (some < part.stop)).any())]
    column = torch.cat([torch.arange(units.slices[i].start, units.slices[i].stop) for i in touched])
    keep = (some[:, None] != column).to(torch.get_default_dtype())
    chosen = Units(tuple(units.sites[i] for i in touched))
    tensors = [values.tensors[i] for i in touched]
    tiled = tuple(v if v.ndim == 2 else v.repeat(len(some), 1, 1, 1) for v in tensors)
    return Intervention(chosen, keep.repeat_interleave(size, 0), Values(chosen, tiled), first_token="bos")


def replaced_by(
    model: Model,
    examples: Examples,
    units: Units,
    values: Values | None,
    source: Source,
    seed: int,
    batch_size: int | None,
) -> tuple[Callable[[Int[Tensor, "batch"]], Values], int]:
    """What replaces the units of the examples with an index, and the forward passes over the data that it takes."""
    check_call(model, examples, units, seed=seed, batch_size=batch_size)
    if source not in _SOURCES:
        raise ValueError(f"source is {source!r}; it is {', '.join(_SOURCES[:-1])} or {_SOURCES[-1]}")
    if values is not None and values.paired and source == "constant":
        source, values = "counterfactual", None
    if source == "constant":
        constants = mean(model, examples, units, batch_size=batch_size) if values is None else values
        if constants.units != units:
            raise ValueError(f"values are for {constants.units!r}, not for {units!r}: give a value for each unit")
        if not constants.constant:
            raise ValueError("values vary by example or position: give constants, or name the run by source")
        return lambda index: constants, int(values is None)
    if values is not None:
        raise ValueError(f"values are given, and source is {source!r}: give one of them")
    paired = InterventionDistribution.interchange(1.0, source)
    return lambda index: run_values(
        model, source_batch(paired, examples, index, seed), units.for_examples(index, examples.spans)
    ), 1


def _line(
    model: Model,
    examples: Examples,
    units: Units,
    replacement: Callable[[Int[Tensor, "batch"]], Values],
    levels: tuple[float, ...],
    metric: Metric,
    backward: Name | Rules,
    batch_size: int | None,
) -> Moments:
    """The moments over examples of ``d metric / d keep``, averaged over the points at which ``keep`` has these levels
    for all units."""

    def of(index: Int[Tensor, "batch"], batch: Examples) -> Moments:
        here = units.for_examples(index, examples.spans)
        values = Values(here, replacement(index).tensors)
        slopes: list[Float[Tensor, "batch units"]] = []
        with frozen(model), modified(model, backward):
            for level in levels:
                keep = torch.full((1, len(here)), level, dtype=keep_dtype_of(model))
                removed = Intervention(here, keep, values, first_token="bos")
                slopes.append(with_slopes(model, removed, batch, partial(measured, batch=batch))[1])
        return Moments.of(torch.stack(slopes).double().mean(0))

    def measured(logits: Float[Tensor, "rows choices"], batch: Examples) -> Float[Tensor, "batch"]:
        return by_example(measured_by(metric, logits, batch), batch)

    return Moments.over(in_batches(of, model, examples, batch_size, units), len(examples))
