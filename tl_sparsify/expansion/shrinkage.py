"""Shrinkage, chosen: how much of a sampled expansion to believe in a round, by what it predicts on unseen samples.

A circuit is chosen on one half of the samples and its divergence predicted on the other, without any shrinkage there:
for samples that the choice has not seen the sampled expansion is unbiased. No model pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal.ranks import gathered, share
from tl_sparsify.expansion.linearisation import Linearisation
from tl_sparsify.expansion.selection import Shrinkage, exchange, greedy

_INTERACTIONS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.0)
_SLOPES = (1.0, 0.75, 0.5, 0.25, 0.0)
_SHARES = tuple(0.08 / 2**i for i in range(8))
START = Shrinkage(interactions=0.05, slope=0.5)
_START_TRADE = Shrinkage(interactions=0.1, slope=0.5)

Setting = TypeVar("Setting", bound=Hashable)
Change = tuple[Int[Tensor, "restored"] | None, Int[Tensor, "removed"]]


@dataclass(frozen=True)
class Trade:
    """How an exchange is made.

    Attributes:
        shrinkage: of the expansion that it is chosen by.
        share: of the kept units that leave, and as many come back.
    """

    shrinkage: Shrinkage = _START_TRADE
    share: float = _SHARES[2]

    def count(self, kept: int) -> int:
        """How many of so many kept units leave."""
        return max(1, round(self.share * kept))


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
    its rounds need. No model pass; as many greedy selections as settings and halves, which processes share.
    """

    def choose(half: Linearisation, setting: Shrinkage) -> Change:
        return None, greedy(half, candidates, count, shrinkage=setting, costs=costs, roughly=True)

    return _most_promising(halves, _beside(near, slopes), choose)


def traded(
    halves: Sequence[Linearisation],
    kept: Bool[Tensor, "units"],
    removed: Bool[Tensor, "units"],
    *,
    near: Trade,
) -> tuple[Trade, float]:
    """The exchange, among ``near`` and those next to it in one respect, that promises the least divergence on samples
    that it has not seen, and that divergence. No model pass; as many exchanges as settings and halves."""
    size = int(kept.sum())
    settings = list(
        dict.fromkeys(
            [near]
            + [replace(near, shrinkage=one) for slopes in (True, False) for one in _beside(near.shrinkage, slopes)]
            + [replace(near, share=_next(_SHARES, near.share, step)) for step in (1, -1)]
        )
    )

    def choose(half: Linearisation, setting: Trade) -> Change:
        many = min(setting.count(size), int(removed.sum()))
        return exchange(half, kept, removed, 0, many, shrinkage=setting.shrinkage, roughly=True)

    return _most_promising(halves, settings, choose)


def _most_promising(
    halves: Sequence[Linearisation], settings: Sequence[Setting], choose: Callable[[Linearisation, Setting], Change]
) -> tuple[Setting, float]:
    """The first setting whose changes, chosen on each half, promise the least on the others, and what they promise.
    Processes share the trials."""
    trials = [(setting, here) for setting in settings for here in range(len(halves))]
    mine = trials[share(len(trials))]
    promises = gathered((_promise(halves, here, choose(halves[here], one)) for one, here in mine), len(trials))
    found = {
        setting: sum(promises[number * len(halves) : (number + 1) * len(halves)]) / len(halves)
        for number, setting in enumerate(settings)
    }
    best = min(found, key=lambda setting: found[setting])
    return best, found[best]


def _promise(halves: Sequence[Linearisation], here: int, change: Change) -> float:
    """The divergence that a change chosen on this half promises on the others."""
    # sorted: settings that choose the same units in another order promise the same bits, so that the first one stays
    restored, removed = None if change[0] is None else change[0].sort().values, change[1].sort().values
    others = [half for there, half in enumerate(halves) if there != here]
    return sum(max(0.0, other.predicted(removed, restored)) for other in others) / len(others)


def _beside(near: Shrinkage, slopes: bool) -> list[Shrinkage]:
    """The setting itself first, so that it stays where others are no better."""
    steps = (1, -1)
    if slopes:
        return list(dict.fromkeys([near, *(replace(near, slope=_next(_SLOPES, near.slope, step)) for step in steps)]))
    others = (replace(near, interactions=_next(_INTERACTIONS, near.interactions, step)) for step in steps)
    return list(dict.fromkeys([near, *others]))


def _next(values: tuple[float, ...], near: float, step: int) -> float:
    place = min(range(len(values)), key=lambda i: abs(values[i] - near))
    return values[min(max(place + step, 0), len(values) - 1)]
