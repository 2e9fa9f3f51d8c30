"""Gates: from a mask's logits, a ``keep`` in [0, 1] for every unit, and gates that sum to a size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.arguments import checked

Gates = Callable[[Float[Tensor, "units"], Int[Tensor, "batch"], int], Float[Tensor, "batch units"]]
"""From the logits, the examples of a step and its number: each example's gates."""
Weighting = Callable[[Float[Tensor, "batch"], int], Float[Tensor, "batch"]]
"""From the divergences of a step's examples and its number: how much each counts."""
_STRATA = 8  # sizes in a step
_SMOOTH, _FLOOR = 0.9, 1e-5  # of the levels of the sizes: a running mean; beside the highest none counts as less


def of_random_sizes(least: int, most: int, temperature: float, seed: int) -> Gates:
    """Gates that sum to a size drawn for each step, one in each eighth of the way between the two by logarithm."""

    def gates(logits: Float[Tensor, "units"], index: Int[Tensor, "batch"], step: int) -> Float[Tensor, "batch units"]:
        u = (torch.arange(_STRATA) + _random.uniform(seed, 83, step, torch.arange(_STRATA))) / _STRATA
        k = (math.log(least) + u * math.log(most / least)).exp().to(logits).clamp_max(most)
        return soft_top_k(logits, k, temperature)[_taken(len(index), step)]

    return gates


def _taken(count: int, step: int) -> Int[Tensor, "batch"]:
    """Which of the sizes each of so many examples takes: in turn, from one step to the next."""
    return (torch.arange(count) + step * count) % _STRATA


def relative_to_size() -> Weighting:
    """Each example counts by one over the level of divergence at its size, a running mean over steps: the gradient is
    that of the logarithms. Divergence at the smallest sizes is thousands of times that at the largest, and these would
    learn nothing beside it."""
    levels = torch.full((_STRATA,), float("nan"), dtype=torch.float64)

    def weights(divergences: Float[Tensor, "batch"], step: int) -> Float[Tensor, "batch"]:
        found, size = divergences.detach().double().cpu(), _taken(len(divergences), step)
        seen = torch.bincount(size, minlength=_STRATA)
        now = torch.zeros(_STRATA, dtype=torch.float64).index_add(0, size, found) / seen
        blended = torch.where(levels.isnan(), now, _SMOOTH * levels + (1 - _SMOOTH) * now)
        levels.copy_(torch.where(seen > 0, blended, levels))
        least = max(_FLOOR * float(levels[seen > 0].max()), torch.finfo(torch.float32).tiny)
        return (1 / levels.clamp_min(least)[size]).to(divergences)

    return weights


@checked
def soft_top_k(
    logits: Float[Tensor, "units"], k: Float[Tensor, "batch"], temperature: float
) -> Float[Tensor, "batch units"]:
    """Gates ``sigmoid((logits - threshold) / temperature)`` that sum to ``k``, for each ``k`` between 0 and all units
    (at all units they are 1), with the implicit gradient of the threshold. No model pass.

    Raises:
        ValueError: a ``k`` outside of that.
    """
    n = len(logits)
    if bool(((k <= 0) | (k > n)).any()):
        raise ValueError(
            f"k lies between {float(k.min()):g} and {float(k.max()):g}; it must be positive and at most {n}"
        )
    share = (k.double() / n).clamp_max(1 - 1e-9)[:, None]
    with torch.no_grad():
        scaled = logits.double() / temperature
        low, high = scaled.min() - share.logit(), scaled.max() - share.logit()  # all gates above, all below k / n
        for _ in range(60):
            middle = (low + high) / 2
            more = (scaled - middle).sigmoid().sum(1, keepdim=True) > share * n
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        threshold = (low + high) / 2
        gate = (scaled - threshold).sigmoid()
        weight = gate * (1 - gate)
        weight = (weight / weight.sum(1, keepdim=True).clamp_min(1e-300)).to(logits)
    moved = (weight * (logits - logits.detach())).sum(1, keepdim=True)  # 0, with the threshold's gradient
    return ((logits - moved) / temperature - threshold.to(logits)).sigmoid()
