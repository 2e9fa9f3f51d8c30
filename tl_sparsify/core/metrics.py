"""Metrics: one number for each answer or example, from logits. Per example, never a batch mean."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_index, answer_rows

Metric = Callable[[Float[Tensor, "rows choices"], Examples], Float[Tensor, "rows"]]
"""One number for each labelled position, from the logits there (:func:`forward.answer_logits`) and the batch."""


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
