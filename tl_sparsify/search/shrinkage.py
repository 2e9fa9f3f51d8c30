"""Shrinkage, chosen: how much of a sampled expansion to believe in a round, by what it predicts on unseen samples.

A circuit is chosen on one half of the samples and its divergence predicted on the other, without any shrinkage there:
for samples that the choice has not seen the sampled expansion is unbiased. No model pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparsify.search.linearisation import Linearisation
from tl_sparsify.search.selection import Shrinkage, greedy

_INTERACTIONS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.0)
_SLOPES = (1.0, 0.75, 0.5, 0.25, 0.0)
START = Shrinkage(interactions=0.05, slope=0.5)


def chosen(
    halves: Sequence[Linearisation],
    candidates: Bool[Tensor, "units"],
    count: int | float,
    *,
    near: Shrinkage = START,
    slopes: bool = False,
    costs: Float[Tensor, "units"] | None = None,
) -> tuple[Shrinkage, float]:
    """The shrinkage whose choice of ``count`` units promises the least divergence on samples that it has not seen,
    among ``near`` and the settings next to it, and that divergence.

    Each call moves one step at most, of the slope's share or else of the interactions', so that a search follows what
    its rounds need. No model pass; as many greedy
    selections as settings and halves.
    """

    def promise(setting: Shrinkage) -> float:
        total = 0.0
        for here in range(len(halves)):
            picks = greedy(halves[here], candidates, count, shrinkage=setting, costs=costs, roughly=True)
            removed = torch.zeros_like(candidates).index_fill(0, picks, True)
            others = [half for there, half in enumerate(halves) if there != here]
            total += sum(max(0.0, other.predicted(removed)) for other in others) / len(others)
        return total / len(halves)

    found = {setting: promise(setting) for setting in _neighbours(near, slopes)}
    best = min(found, key=lambda setting: found[setting])
    return best, found[best]


def _neighbours(near: Shrinkage, slopes: bool) -> list[Shrinkage]:
    """The setting itself first, so that it stays where others are no better."""
    steps = (1, -1)
    if slopes:
        return list(dict.fromkeys([near, *(replace(near, slope=_next(_SLOPES, near.slope, step)) for step in steps)]))
    others = (replace(near, interactions=_next(_INTERACTIONS, near.interactions, step)) for step in steps)
    return list(dict.fromkeys([near, *others]))


def _next(values: tuple[float, ...], near: float, step: int) -> float:
    place = min(range(len(values)), key=lambda i: abs(values[i] - near))
    return values[min(max(place + step, 0), len(values) - 1)]
