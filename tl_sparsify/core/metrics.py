"""Metrics: one number for each answer or example, from logits. Per example, never a batch mean. And the divergence's
derivatives by the logits: its slope, and probes that factor its Hessian.

Where examples have several right and wrong answers (``right_answers``, ``wrong_answers``), :func:`mean_difference` and
:func:`probability_difference` take means and sums over them: that a later year is named, whichever, is the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_index, answer_rows
from tl_sparsify.core.prompts import NO_LABEL

__all__ = ["correct", "log_odds", "log_probability", "mean_difference", "probability_difference"]

Metric = Callable[[Float[Tensor, "rows choices"], Examples], Float[Tensor, "rows"]]
"""One number for each labelled position, from the logits there (:func:`forward.answer_logits`) and the batch."""


def log_odds(logits: Float[Tensor, "rows choices"], batch: Examples) -> Float[Tensor, "rows"]:
    """The right answer's logit minus the log-sum-exp of all others (nats); with two choices the logit difference.

    Example:
        >>> data = tls.Examples(torch.tensor([[0]]), torch.tensor([[1]]), choices=torch.tensor([1, 2]))
        >>> tls.metrics.log_odds(torch.tensor([[3.0, 1.0]]), data)
        tensor([2.])
    """
    right = answer_index(batch).to(logits.device)[:, None]
    others = logits.scatter(1, right, float("-inf")).logsumexp(1)
    return logits.gather(1, right)[:, 0] - others


def log_probability(logits: Float[Tensor, "rows choices"], batch: Examples) -> Float[Tensor, "rows"]:
    """The log-probability of the right answer (nats).

    Example:
        >>> data = tls.Examples(torch.tensor([[0]]), torch.tensor([[1]]), choices=torch.tensor([1, 2]))
        >>> tls.metrics.log_probability(torch.tensor([[0.0, 0.0]]), data)
        tensor([-0.6931])
    """
    return logits.log_softmax(1).gather(1, answer_index(batch).to(logits.device)[:, None])[:, 0]


def mean_difference(logits: Float[Tensor, "rows choices"], batch: Examples) -> Float[Tensor, "rows"]:
    """The mean logit of the right answers minus that of the wrong ones: with one of each the logit difference.

    Right and wrong answers are the batch's ``right_answers`` and ``wrong_answers``; where it has none its labels and
    counterfactual labels.

    Raises:
        ValueError: examples with neither.

    Example:
        >>> sets = {"right_answers": torch.tensor([[1, 2]]), "wrong_answers": torch.tensor([[0, -100]])}
        >>> data = tls.Examples(torch.tensor([[0]]), torch.tensor([[1]]), **sets)
        >>> tls.metrics.mean_difference(torch.tensor([[1.0, 5.0, 3.0]]), data)
        tensor([3.])
    """
    right, wrong = (some.to(logits) for some in _sets(batch, logits.shape[1]))
    return (logits * right).sum(1) / right.sum(1) - (logits * wrong).sum(1) / wrong.sum(1)


def probability_difference(logits: Float[Tensor, "rows choices"], batch: Examples) -> Float[Tensor, "rows"]:
    """The probability that the answer is a right one minus that it is a wrong one: sums over the sets of
    :func:`mean_difference`.

    Raises:
        ValueError: examples with neither.

    Example:
        >>> sets = {"right_answers": torch.tensor([[1, 2]]), "wrong_answers": torch.tensor([[0]])}
        >>> data = tls.Examples(torch.tensor([[0]]), torch.tensor([[1]]), **sets)
        >>> tls.metrics.probability_difference(torch.zeros(1, 4), data)
        tensor([0.2500])
    """
    right, wrong = (some.to(logits) for some in _sets(batch, logits.shape[1]))
    return (logits.softmax(1) * (right - wrong)).sum(1)


def correct(logits: Float[Tensor, "rows choices"], batch: Examples) -> Float[Tensor, "rows"]:
    """1 where the answer with the highest logit is right, else 0: the label, or where there are ``right_answers`` one
    of them. With ``batch.whole`` 1 at all labelled positions of an example or at none.

    Example:
        >>> data = tls.Examples(torch.tensor([[0, 0]]), torch.tensor([[1, 2]]), whole=True)
        >>> tls.metrics.correct(torch.tensor([[0.0, 9.0, 0.0], [0.0, 9.0, 0.0]]), data)
        tensor([0., 0.])
    """
    best = logits.argmax(1)
    found = best == answer_index(batch).to(logits.device)
    if batch.right_answers is not None:
        right = _members(batch, batch.right_answers, logits.shape[1]).to(logits.device)
        found |= right.gather(1, best[:, None])[:, 0]
    if not batch.whole:
        return found.to(logits.dtype)
    example = answer_rows(batch)[0].to(logits.device)
    wrong = torch.zeros(len(batch), dtype=torch.long, device=logits.device).index_add(0, example, (~found).long())
    return (wrong == 0)[example].to(logits.dtype)


def _sets(batch: Examples, columns: int) -> tuple[Bool[Tensor, "rows choices"], Bool[Tensor, "rows choices"]]:
    """For each labelled position which of the columns are right answers, and which are wrong ones."""
    example, position = answer_rows(batch)
    right, wrong = batch.right_answers, batch.wrong_answers
    if wrong is None and batch.counterfactual_labels is not None:
        wrong = batch.counterfactual_labels[example, position][:, None]
    if wrong is None:
        raise ValueError("examples have neither wrong_answers nor counterfactual_labels to hold the right ones against")
    right = batch.labels[example, position][:, None] if right is None else right
    return _members(batch, right, columns), _members(batch, wrong, columns)


def _members(batch: Examples, answers: Int[Tensor, "rows some"], columns: int) -> Bool[Tensor, "rows choices"]:
    """Which of the columns are among each row's answers."""
    if batch.choices is not None:
        return (answers[:, :, None] == batch.choices).any(1)
    found = torch.zeros(len(answers), columns + 1, dtype=torch.bool, device=answers.device)
    return found.scatter(1, torch.where(answers == NO_LABEL, columns, answers), True)[:, :columns]


