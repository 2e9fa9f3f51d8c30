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

from tl_sparsify._internal.arguments import checked

_TOGETHER = 64  # draws whose capital is computed at once
_MOST = 0.5  # the share of what a bet may lose at most (c in the paper)


@checked
def confidence_sequence(
    draws: Float[Tensor, "n"], *, level: float = 0.05, grid: int = 1000
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Lower and upper bounds on the mean after each draw: with probability ``1 - level`` *all* of them hold at once, so
    that one may stop when one likes.

    Args:
        draws: numbers in [0, 1], in the order drawn; each with the same mean given those before.
        grid: bounds are multiples of ``1 / grid``, rounded outwards. Both only ever tighten; that they cross has a
            probability of at most ``level``.

    Cost: at most ``n * grid`` operations, no model pass.

    Raises:
        ValueError: a draw outside [0, 1], a level outside (0, 1), a grid below 1.

    Example:
        >>> lower, upper = tls.certificates.confidence_sequence(torch.ones(200))  # 200 successes
        >>> bool(lower[-1] > 0.95), upper[-1].item()
        (True, 1.0)
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it lies between 0 and 1")
    if not 1 <= grid <= 10**6:
        raise ValueError(f"grid is {grid}; it must be at least 1, and at most 1,000,000")
    if draws.ndim != 1:
        raise ValueError(f"draws has shape {tuple(draws.shape)}; it must be [n]")
    x = draws.double().cpu()
    if len(x) and not (bool((x >= 0).all()) and bool((x <= 1).all())):
        raise ValueError(f"draws range from {float(x.min())} to {float(x.max())}; they must lie in [0, 1]")
    every = torch.linspace(0, 1, grid + 1, dtype=torch.float64)
    bets, enough = _bets(x, level), math.log(2 / level)  # half of the stake on either side
    capital = torch.zeros(2, grid + 1, dtype=torch.float64)  # the logarithm of what betting up, and down, has made
    lower, upper = torch.zeros_like(x), torch.ones_like(x)
    low, high = 0, grid  # what lies outside of these stays ruled out
    for start in range(0, len(x), _TOGETHER):
        part, m = slice(start, start + _TOGETHER), every[low : high + 1]
        off = x[part, None] - m
        # a bet of b on x > m loses at most b * m: the limits keep every factor above 1 - _MOST, so no capital hits 0
        up = (bets[part, None].minimum(_MOST / m.clamp_min(1e-12)) * off).log1p().cumsum(0) + capital[0]
        down = (-bets[part, None].minimum(_MOST / (1 - m).clamp_min(1e-12)) * off).log1p().cumsum(0) + capital[1]
        # betting up rules out the least means, betting down the greatest: a number of them says which
        below = (low - 1 + (up >= enough).sum(1)).clamp_min(low).cummax(0).values
        above = (high + 1 - (down >= enough).sum(1)).clamp_max(high).cummin(0).values
        lower[part], upper[part] = every[below], every[above]
        kept = slice(int(below[-1]) - low, int(above[-1]) - low + 1)
        capital = torch.stack([up[-1], down[-1]])[:, kept]
        low, high = int(below[-1]), int(above[-1])
        if low > high:  # they have crossed: nothing is left to rule out
            lower[start + _TOGETHER :], upper[start + _TOGETHER :] = every[low], every[high]
            break
    return lower, upper


def _bets(x: Float[Tensor, "n"], level: float) -> Float[Tensor, "n"]:
    """What is bet on each draw, from those before it (the predictable plug-in)."""
    t = torch.arange(1, len(x) + 1, dtype=torch.float64)
    # one made-up draw of 1/2, with variance 1/4, comes before the first: there must be a bet before anything is seen
    mean = (0.5 + x.cumsum(0)) / (t + 1)
    variance = (0.25 + (x - mean).square().cumsum(0)) / (t + 1)
    # a bet that knew its own draw would prove nothing: it uses the variance up to the draw before
    before = torch.cat([torch.full((1,), 0.25, dtype=torch.float64), variance[:-1]]) if len(x) else variance
    return (2 * math.log(2 / level) / (before * t * (t + 1).log())).sqrt()


@checked
def decided(
    draws: Float[Tensor, "n"], goal: float, *, level: float = 0.05
) -> tuple[Literal["at least", "below"] | None, int]:
    """Whether the mean is certain to be at least ``goal``, or below it, at ``level``, and after how many draws;
    ``(None, n)`` where all of them do not say. No model pass.

    Raises:
        ValueError: as :func:`confidence_sequence`.

    Example:
        >>> tls.certificates.decided(torch.ones(200), goal=0.95)  # certain after 143 successes
        ('at least', 143)
    """
    lower, upper = confidence_sequence(draws, level=level)
    sure = (lower >= goal) | (upper < goal)
    if not bool(sure.any()):
        return None, len(draws)
    when = int(sure.int().argmax())
    return ("at least" if bool(lower[when] >= goal) else "below"), when + 1


@checked
def margin_bound(margins: Float[Tensor, "n"], squared_distance: float) -> float:
    """An upper bound on how often, over some draws, two models' answers differ: the least over ``e`` of
    ``Pr(m <= 2 e) + squared_distance / (2 e**2)`` (at most 1).

    An answer whose margin is above ``2 e`` changes only where the logits move by more than ``2 e**2``, squared and
    summed; how often they do is bounded by Markov's inequality. A margin of 0 is a tie and counts as another answer.

    Args:
        margins: by how much the original's best logit exceeds the second, for each draw.
        squared_distance: the mean over the same draws of the squared difference of the logits, *summed* over the
            vocabulary.

    Raises:
        ValueError: no draws, a negative or NaN margin or distance.

    Example:
        >>> tls.certificates.margin_bound(torch.full((100,), 10.0), squared_distance=0.5)
        0.01
    """
    m = margins.double().cpu().sort().values
    if margins.ndim != 1:
        raise ValueError(f"margins has shape {tuple(margins.shape)}; it must be [n], one for each draw")
    if not len(m) or not bool((m >= 0).all()):
        raise ValueError("margins are empty, negative or NaN: give the best logit minus the second, for each draw")
    if not squared_distance >= 0:
        raise ValueError(f"squared_distance is {squared_distance}; a mean of squares is at least 0")
    if squared_distance == 0:
        return float((m <= 0).double().mean())
    # Let i be the answer, j another one after the change d: z[i] - z[j] >= m and z[j] + d[j] >= z[i] + d[i], so that
    # d[j] - d[i] >= m. Since (d[j] - d[i])^2 <= 2 (d[i]^2 + d[j]^2) <= 2 |d|^2, then |d|^2 >= m^2 / 2 > 2 e^2 where
    # m > 2 e; and Pr(|d|^2 > 2 e^2) <= E |d|^2 / (2 e^2).
    # between two margins the bound falls with e: the least value is met just before a margin is reached
    reached = torch.searchsorted(m, m)
    bound = (reached.double() / len(m) + squared_distance / (m.square() / 2))[m > 0]
    return min([1.0, *bound.tolist()])
