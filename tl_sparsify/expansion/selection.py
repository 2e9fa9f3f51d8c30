"""Selection: which units leave, one at a time, by the joint risk that a linearisation predicts.

The order is exactly the one-at-a-time order, for any number of units. Units leave in blocks: a block is chosen within a
pool of the units that are the cheapest or may soon be, and one matrix product then shows at which of its steps a unit
outside the pool would have been cheaper. The block is cut there. So most of the arithmetic is large products instead of
one pass over all units for every unit that leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_sparsify._internal.checks import all_finite
from tl_sparsify.expansion.linearisation import Linearisation

_POOL = 2048
_BLOCK = 512  # units at most that leave between two looks outside the pool
_FIRST = 64
_REACH = 0.5  # of what the last block may have changed, a unit may fall by while it waits: measured on SmolLM2
_ROUGH = 32
_LOOKS = 64  # at least, at all units that a rough choice is made among
_ROUGHLY = 4  # times the units that leave: so many of the cheapest are looked at for a rough choice,
_FEW = 8192  # and at least as many as this
ROUNDING = 1e-9
"""Costs that add up to all but this share of what is to be saved are enough."""


@dataclass(frozen=True)
class Shrinkage:
    """How much of a sampled expansion is believed: ``R(S) = D + slope * sum_S l + 1/2 [interactions * E (sum_S a)^2 +
    (1 - interactions) * sum_S E a^2] + 1/2 sum over pairs of E[f f']``, with ``f = l / sqrt(2 D)`` for each example.

    With fewer samples than units some set of units cancels in every sample and in no other one; what an estimate gains
    from such sets is noise, and so the interactions are shrunk. Those along the deviation already made are not: they
    are exact for each example, and without them all units that cancel a little of the deviation leave together and
    cancel it many times over. ``interactions=1, slope=1`` believes the samples alone, which is right where they
    outnumber units.

    Attributes:
        interactions: the share of the interactions between units, ``1 - lambda``.
        slope: the share of the divergence's slope, ``mu``.

    Example:
        >>> alone = tls.Shrinkage(interactions=0.0)  # no interactions between units
        >>> tls.sparsify(model, train, units, sizes=(0.5,), shrinkage=alone, progress=False).at(0.5)
        Reduction(Circuit(6 of 12 units: 6 heads), mean values)
    """

    interactions: float = 1.0
    slope: float = 1.0

    def __post_init__(self) -> None:
        for name in ("interactions", "slope"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a share lies in [0, 1]")


NO_SHRINKAGE = Shrinkage()


def greedy(
    linearisation: Linearisation,
    candidates: Bool[Tensor, "units"],
    count: int | float,
    *,
    shrinkage: Shrinkage = NO_SHRINKAGE,
    costs: Float[Tensor, "units"] | None = None,
    pool: int = _POOL,
    roughly: bool = False,
) -> Int[Tensor, "some"]:
    """Remove ``count`` of the candidates one at a time, each time the unit whose removal leaves the least predicted
    joint risk; returns them in order. No model pass.

    With ``costs`` the unit that raises the risk least for what it saves, until ``count`` in cost is saved. ``roughly``
    is for comparing settings: it looks at four times as many of the cheapest units as leave (8,192 at least), and
    leaves out the look outside the pool, which is gathered anew 64 times, and for every block of 32 where that is less
    often.

    Cost: ``O(rows * units)`` for each unit that leaves, nearly all of it in matrix products, and less where the
    interactions are shrunk; ``O(rows * pool)`` memory beside the linearisation's own.

    Raises:
        ValueError: NaN or infinite numbers in the linearisation.
    """
    if not (all_finite(linearisation.linear) and all_finite(linearisation.matrix)):
        raise ValueError("the linearisation holds NaN or infinite numbers: is the metric's gradient finite?")
    state = _State.of(linearisation, candidates, shrinkage, costs)
    if roughly and costs is None:
        state = state.cheapest(max(_FEW, int(_ROUGHLY * count)))
    return state.take(count, pool, roughly)


def exchange(
    linearisation: Linearisation,
    kept: Bool[Tensor, "units"],
    removed: Bool[Tensor, "units"],
    count: int,
    back: int,
    *,
    shrinkage: Shrinkage = NO_SHRINKAGE,
    roughly: bool = False,
) -> tuple[Int[Tensor, "back"], Int[Tensor, "leaving"]]:
    """Take ``back`` of the removed units back, and remove ``back + count`` of the kept ones, each one at a time by the
    least predicted joint risk; returns both in order. The linearisation is of ``restorable`` samples. No model pass.
    """
    # a step back along a removal is the removal with the opposite sign
    sign = torch.where(removed.to(linearisation.matrix.device), -1.0, 1.0).to(linearisation.matrix)
    deviation = linearisation.deviation
    signed = replace(
        linearisation,
        linear=sign * linearisation.linear,
        matrix=sign * linearisation.matrix,
        deviation=None if deviation is None else sign * deviation,
    )
    state = _State.of(signed, kept | removed, shrinkage, None)
    taken = removed.to(state.index.device)[state.index]
    restored = state.among(taken).take(back, _POOL, roughly)
    return restored, state.among(~taken).take(back + count, _POOL, roughly)


def after(
    linearisation: Linearisation,
    removed: Int[Tensor, "some"],
    shrinkage: Shrinkage,
    restored: Int[Tensor, "others"] | None = None,
) -> Linearisation:
    """The same expansion once the units ``removed`` have left and those ``restored`` have come back: what their
    interactions add to the others' slopes. Where the slope's share is nothing there is no room for that."""
    along, matrix, deviation = linearisation.along, linearisation.matrix, linearisation.deviation
    moved = shrinkage.interactions * (along(matrix, removed, restored) @ matrix)
    if shrinkage != NO_SHRINKAGE and deviation is not None:
        moved = moved + along(deviation, removed, restored) @ deviation
    slope = linearisation.linear if shrinkage.slope == 0 else linearisation.linear + moved / shrinkage.slope
    return replace(linearisation, offset=linearisation.predicted(removed, restored), linear=slope)


class _State:
    """What is left to choose from, and what the units that left have changed."""

    def __init__(
        self,
        index: Int[Tensor, "some"],
        matrix: Float[Tensor, "rows some"],
        half: Float[Tensor, "some"],
        linear: Float[Tensor, "some"],
        costs: Float[Tensor, "some"] | None,
    ) -> None:
        self.index, self.half, self.costs = index, half, costs
        self.linear = linear
        self.vectors = matrix.T.contiguous()  # of the units: they are gathered again and again
        self.length = self.vectors.square().sum(1).sqrt()
        self.residual = matrix.new_zeros(len(matrix))
        self.step = matrix.new_zeros(())  # how far the last block has moved it
        self.live = torch.ones(len(index), dtype=torch.bool, device=index.device)
        self.alive = len(index)

    @staticmethod
    def of(
        linearisation: Linearisation,
        candidates: Bool[Tensor, "units"],
        shrinkage: Shrinkage,
        costs: Float[Tensor, "units"] | None,
    ) -> _State:
        matrix = linearisation.matrix
        index = candidates.to(matrix.device).nonzero().flatten()
        sampled = matrix[:, index]
        some = None if costs is None else costs.to(matrix.device, torch.float64)[index]  # they are added up
        half, slope = sampled.square().sum(0) / 2, shrinkage.slope * linearisation.linear[index]
        if shrinkage == NO_SHRINKAGE or linearisation.deviation is None or linearisation.spread is None:
            sampled = math.sqrt(shrinkage.interactions) * sampled
        else:
            along = linearisation.deviation[:, index]
            half = torch.maximum(half + linearisation.spread[index], along.square().sum(0) / 2)
            sampled = torch.cat([along, math.sqrt(shrinkage.interactions) * sampled])
        return _State(index, sampled, half, slope, some)

    def among(self, live: Bool[Tensor, "some"]) -> _State:
        """The same state, to choose from these alone."""
        self.live, self.alive = live.clone(), int(live.sum())
        return self

    def cheapest(self, count: int) -> _State:
        """The state with the units alone that are the cheapest to begin with."""
        if count >= self.alive:
            return self
        here = (self.half + self.linear).topk(count, largest=False, sorted=False).indices.sort().values
        return _State(self.index[here], self.vectors[here].T, self.half[here], self.linear[here], None)

    def take(self, count: int | float, pool: int, roughly: bool) -> Int[Tensor, "taken"]:
        """One unit at a time, until ``count`` of them, or so much in cost, are gone or none is left."""
        picked: list[Tensor] = []
        left, block = float(count) * (1 - ROUNDING), _FIRST
        rough = min(max(_ROUGH, int(min(count, self.alive)) // _LOOKS), _POOL // 2)
        while left > 0 and self.alive:
            steps = min(rough if roughly else block, self.alive)
            size = min(pool, max(_POOL // 4, 4 * steps)) if roughly else pool
            chosen, asked = self.next_block(steps, left, size, check=not roughly)
            picked.append(self.index[chosen].cpu())
            left -= len(chosen) if self.costs is None else float(self.costs[chosen].sum())
            block = min(_BLOCK, 2 * asked) if len(chosen) == asked else max(16, 2 * len(chosen))
        return torch.cat(picked) if picked else torch.zeros(0, dtype=torch.long)

    def next_block(self, steps: int, left: float, pool: int, check: bool) -> tuple[Int[Tensor, "picked"], int]:
        """The next units to leave, at most ``steps`` of them, in order; and how many were tried."""
        rise = self.half + self.linear + self.vectors @ self.residual
        rise[~self.live] = torch.inf
        soon = rise - _REACH * self.step * self.length if check else rise.clone()
        soon[self._by_cost(rise).argmin()] = -torch.inf  # the next to leave is in the pool, whatever may soon be
        here = self._by_cost(soon).topk(min(pool, self.alive), largest=False, sorted=False).indices.sort().values
        inside = self.vectors[here]
        picks, lows = self._within(inside, here, rise[here], min(steps, len(here)), left)
        asked, good = len(picks), len(picks)
        if check and len(here) < self.alive and good > 1:
            good = self._uncontested(rise, here, inside[picks[: good - 1]].cumsum(0), lows[1:good])
        chosen, moved = here[picks[:good]], inside[picks[:good]].sum(0)
        self.live[chosen] = False
        self.alive -= good
        self.residual, self.step = self.residual + moved, moved.norm()
        return chosen, asked

    def _within(
        self,
        inside: Float[Tensor, "pool rows"],
        here: Int[Tensor, "pool"],
        rise: Float[Tensor, "pool"],
        steps: int,
        left: float,
    ) -> tuple[Int[Tensor, "picked"], Float[Tensor, "picked"]]:
        """One at a time within the pool: places in it, and by what each was chosen."""
        change = (inside @ inside.T).cpu().numpy()
        now = rise.cpu().numpy().copy()
        costs = None if self.costs is None else self.costs[here].cpu().numpy()
        price = None if costs is None else costs.astype(now.dtype)
        picks = np.empty(steps, dtype=np.int64)
        lows = np.empty(steps, dtype=now.dtype)
        saved, n = 0.0, 0
        while n < steps and saved < left:
            order = now if price is None else _per_cost(now, price)
            pick = int(order.argmin())
            picks[n], lows[n] = pick, order[pick]
            now += change[pick]
            now[pick] = np.inf
            saved += 1.0 if costs is None else float(costs[pick])
            n += 1
        device = inside.device
        return torch.from_numpy(picks[:n]).to(device), torch.from_numpy(lows[:n]).to(device)

    def _uncontested(
        self,
        rise: Float[Tensor, "some"],
        here: Int[Tensor, "pool"],
        path: Float[Tensor, "later rows"],
        lows: Float[Tensor, "later"],
    ) -> int:
        """How many picks stand: at each one after the first no unit outside the pool would have been cheaper."""
        outside = self.live.clone()
        outside[here] = False
        far = outside.nonzero().flatten()
        # by Cauchy and Schwarz a rise falls by no more than the residual's way times the unit's own length
        least = rise[far] - path.square().sum(1).max().sqrt() * self.length[far]
        near = far[self._by_cost(least, far) < lows.max()]
        if not len(near):
            return 1 + len(lows)
        there = rise[near][:, None] + self.vectors[near] @ path.T
        cheaper = (self._by_cost(there.T, near) < lows[:, None]).any(1).nonzero()
        return 1 + int(cheaper[0]) if len(cheaper) else 1 + len(lows)

    def _by_cost(
        self, rise: Float[Tensor, "*steps some"], of: Int[Tensor, "some"] | None = None
    ) -> Float[Tensor, "*steps some"]:
        if self.costs is None:
            return rise
        costs = (self.costs if of is None else self.costs[of]).to(rise)
        return torch.where(rise > 0, rise / costs, rise * costs)


def _per_cost(rise: Shaped[np.ndarray, "some"], costs: Shaped[np.ndarray, "some"]) -> Shaped[np.ndarray, "some"]:
    """What removing a unit raises the risk by for each unit of cost that it saves; a fall counts for as much more."""
    return np.where(rise > 0, rise / costs, rise * costs)