def cross_entropy_slope(logits: Float[Tensor, "rows choices"], batch: Examples) -> Float[Tensor, "rows choices"]:
    """The derivative of the negative log-probability of the right answer by each logit."""
    right = answer_index(batch).to(logits.device)[:, None]
    return logits.softmax(1).scatter_add(1, right, -torch.ones_like(logits[:, :1]))


def kl(original: Float[Tensor, "rows choices"], reduced: Float[Tensor, "rows choices"]) -> Float[Tensor, "rows"]:
    """KL(original || reduced) in nats for each row of logits, in float64: confident answers differ by very little."""
    p = original.double().log_softmax(1)
    found = (p.exp() * (p - reduced.double().log_softmax(1))).sum(1)
    return found - found.detach().clamp_max(0)  # rounding may leave it below 0; gradients stay what they are


def divergence(
    original: Float[Tensor, "rows choices"],
    reduced: Float[Tensor, "rows choices"],
    batch: Examples,
    metric: Metric | None = None,
) -> Float[Tensor, "batch"]:
    """``D`` for each example: KL (nats), or half the squared error of ``metric``."""
    if metric is None:
        return by_example(kl(original, reduced), batch)
    return by_example((measured_by(metric, original, batch) - measured_by(metric, reduced, batch)).square() / 2, batch)


