"""Linearisation: the samples of a whole split, or of some of its examples, as one expansion of the divergence around a
circuit, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.ranks import agreed, gathered, summed
from tl_sparsify.core.moments import Estimate, Moments
from tl_sparsify.core.probes import Samples

HEIGHT = 1024
"""More samples than this are projected at random onto as many rows."""


@dataclass(frozen=True)
class Linearisation:
    """The samples of a whole split: ``R(S) = offset + linear[S].sum() + 1/2 |matrix[:, S].sum(1)|^2``.

    Attributes:
        offset: the risk already made (nats).
        linear: ``[units]``, its derivative along the removal of each unit.
        matrix: ``[rows, units]``; at most :data:`HEIGHT` rows, a random projection over samples beyond that.
        projected: whether rows are a projection.
        deviation: ``[rows, units]``: for each example the part of a unit's effect that lies along the deviation already
            made, ``l[u] / sqrt(2 D)``. It is exact where ``matrix`` is sampled, and bounds what the slope can bring: by
            Cauchy and Schwarz no quadratic that belongs to ``D`` and ``l`` is below ``(sum_S l)^2 / (4 D)``.
        spread: ``[units]``, the standard error over examples of half a unit's own square.
        samples: examples times probes.
    """

    offset: float
    linear: Float[Tensor, "units"]
    matrix: Float[Tensor, "rows units"]
    projected: bool
    deviation: Float[Tensor, "examples units"] | None = None
    spread: Float[Tensor, "units"] | None = None
    samples: int = 0

    def predicted(self, removed: Shaped[Tensor, "some"], restored: Shaped[Tensor, "others"] | None = None) -> float:
        """The predicted risk after also removing these units, and taking back those (nats), which may be negative.
        Sets of units are masks or indices."""
        rise = self.along(self.linear.double()[None], removed, restored).sum()
        square = self.along(self.matrix, removed, restored).double().square().sum()
        return self.offset + float(rise + square / 2)

    @staticmethod
    def along(
        rows: Float[Tensor, "rows units"], removed: Shaped[Tensor, "some"], restored: Shaped[Tensor, "others"] | None
    ) -> Float[Tensor, "rows"]:
        """What rows of effects come to along a change: columns of units that leave, less those of units taken back."""
        moved = rows[:, removed.to(rows.device)].sum(1)
        return moved if restored is None else moved - rows[:, restored.to(rows.device)].sum(1)


def linearise(batches: Iterator[Samples], n: int, *, seed: int, height: int = HEIGHT) -> Linearisation:
    """Gather the samples of ``n`` examples into one matrix of at most ``height`` rows (:func:`linearise_folds`)."""
    return merged(linearise_folds(batches, n, seed=seed, height=height, folds=1))


def linearise_folds(
    batches: Iterator[Samples], n: int, *, seed: int, height: int = HEIGHT, folds: int = 2
) -> tuple[Linearisation, ...]:
    """Gather the samples of ``n`` examples, dealt out by number to as many linearisations of at most ``height`` rows
    together, each the mean over its own examples. ``batches`` are those of this process's share of them; the result is
    that of all.

    More samples are projected: each goes, with random signs, to four of the rows (a sparse Johnson-Lindenstrauss
    map, Kane and Nelson, 2014), which keeps every ``R(S)`` in expectation. Memory: twice ``height`` by units.
    """
    gathering: list[_Gathering] = []
    with agreed(f"the samples of {n} examples"):
        for part in batches:
            if not gathering:
                k, _, u = part.effects.shape
                sizes = [len(range(fold, n, folds)) for fold in range(folds)]
                gathering = [_Gathering(size, k, u, height // folds, part, seed) for size in sizes]
            for fold, one in enumerate(gathering):
                one.add(part, part.index % folds == fold)
    return tuple(one.linearisation(n) for one in gathering)


class _Gathering:
    """The sums of one fold while batches come in."""

    def __init__(self, n: int, k: int, u: int, height: int, like: Samples, seed: int) -> None:
        self.n, self.k, self.seed, self.height = n, k, seed, height
        self.offset = 0.0
        self.linear = like.linear.new_zeros(u, dtype=torch.float64)
        self.own, self.own_square = self.linear.clone(), self.linear.clone()
        self.matrix = _Rows(n * k, u, height, like.effects, seed, 11)
        self.deviation = _Rows(n, u, height, like.effects, seed, 13)

    def add(self, part: Samples, mine: Bool[Tensor, "batch"]) -> None:
        here = mine.to(part.effects.device)
        if not bool(mine.any()):
            return
        offset, linear, effects = part.offset[here].double(), part.linear[here], part.effects[:, here]
        index = part.index[mine]
        self.offset += float(offset.sum()) / self.n
        self.linear += linear.double().sum(0) / self.n
        half = effects.double().square().sum(0) / 2
        self.own += half.sum(0) / self.n
        self.own_square += half.square().sum(0) / self.n
        root = (2 * offset).clamp_min(0).sqrt().to(linear)[:, None]
        along = torch.where(root > 0, linear / root.clamp_min(1e-30), 0.0)
        probe = torch.arange(self.k)[:, None]
        self.matrix.add(effects.flatten(0, 1) / math.sqrt(self.n), (index.expand(self.k, -1), probe))
        self.deviation.add(along / math.sqrt(self.n), (index, 0))

    def linearisation(self, n: int) -> Linearisation:
        """Of all processes, which had ``n`` examples together."""
        offset = torch.tensor(self.offset, dtype=torch.float64)
        offset, linear, own, own_square = summed([(offset, self.linear, self.own, self.own_square)], n)
        variance = (own_square - own.square()).clamp_min(0) / max(1, self.n - 1)
        matrix, projected = self.matrix.stacked(n), self.matrix.projected
        return Linearisation(
            float(offset),
            linear.to(matrix),
            matrix,
            projected,
            self.deviation.stacked(n),
            variance.sqrt().to(matrix),
            self.n * self.k,
        )


class _Rows:
    """Rows as they come, or their random projection where they are more than ``height``."""

    def __init__(self, count: int, units: int, height: int, like: Tensor, seed: int, stream: int) -> None:
        self.projected = count > height
        self.seed, self.stream, self.height = seed, stream, height
        self.matrix = like.new_zeros(height if self.projected else 0, units)
        self.parts: list[Tensor] = []

    def add(self, rows: Float[Tensor, "some units"], counters: tuple[Any, ...]) -> None:
        if not self.projected:
            self.parts.append(rows)
            return
        for copy in range(4):
            draw = _random.bits(self.seed, self.stream, *counters, copy).flatten()
            row = ((draw >> 1) % (self.height // 4) + copy * (self.height // 4)).to(rows.device)
            sign = (0.5 - (draw & 1)).to(rows)  # +-1 over the root of the four copies
            self.matrix.index_add_(0, row, sign[:, None] * rows)

    def stacked(self, n: int) -> Float[Tensor, "rows units"]:
        """The rows of all processes, which had ``n`` examples together."""
        if self.projected:
            return summed([(self.matrix,)], n)[0]
        parts = gathered(self.parts, n)
        return torch.cat(parts) if parts else self.matrix


def merged(folds: Sequence[Linearisation]) -> Linearisation:
    """All folds as one linearisation, each with the weight of its samples."""
    if len(folds) == 1:
        return folds[0]
    total = sum(fold.samples for fold in folds)
    shares = [fold.samples / total for fold in folds]

    def rows(parts: list[Float[Tensor, "_ units"]]) -> Float[Tensor, "rows units"]:
        return torch.cat([math.sqrt(share) * part for share, part in zip(shares, parts, strict=True)])

    spreads = [share * fold.spread for share, fold in zip(shares, folds, strict=True) if fold.spread is not None]
    deviations = [fold.deviation for fold in folds if fold.deviation is not None]
    return Linearisation(
        sum(share * fold.offset for share, fold in zip(shares, folds, strict=True)),
        torch.stack([share * fold.linear for share, fold in zip(shares, folds, strict=True)]).sum(0),
        rows([fold.matrix for fold in folds]),
        any(fold.projected for fold in folds),
        rows(deviations) if len(deviations) == len(folds) else None,
        torch.stack(spreads).sum(0) / math.sqrt(len(folds)) if len(spreads) == len(folds) else None,
        total,
    )


def noting(parts: Iterator[Samples], made: list[Moments]) -> Iterator[Samples]:
    """The same samples; notes the divergence already made on the way."""
    for part in parts:
        made.append(Moments.of(part.made.double()))
        yield part


def predicted_change(
    parts: Iterator[Samples], removed: Int[Tensor, "some"], restored: Int[Tensor, "others"], n: int, unit: str
) -> tuple[Estimate, float]:
    """The predicted joint risk after a change, and how far its own part of it is from a sum over units."""
    sums = torch.zeros(2, dtype=torch.float64)

    def watched() -> Iterator[Samples]:
        for part in parts:
            half, linear = part.effects.double().square().sum(0) / 2, part.linear.double()
            sums[0] += float(part.offset.double().sum()) / n
            sums[1] += float((half + linear)[:, removed.to(half.device)].sum()) / n
            sums[1] += float((half - linear)[:, restored.to(half.device)].sum()) / n
            yield part

    with agreed(f"the prediction for {n} examples"):
        mine = joint_moments(watched(), removed, restored)
    total = Moments.over([mine], n)
    made, alone = summed([(sums,)], n)[0].tolist()
    joint = float(total.mean) - made
    found = Estimate.of(total, unit)
    found = replace(found, mean=max(0.0, found.mean))  # a divergence is never negative
    return found, (joint - alone) / joint if joint else 0.0


def joint_moments(
    batches: Iterator[Samples], removed: Shaped[Tensor, "some"], restored: Shaped[Tensor, "others"] | None = None
) -> Moments:
    """The moments over examples of the predicted joint risk of a set, exactly (no projection); with ``restored`` (of
    ``restorable`` samples) of removing the one set and taking back the other. Sets are masks or indices."""

    def change(of: Float[Tensor, "*some units"]) -> Float[Tensor, "*some"]:
        moved = of[..., removed.to(of.device)].double().sum(-1)
        return moved if restored is None else moved - of[..., restored.to(of.device)].double().sum(-1)

    def of(part: Samples) -> Moments:
        # summed before it is squared: removals that undo each other cost nothing together
        square = change(part.effects).square().sum(0) / 2
        return Moments.of(part.offset.double() + change(part.linear) + square)

    return Moments.merge(of(part) for part in batches)
