"""Measured risk: how far a reduced model's answers are from the original's, under a declared distribution of
interventions.

``R(M') = E_{x, i} D(p(x, i) || p'(x, i))`` (arXiv 2602.24266, interventional risk). ``D`` of an example is the mean
over its labelled positions; risk is the mean over examples. ``D`` is the KL divergence of the answer distribution in
nats, or half the squared error of a scalar metric. Risk says nothing about *why* two models agree: a reduced model
that is right without interventions can be wrong under interchange.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify import _random
from tl_sparsify.circuit import Reduction, check_fingerprint
from tl_sparsify.examples import Examples
from tl_sparsify.intervene import (
    Intervention,
    ablate,
    answer_index,
    answer_logits,
    answer_rows,
    batch_size_for,
    check_model,
    intervened,
    run_values,
)
from tl_sparsify.moments import Estimate, Moments
from tl_sparsify.units import Model

_REMEMBERED = 2**24  # numbers

Metric = Callable[[Float[Tensor, "rows choices"], Examples], Float[Tensor, "rows"]]
"""One number for each labelled position, from the logits there (:func:`intervene.answer_logits`) and the batch."""


def log_odds(logits: Float[Tensor, "rows choices"], batch: Examples) -> Float[Tensor, "rows"]:
    """The right answer's logit minus the log-sum-exp of all others (nats); with two choices the logit difference."""
    right = answer_index(batch).to(logits.device)[:, None]
    others = logits.scatter(1, right, float("-inf")).logsumexp(1)
    return logits.gather(1, right)[:, 0] - others


def log_probability(logits: Float[Tensor, "rows choices"], batch: Examples) -> Float[Tensor, "rows"]:
    """The log-probability of the right answer (nats)."""
    return logits.log_softmax(1).gather(1, answer_index(batch).to(logits.device)[:, None])[:, 0]


def correct(logits: Float[Tensor, "rows choices"], batch: Examples) -> Float[Tensor, "rows"]:
    """1 where the answer with the highest logit is the right one, else 0."""
    return (logits.argmax(1) == answer_index(batch).to(logits.device)).to(logits.dtype)


def kl(original: Float[Tensor, "rows choices"], reduced: Float[Tensor, "rows choices"]) -> Float[Tensor, "rows"]:
    """KL(original || reduced) in nats for each row of logits, in float64: confident answers differ by very little."""
    p = original.double().log_softmax(1)
    return (p.exp() * (p - reduced.double().log_softmax(1))).sum(1)


def divergence(
    original: Float[Tensor, "rows choices"],
    reduced: Float[Tensor, "rows choices"],
    batch: Examples,
    metric: Metric | None = None,
) -> Float[Tensor, "batch"]:
    """``D`` for each example: KL (nats), or half the squared error of ``metric``."""
    if metric is None:
        return by_example(kl(original, reduced), batch)
    return by_example((metric(original, batch) - metric(reduced, batch)).square() / 2, batch)


def by_example(rows: Float[Tensor, "rows"], batch: Examples) -> Float[Tensor, "batch"]:
    """The mean over each example's labelled positions."""
    example = answer_rows(batch)[0].to(rows.device)
    total = rows.new_zeros(len(batch)).index_add(0, example, rows)
    return total / torch.bincount(example, minlength=len(batch))