def measured_by(metric: Metric, logits: Float[Tensor, "rows choices"], batch: Examples) -> Float[Tensor, "rows"]:
    """What a metric gives.

    Raises:
        ValueError: not one finite number for each labelled position.
    """
    found = metric(logits, batch)
    if not isinstance(found, Tensor) or found.shape != logits.shape[:1]:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"metric gave shape {shape} for {len(logits)} rows of logits: "
            "it must give one number for each labelled position"
        )
    if not bool((bad := ~torch.isfinite(found.detach())).any()):
        return found
    raise ValueError(
        f"metric gave NaN or infinite numbers for {int(bad.sum())} of {len(logits)} rows of logits: it must be finite "
        "(log_odds is not, where choices has one answer)"
    )


def by_example(rows: Float[Tensor, "rows"], batch: Examples) -> Float[Tensor, "batch"]:
    """The mean over each example's labelled positions."""
    example = answer_rows(batch)[0].to(rows.device)
    total = rows.new_zeros(len(batch)).index_add(0, example, rows)
    return total / torch.bincount(example, minlength=len(batch))


def risk_and_right(
    original: Float[Tensor, "rows choices"], reduced: Float[Tensor, "rows choices"], batch: Examples
) -> Float[Tensor, "batch measures"]:
    """Each example's divergence, and whether the reduced model is right there: what tables of circuits show."""
    columns = (kl(original, reduced), correct(reduced, batch).double())
    return torch.stack([by_example(column, batch) for column in columns], 1)


def fisher_probes(
    logits: Float[Tensor, "rows choices"],
    batch: Examples,
    index: Int[Tensor, "batch"],
    *,
    probes: int,
    temperature: float,
    seed: int,
    most: int = 1,
) -> list[Float[Tensor, "rows choices"]]:
    """Probes on the logits whose second moments sum to the Fisher matrix of ``softmax(logits / temperature)``.

    Up to ``probes + 1`` answers the Fisher matrix is factored exactly (its Cholesky columns in closed form: Tanabe
    and Sagae, 1992). Several labelled positions of an example are kept apart by probes of their own where ``probes``
    are enough for that, which is exact too, and else by random signs, drawn as often as ``probes`` allow. ``most`` is
    the largest number of positions of any example, also of other batches, so that all have as many probes. With more
    answers a probe is the gradient of ``log p(y)`` at a sampled ``y``. With ``temperature`` other than 1 the risk that
    they give is ``temperature**2`` times the risk at that temperature.
    """
    example, _ = answer_rows(batch)
    scale = _root_share(example, len(batch)).to(logits)[:, None]
    p = (logits / temperature).softmax(1)
    if logits.shape[1] - 1 <= probes:
        columns = _covariance_root(p)
        draws = probes // max(1, len(columns))
        return [
            scale * sign[:, None].to(logits) * column
            for number, column in enumerate(columns)
            for sign in _kept_apart(example, index, draws=draws, most=most, column=number, seed=seed)
        ]
    place = (index[example], _number(example))
    found: list[Float[Tensor, "rows choices"]] = []
    for probe in range(probes):
        u = _random.uniform(seed, 7, *place, probe).to(logits)[:, None]
        total = p.cumsum(1)  # its last entry is 1 only up to rounding
        answer = torch.searchsorted(total, u * total[:, -1:]).clamp_max(p.shape[1] - 1)
        # p - e_y has mean 0 and covariance diag(p) - p p', which is the Fisher matrix, where y is drawn from p
        found.append(-p.scatter_add(1, answer, -torch.ones_like(u)) * scale / math.sqrt(probes))
    return found


def most_answers(examples: Examples) -> int:
    """The largest number of labelled positions of any example."""
    return int((examples.labels != NO_LABEL).sum(1).max()) if len(examples) else 1


def _root_share(example: Int[Tensor, "rows"], n: int) -> Float[Tensor, "rows"]:
    """The root of each row's share of its example's divergence, a mean over its answers: probes are squared."""
    return 1 / torch.bincount(example, minlength=n).double().sqrt()[example]


def _number(example: Int[Tensor, "rows"]) -> Int[Tensor, "rows"]:
    """Which of its example's answers each row is: draws by this and not by position know nothing of padding."""
    return torch.arange(len(example)) - torch.searchsorted(example, example)


