"""Certificates: what a mean of draws is certain to be, however often and whenever one looks at it.

An interchange accuracy or an agreement is a mean of draws in [0, 1]. :func:`confidence_sequence` bounds it by betting
against every possible mean (Waudby-Smith and Ramdas, *Estimating means of bounded random variables by betting*, 2024,
the hedged capital process; used for interchange interventions in Asiaee, *Certified Interventional Fidelity*, 2026).
:func:`margin_bound` bounds how often two models' answers differ by how far their logits are apart.

Both are statements about the distribution that was drawn from, and about nothing else.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

_TOGETHER = 256  # draws whose capital is computed at once
_MOST = 0.5  # the share of what a bet may lose at most (c in the paper)


def confidence_sequence(
    draws: Float[Tensor, "n"], *, level: float = 0.05, grid: int = 1000
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Lower and upper bounds on the mean after each draw: with probability ``1 - level`` *all* of them hold at once, so
    that one may stop when one likes.

    Args:
        draws: numbers in [0, 1], in the order drawn; each with the same mean given those before.
        grid: bounds are multiples of ``1 / grid``, rounded outwards.

    Cost: ``n * grid`` operations, no model pass.

    Raises:
        ValueError: a draw outside [0, 1], a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it lies between 0 and 1")
    x = draws.double().cpu()
    if len(x) and not (bool((x >= 0).all()) and bool((x <= 1).all())):
        raise ValueError(f"draws range from {float(x.min())} to {float(x.max())}; they must lie in [0, 1]")
    m = torch.linspace(0, 1, grid + 1, dtype=torch.float64)
    bets = _bets(x, level)
    capital = torch.zeros(2, grid + 1, dtype=torch.float64)  # the logarithm of what betting up, and down, has made
    lower, upper = torch.zeros_like(x), torch.ones_like(x)
    for start in range(0, len(x), _TOGETHER):
        part = slice(start, start + _TOGETHER)
        off = x[part, None] - m
        up = (bets[part, None].minimum(_MOST / m.clamp_min(1e-12)) * off).log1p().cumsum(0) + capital[0]
        down = (-bets[part, None].minimum(_MOST / (1 - m).clamp_min(1e-12)) * off).log1p().cumsum(0) + capital[1]
        capital = torch.stack([up[-1], down[-1]])
        possible = torch.maximum(up, down) < math.log(2 / level)  # half of the stake on either side
        first = possible.int().argmax(1)
        last = grid - possible.flip(1).int().argmax(1)
        some = possible.any(1)
        lower[part] = torch.where(some, m[(first - 1).clamp_min(0)], 0.0)
        upper[part] = torch.where(some, m[(last + 1).clamp_max(grid)], 1.0)
    return lower.cummax(0).values, upper.cummin(0).values


def _bets(x: Float[Tensor, "n"], level: float) -> Float[Tensor, "n"]:
    """What is bet on each draw, from those before it (the predictable plug-in)."""
    t = torch.arange(1, len(x) + 1, dtype=torch.float64)
    mean = (0.5 + x.cumsum(0)) / (t + 1)
    variance = (0.25 + (x - mean).square().cumsum(0)) / (t + 1)
    before = torch.cat([torch.full((1,), 0.25, dtype=torch.float64), variance[:-1]]) if len(x) else variance
    return (2 * math.log(2 / level) / (before * t * (t + 1).log())).sqrt()


def decided(
    draws: Float[Tensor, "n"], goal: float, *, level: float = 0.05
) -> tuple[Literal["at least", "below"] | None, int]:
    """Whether the mean is certain to be at least ``goal``, or below it, at ``level``, and after how many draws;
    ``(None, n)`` where all of them do not say."""
    lower, upper = confidence_sequence(draws, level=level)
    sure = (lower >= goal) | (upper < goal)
    if not bool(sure.any()):
        return None, len(draws)
    when = int(sure.int().argmax())
    return ("at least" if bool(lower[when] >= goal) else "below"), when + 1


def margin_bound(margins: Float[Tensor, "n"], squared_distance: float) -> float:
    """An upper bound on how often two models' answers differ: the least over ``e`` of
    ``Pr(m <= 2 e) + squared_distance / e**2`` (at most 1).

    If no logit moves by more than ``e``, an answer whose margin is above ``2 e`` stays; how often one does is bounded
    by Chebyshev's inequality.

    Args:
        margins: by how much the original's best logit exceeds the second, for each draw.
        squared_distance: the mean over draws of the squared difference of the logits, *summed* over the vocabulary.
    """
    if squared_distance <= 0:
        return float((margins <= 0).double().mean())
    m = margins.double().sort().values
    m = m[m > 0]
    if not len(m):
        return 1.0
    # between two margins the bound falls with e: the least value is met just before a margin is reached
    reached = torch.searchsorted(margins.double().sort().values, m)
    bound = reached.double() / len(margins) + squared_distance / (m / 2).square()
    return min(1.0, float(bound.min()))
