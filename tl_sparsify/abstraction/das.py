"""Directions learnt to carry a variable: where in the residual stream, and which.

DAS fits arbitrary targets and finds effects in untrained models (Arora et al., 2024): judge what is learnt here on
other pairs, with the controls of :func:`tl_sparsify.verify`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.tools.analysis.interchange import fit_das

from tl_sparsify._internal.ranks import gathered
from tl_sparsify.abstraction.evidence import Pairs
from tl_sparsify.abstraction.interchange import TestedModel, columns_of, interchange_gradients
from tl_sparsify.core.basis import directions
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.intervene import ablate, intervened
from tl_sparsify.core.units import Unit, residuals

# Of the base, in the points where gradients are taken: an answer that is certain, or a ReLU that is dead, at the base
# has no gradient there, but has one somewhere on the way to the source.
LEVELS = (1.0, 0.75, 0.5, 0.25)
EPOCHS = 20  # of learning: passes over the pairs
_PAIRS = 32  # for each step


def das_directions(
    subject: TestedModel,
    ranking: Pairs,
    expected: Int[Tensor, "n"],
    rank: int,
    held: Bool[Tensor, "#pos"],
    *,
    seed: int,
    batch_size: int | None = None,
) -> list[Unit]:
    """Directions of the residual stream, at the place where the gradients promise most (of those ``held``, the
    positions that every pair has), trained so that interchanging them gives the ``expected`` answers (TransformerLens's
    DAS).

    Forward and backward passes over the pairs: one for each of :data:`LEVELS`, :data:`EPOCHS` for the learning; two
    forward passes more for the sources.
    """
    n = len(ranking)
    hook, position = _promising(subject, ranking, expected, rank, held, batch_size)
    targets, task_logits = asked(subject.model, ranking, expected)
    places = torch.full((n,), position)
    removed: tuple[Any, ...] = () if subject.removal is None else (ablate(subject.removal),)
    with intervened(subject.model, *removed):
        result = fit_das(
            subject.model,
            hook,
            torch.arange(n),
            torch.arange(n, 2 * n),
            targets,
            task_logits,
            rank=rank,
            base_positions=places,
            source_positions=places,
            epochs=EPOCHS,
            batch_size=_PAIRS,
            seed=seed,
        )
    return [unit.at(position) for unit in directions(subject.model, hook, result.basis.cpu())]


def asked(
    model: Any, pairs: Pairs, expected: Int[Tensor, "n"]
) -> tuple[Int[Tensor, "n"], Callable[[Int[Tensor, "some"]], Float[Tensor, "some choices"]]]:
    """The number of each expected answer among the possible ones, and what TransformerLens calls to run the model: the
    logits of these for the bases of these numbers, or for sources from ``n`` on (their answers and masks go along)."""
    base, n = pairs.base, len(pairs)
    known = torch.tensor(sorted(set(pairs.answers.values()))) if base.choices is None else base.choices.cpu()

    def task_logits(numbers: Int[Tensor, "some"]) -> Float[Tensor, "some choices"]:
        side = base if int(numbers[0]) < n else pairs.source
        return answer_logits(model, replace(side[numbers % n], choices=known))

    return columns_of(expected, known), task_logits


def _promising(
    subject: TestedModel,
    ranking: Pairs,
    expected: Int[Tensor, "n"],
    rank: int,
    held: Bool[Tensor, "#pos"],
    batch_size: int | None,
) -> tuple[str, int]:
    """The hook point and position of the residual stream where the best subspace promises most, to first order.

    Interchanging the coordinates along orthonormal ``B`` promises ``trace(B' M B)`` with ``M = E[g (v_source -
    v_base)']``: at best the sum of the greatest eigenvalues of ``M``'s symmetric part. (That of the whole stream is
    its trace, in which other variables at the same place cancel this one.)
    """
    stream = residuals(subject.model)
    parts = interchange_gradients(
        subject, ranking.base, ranking.source, {"": expected}, stream, LEVELS, batch_size=batch_size
    )
    batches = gathered((found for _, found in parts), len(ranking))
    promises: dict[tuple[str, int], float] = {}
    for layer, site in enumerate(stream.sites):
        g, step = (torch.cat([found[layer][k][:, :, 0].double().cpu() for found in batches]) for k in range(2))
        for position in held.expand(g.shape[1]).nonzero().flatten().tolist():
            both = torch.cat([g[:, position], step[:, position]])
            if rank > both.shape[1]:
                raise ValueError(f"subspace is {rank}; the residual stream has {both.shape[1]} directions")
            basis = torch.linalg.qr(both.T).Q  # nothing happens outside of it
            m = (g[:, position] @ basis).T @ (step[:, position] @ basis)
            promises[site.hook, position] = float(torch.linalg.eigvalsh(m + m.T)[-rank:].clamp_min(0).sum())
    return max(promises, key=lambda place: promises[place])