def _kept_apart(
    example: Int[Tensor, "rows"], index: Int[Tensor, "batch"], *, draws: int, most: int, column: int, seed: int
) -> list[Float[Tensor, "rows"]]:
    """Factors of the rows in each of at most ``draws`` probes, whose products sum to one for a row with itself and to
    zero for two rows of an example: exactly where it has at most ``draws``, else on average over random signs."""
    number, rows = _number(example), torch.bincount(example, minlength=len(index))[example]
    signs = [
        _random.signs(seed, 5, index[example], number, column, *([draw] if draw else []))
        for draw in range(min(draws, max(most, int(rows.max()))))
    ]
    own = [signs[0] * (number == draw) for draw in range(len(signs))]
    return [torch.where(rows <= draws, one, sign / math.sqrt(draws)) for one, sign in zip(own, signs, strict=True)]


def _covariance_root(p: Float[Tensor, "rows choices"]) -> list[Float[Tensor, "rows choices"]]:
    """Columns ``l_j`` with ``sum_j l_j l_j' = diag(p) - p p'`` for each row."""
    rest = p.flip(1).cumsum(1).flip(1)  # rest[j] = p[j] + p[j+1] + ...
    columns: list[Float[Tensor, "rows choices"]] = []
    for j in range(p.shape[1] - 1):
        before, after = rest[:, j].clamp_min(1e-30), rest[:, j + 1]
        diagonal = (p[:, j] / before * after).clamp_min(0).sqrt()
        # in this order no two small numbers are multiplied
        below = -(p[:, j + 1 :] / after.clamp_min(1e-30)[:, None]) * diagonal[:, None]
        columns.append(torch.cat([p.new_zeros(len(p), j), diagonal[:, None], below], 1))
    return columns


def metric_probe(
    logits: Float[Tensor, "rows choices"],
    batch: Examples,
    index: Int[Tensor, "batch"],
    *,
    metric: Metric,
    seed: int,
    probes: int = 1,
    most: int = 1,
) -> list[Float[Tensor, "rows choices"]]:
    """The one probe of a scalar metric, its gradient; of several labelled positions as :func:`fisher_probes`."""
    example, _ = answer_rows(batch)
    scale = _root_share(example, len(batch))
    with torch.enable_grad():
        z = logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(measured_by(metric, z, batch).sum(), z)
    signs = _kept_apart(example, index, draws=probes, most=most, column=0, seed=seed)
    return [(scale * sign).to(logits)[:, None] * gradient for sign in signs]


def output_probes(
    logits: Float[Tensor, "rows choices"],
    batch: Examples,
    index: Int[Tensor, "batch"],
    *,
    probes: int,
    temperature: float,
    metric: Metric | None,
    seed: int,
    most: int = 1,
) -> list[Float[Tensor, "rows choices"]]:
    """The probes of the divergence: Fisher probes for KL, the one exact probe for a scalar metric."""
    if metric is not None:
        return metric_probe(logits, batch, index, metric=metric, seed=seed, probes=probes, most=most)
    return fisher_probes(logits, batch, index, probes=probes, temperature=temperature, seed=seed, most=most)


def divergence_and_slope(
    original: Float[Tensor, "rows choices"],
    here: Float[Tensor, "rows choices"],
    batch: Examples,
    metric: Metric | None,
    temperature: float,
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "rows choices"]]:
    """Each example's divergence and its gradient by the logits ``here``; of KL at a temperature, times its square."""
    with torch.enable_grad():
        here = here.detach().clone().requires_grad_()
        if metric is None:
            t = temperature
            found = t * t * divergence(original / t, here / t, batch)
        else:
            found = divergence(original, here, batch, metric)
        (slope,) = torch.autograd.grad(found.sum(), here)
    return found.detach(), slope