@dataclass(frozen=True)
class InterventionDistribution:
    """From what the interventions are drawn under which two models are compared.

    Attributes:
        kind: ``none`` (the observational case), ``interchange`` (each unit takes, with ``probability``, its value on a
            paired source input: each model its own value), ``mean`` (it takes its mean), or ``mixture``.
        probability: of each unit, independently, for each example.
        source: ``counterfactual`` pairs each example with its counterfactual input, ``shuffled`` with another
            example of the whole split.
        of: the units of ``kept`` ones only, or of ``all``: the reduced model then gets the interventions on the
            units that it still has.
        parts: of a mixture, each with its weight; every example draws one of them.
    """

    kind: Literal["none", "interchange", "mean", "mixture"] = "none"
    probability: float = 0.0
    source: Literal["counterfactual", "shuffled"] = "shuffled"
    of: Literal["kept", "all"] = "kept"
    parts: tuple[tuple[float, InterventionDistribution], ...] = ()

    def __post_init__(self) -> None:
        known = ("none", "interchange", "mean", "mixture")
        if self.kind not in known:
            raise ValueError(f"kind is {self.kind!r}; the known distributions are {', '.join(known)}")
        for name, choices in (("source", ("counterfactual", "shuffled")), ("of", ("kept", "all"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is {' or '.join(choices)}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability is {self.probability}; it lies in [0, 1]")
        if (self.kind == "mixture") != bool(self.parts):
            raise ValueError(f"a distribution of kind {self.kind} has {len(self.parts)} parts")
        if any(weight <= 0 or part.kind == "mixture" for weight, part in self.parts):
            raise ValueError("parts of a mixture need positive weights, and are no mixtures themselves")

    @staticmethod
    def interchange(
        probability: float,
        source: Literal["counterfactual", "shuffled"] = "shuffled",
        of: Literal["kept", "all"] = "kept",
    ) -> InterventionDistribution:
        """Random interchange of units."""
        return InterventionDistribution("interchange", probability, source, of)

    @staticmethod
    def mean(probability: float, of: Literal["kept", "all"] = "kept") -> InterventionDistribution:
        """Random units set to the reduction's mean values."""
        return InterventionDistribution("mean", probability, of=of)

    @staticmethod
    def mixture(*parts: tuple[float, InterventionDistribution]) -> InterventionDistribution:
        """Each example draws one of the distributions, by weight."""
        return InterventionDistribution("mixture", parts=parts)

    @property
    def components(self) -> tuple[tuple[float, InterventionDistribution], ...]:
        """The parts of a mixture, or the one distribution, with weights that sum to 1."""
        parts = self.parts or ((1.0, self),)
        total = sum(weight for weight, _ in parts)
        return tuple((weight / total, part) for weight, part in parts)


NONE = InterventionDistribution()


def source_batch(
    distribution: InterventionDistribution, examples: Examples, index: Int[Tensor, "batch"], seed: int
) -> Examples:
    """The source inputs of the examples ``index``; partners come from the whole split."""
    if distribution.source == "counterfactual":
        if examples.counterfactual_tokens is None:
            raise ValueError("examples have no counterfactual_tokens: use source='shuffled', or give them")
        batch = examples[index]
        return Examples(
            examples.counterfactual_tokens[index], batch.labels, batch.attention_mask, choices=batch.choices
        )
    return examples[_random.shifted_partner(len(examples), seed, 17)[index]]


def drawn_interventions(
    distribution: InterventionDistribution,
    model: Model,
    reduction: Reduction,
    examples: Examples,
    index: Int[Tensor, "batch"],
    seed: int,
) -> tuple[Intervention, ...]:
    """The interventions on the reduction's units for the examples ``index``, source values taken from ``model`` as it
    is now. The same units and sources for every model given the same seed. One forward pass for each part of kind
    ``interchange``."""
    drawn: list[Intervention] = []
    reduction = reduction.for_examples(index)
    lottery = _random.uniform(seed, 31, index)
    low = 0.0
    for number, (share, part) in enumerate(distribution.components):
        mine = (lottery >= low) & (lottery < low + share)
        low += share
        if part.kind == "none" or part.probability == 0:
            continue
        draw = _random.uniform(seed, 29 + number, index[:, None], torch.arange(len(reduction.units)))
        chosen = (draw < part.probability) & mine[:, None]
        if part.of == "kept":
            chosen &= reduction.circuit.mask
        if part.kind == "mean":
            values = reduction.baseline
        else:
            values = run_values(model, source_batch(part, examples, index, seed), reduction.units)
        drawn.append(Intervention(reduction.units, (~chosen).float(), values))
    return tuple(drawn)


Recall = Callable[[int, Callable[[], Float[Tensor, "rows choices"]]], Float[Tensor, "rows choices"]]
"""The logits of the batch that begins with this example: from memory, or computed."""


def computed(start: int, compute: Callable[[], Float[Tensor, "rows choices"]]) -> Float[Tensor, "rows choices"]:
    """Remember nothing."""
    return compute()


def remembering(numbers: int = _REMEMBERED) -> Recall:
    """Remember the logits of the batches that come first, up to so many numbers in all: what is kept does not grow
    with the number of examples. For calls with the same model, examples and batch size only."""
    kept: dict[int, Float[Tensor, "rows choices"]] = {}

    def recall(start: int, compute: Callable[[], Float[Tensor, "rows choices"]]) -> Float[Tensor, "rows choices"]:
        if start in kept:
            return kept[start]
        logits = compute()
        if sum(part.numel() for part in kept.values()) + logits.numel() <= numbers:
            kept[start] = logits
        return logits

    return recall


def remembered(
    model: Model, examples: Examples, *, batch_size: int | None = None, numbers: int = _REMEMBERED
) -> Callable[[Int[Tensor, "batch"]], Float[Tensor, "rows choices"]] | None:
    """The model's logits for any of the examples (:func:`intervene.answer_logits`), from one forward pass over all of
    them; ``None`` where they are more than so many numbers."""
    count = torch.bincount(answer_rows(examples)[0], minlength=len(examples))
    start = count.cumsum(0) - count
    kept: list[Float[Tensor, "rows choices"]] = []
    with torch.no_grad():
        for _, batch in examples.batches(batch_size_for(model, examples, batch_size)):
            kept.append(answer_logits(model, batch))
            if kept[0].shape[1] * int(count.sum()) > numbers:
                return None
    table = torch.cat(kept)

    def of(index: Int[Tensor, "batch"]) -> Float[Tensor, "rows choices"]:
        many = count[index]
        within = torch.arange(int(many.sum())) - (many.cumsum(0) - many).repeat_interleave(many)
        return table[(start[index].repeat_interleave(many) + within).to(table.device)]

    return of


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
) -> Moments:
    """The moments over examples of ``compare(original logits, reduced logits, batch)``, one row for each example.

    Two forward passes over the data (one where ``recall`` knows the original's logits from an earlier call under the
    same interventions); two more for each ``interchange`` in the distribution.
    """
    check_model(model)
    check_fingerprint(model, reduction)
    parts: list[Moments] = []
    with torch.no_grad():
        for index, batch in examples.batches(batch_size_for(model, examples, batch_size)):
            removed = ablate(reduction.for_examples(index))
            same = (interventions, model, reduction, examples, index, seed)
            with intervened(model, *drawn_interventions(*same)):
                original = recall(int(index[0]), lambda batch=batch: answer_logits(model, batch))
            with intervened(model, removed):
                drawn = drawn_interventions(*same)
            with intervened(model, *drawn, removed):
                reduced = answer_logits(model, batch)
            parts.append(Moments.of(compare(original, reduced, batch)))
    return Moments.merge(parts)


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

    Two forward passes over the data; two more for each ``interchange`` in the distribution. ``recall`` may know the
    original's logits from an earlier call (:func:`remembering`).

    Raises:
        ValueError: a model in training mode, a reduction of another model, NaN or infinite activations.
    """

    def compare(original: Tensor, reduced: Tensor, batch: Examples) -> Tensor:
        return divergence(original, reduced, batch, metric)

    settings = {"interventions": interventions, "batch_size": batch_size, "seed": seed, "recall": recall}
    moments = compared(model, reduction, examples, compare, **settings)
    return Estimate.of(moments, "nats" if metric is None else "squared units")
