"""Measured risk: how far a reduced model's answers are from the original's, under a declared distribution of
interventions.

``R(M') = E_{x, i} D(p(x, i) || p'(x, i))`` (arXiv 2602.24266, interventional risk). ``D`` of an example is the mean
over its labelled positions; risk is the mean over examples. ``D`` is the KL divergence of the answer distribution in
nats, or half the squared error of a scalar metric. Risk says nothing about *why* two models agree: a reduced model
that is right without interventions can be wrong under interchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.ranks import agreed, gathered
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.distributions import NONE, InterventionDistribution, drawn_interventions, paired_values, removal
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, answer_rows, check_call, frozen, in_batches
from tl_sparsify.core.intervene import Intervention, intervened
from tl_sparsify.core.memory import device_of, keep_dtype_of
from tl_sparsify.core.metrics import Metric, divergence
from tl_sparsify.core.moments import Estimate, Moments, unit_moments
from tl_sparsify.core.reduction import Reduction, check_fingerprint
from tl_sparsify.core.units import Model, Units, check_positions

_REMEMBERED = 2**24  # numbers


Recall = Callable[[Int[Tensor, "batch"], Callable[[], Float[Tensor, "rows choices"]]], Float[Tensor, "rows choices"]]
"""The logits of the batch of these examples: from memory, or computed."""


def computed(
    index: Int[Tensor, "batch"], compute: Callable[[], Float[Tensor, "rows choices"]]
) -> Float[Tensor, "rows choices"]:
    """Remember nothing."""
    return compute()


def remembering(numbers: int = _REMEMBERED) -> Recall:
    """Remember the logits of the batches that come first, up to so many numbers in all: what is kept does not grow
    with the number of examples. For calls with the same model, examples and batch size only."""
    kept: dict[tuple[int, int], Float[Tensor, "rows choices"]] = {}

    def recall(
        index: Int[Tensor, "batch"], compute: Callable[[], Float[Tensor, "rows choices"]]
    ) -> Float[Tensor, "rows choices"]:
        batch = int(index[0]), len(index)  # in other batches where memory ran out in between
        if batch in kept:
            return kept[batch]
        logits = compute()
        if sum(part.numel() for part in kept.values()) + logits.numel() <= numbers:
            kept[batch] = logits
        return logits

    return recall


def remembered(
    model: Model, examples: Examples, *, batch_size: int | None = None, numbers: int = _REMEMBERED
) -> Callable[[Int[Tensor, "batch"]], Float[Tensor, "rows choices"]] | None:
    """The model's logits for any of the examples (:func:`forward.answer_logits`), from one forward pass over all of
    them; ``None`` where they are more than so many numbers."""
    count = torch.bincount(answer_rows(examples)[0], minlength=len(examples))
    start = count.cumsum(0) - count
    kept: list[Float[Tensor, "rows choices"]] = []
    many = False
    with agreed(f"the logits of {len(examples)} examples"), torch.no_grad():
        for logits in in_batches(lambda _, batch: answer_logits(model, batch), model, examples, batch_size):
            kept.append(logits)
            many = kept[0].shape[1] * int(count.sum()) > numbers
            if many:
                break
    if many:
        return None
    table = torch.cat(gathered(kept, len(examples)))

    def of(index: Int[Tensor, "batch"]) -> Float[Tensor, "rows choices"]:
        many = count[index]
        within = torch.arange(int(many.sum())) - (many.cumsum(0) - many).repeat_interleave(many)
        return table[(start[index].repeat_interleave(many) + within).to(table.device)]

    return of


@dataclass(frozen=True, eq=False)
class Known:
    """What refits of one model on the same examples have in common, so that a search works it out once.

    Attributes:
        deviations: by site each unit's standard deviation over the training examples, over its width; 0 where a unit
            never varies.
        logits: the original's at the training examples; ``None`` where they are computed anew in every step.
        recall: the original's at the validation examples, from the first time on that they are asked for.
    """

    deviations: tuple[Float[Tensor, "_ one"], ...]
    logits: Callable[[Int[Tensor, "batch"]], Float[Tensor, "rows choices"]] | None
    recall: Recall


def known_of(model: Model, train: Examples, units: Units, *, clean: bool, many: bool, batch_size: int | None) -> Known:
    """What is known for refits on ``train``: ``clean`` says that the original is under no interventions, ``many`` that
    a refit passes over more than all of ``train``. One forward pass for the deviations, where ``many`` one more."""
    moments = unit_moments(model, train, units, batch_size=batch_size)
    deviations = tuple(part.variance.mean(-1, keepdim=True).sqrt() for part in moments)
    logits = remembered(model, train, batch_size=batch_size) if clean and many else None
    return Known(deviations, logits, remembering() if clean else computed)


def compared(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    compare: Callable[[Float[Tensor, "rows choices"], Float[Tensor, "rows choices"], Examples], Float[Tensor, "..."]],
    *,
    interventions: InterventionDistribution = NONE,
    batch_size: int | None = None,
    seed: int = 0,
    recall: Recall = computed,
    known: bool = False,
) -> Moments:
    """The moments over examples of ``compare(original logits, reduced logits, batch)``, one row for each example.

    Two forward passes over the data (one where ``recall`` knows the original's logits from an earlier call under the
    same interventions); two more for each ``interchange`` in the distribution, one more for values of counterfactual
    inputs. The check that the reduction is the model's reads all weights: where that is ``known`` it is left out.
    """
    check_positions(reduction.units, len(examples))
    if not known:
        check_call(model, examples, seed=seed, batch_size=batch_size)
        check_fingerprint(model, reduction)

    def of(index: Int[Tensor, "batch"], batch: Examples) -> Moments:
        removed = removal(model, reduction, examples, index)
        same = (interventions, model, reduction, examples, index, seed)
        with intervened(model, *drawn_interventions(*same)):
            original = recall(index, lambda: answer_logits(model, batch))
        with intervened(model, removed):  # each model interchanges its own values: the source run is ablated too
            drawn = drawn_interventions(*same)
        with intervened(model, *drawn, removed):
            reduced = answer_logits(model, batch)
        return Moments.of(compare(original, reduced, batch))

    with torch.no_grad():
        return Moments.over(in_batches(of, model, examples, batch_size), len(examples))


@checked
def risk(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    *,
    interventions: InterventionDistribution = NONE,
    metric: Metric | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    recall: Recall = computed,
) -> Estimate:
    """Measured interventional risk of a reduction: mean KL(original || reduced) in nats, or half the mean squared
    error of ``metric``, with both models under the same interventions.

    Two forward passes over the data; two more for each ``interchange`` in the distribution, one more where removed
    units take their values on counterfactual inputs. ``recall`` may know the original's logits from an earlier call
    (:func:`remembering`).

    Raises:
        ValueError: a model in training mode, a reduction of another model, NaN or infinite activations.

    Example:
        >>> found = tls.risk(model, reduction, test)
        >>> found.mean < 0.01, found.n
        (True, 64)
    """

    settings = {"interventions": interventions, "batch_size": batch_size, "seed": seed, "recall": recall}
    return known_risk(model, reduction, examples, metric=metric, known=False, **settings)


def known_risk(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    *,
    metric: Metric | None = None,
    known: bool = True,
    **settings: Any,
) -> Estimate:
    """:func:`risk` of a reduction that is known to be the model's, as a refit's is; ``settings``: :func:`compared`."""

    def compare(original: Tensor, reduced: Tensor, batch: Examples) -> Tensor:
        return divergence(original, reduced, batch, metric)

    moments = compared(model, reduction, examples, compare, known=known, **settings)
    return Estimate.of(moments, "nats" if metric is None else "squared units")


def circuit_risks(
    model: Model,
    reduction: Reduction,
    circuits: Sequence[Circuit],
    examples: Examples,
    *,
    metric: Metric | None = None,
    batch_size: int | None = None,
    recall: Recall = computed,
) -> list[Estimate]:
    """The measured risk of the reduction with each circuit in its place (:func:`risk`). One forward pass for each, one
    for the original where ``recall`` does not know it, and one for values of counterfactual inputs, whatever the number
    of circuits."""
    check_positions(reduction.units, len(examples))
    reductions = [reduction.with_circuit(circuit) for circuit in circuits]

    def of(index: Int[Tensor, "batch"], batch: Examples) -> Moments:
        original = recall(index, lambda: answer_logits(model, batch))
        units = reduction.units.for_examples(index, examples.spans)
        source = paired_values(model, examples, index, units) if reduction.values.paired else None
        found: list[Float[Tensor, "batch"]] = []
        for one in reductions:
            with intervened(model, removal(model, one, examples, index, source)):
                found.append(divergence(original, answer_logits(model, batch), batch, metric))
        return Moments.of(torch.stack(found).T)  # each sum over a line of its own: as for one circuit alone

    if not circuits:
        return []
    with torch.no_grad():
        moments = Moments.over(in_batches(of, model, examples, batch_size), len(examples))
    unit = "nats" if metric is None else "squared units"
    each = zip(moments.mean, moments.stderr, moments.count, strict=True)
    return [Estimate(float(mean), float(stderr), int(count), unit) for mean, stderr, count in each]


def with_slopes(
    model: Model,
    removed: Intervention,
    batch: Examples,
    measured: Callable[[Float[Tensor, "rows choices"]], Float[Tensor, "batch"]],
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch units"]]:
    """What is ``measured`` of each example's logits under an intervention, and its derivative with respect to each
    unit's ``keep``. One forward and one backward pass over the batch; the model is :func:`frozen` by the caller."""
    keep = removed.keep.detach().to(device_of(model)).expand(len(batch), -1).clone().requires_grad_()
    with torch.enable_grad():
        with intervened(model, replace(removed, keep=keep)):
            found = measured(answer_logits(model, batch))
        (slopes,) = torch.autograd.grad(found.sum(), keep)
    return found.detach(), slopes


def risk_slopes(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    *,
    metric: Metric | None = None,
    batch_size: int | None = None,
    recall: Recall = computed,
) -> Float[Tensor, "units"]:
    """The derivative of measured risk (:func:`risk`) with respect to each unit's ``keep``, at the reduction's circuit:
    what taking a removed unit back would add to the risk, and to remove a kept one would take away from it, to first
    order. One forward and one backward pass; a forward pass for the original where ``recall`` does not know it, and one
    for values of counterfactual inputs."""

    def of(index: Int[Tensor, "batch"], batch: Examples) -> Moments:
        original = recall(index, lambda: answer_logits(model, batch))
        here = reduction.for_examples(index, examples.spans).units
        source = paired_values(model, examples, index, here) if reduction.values.paired else None
        removed = removal(model, reduction, examples, index, source)
        removed = replace(removed, keep=removed.keep.to(keep_dtype_of(model)))  # slopes have the precision of keep
        _, slopes = with_slopes(model, removed, batch, lambda logits: divergence(original, logits, batch, metric))
        return Moments.of(slopes.double())

    with frozen(model), torch.no_grad():
        return Moments.over(in_batches(of, model, examples, batch_size, reduction.units), len(examples)).mean
