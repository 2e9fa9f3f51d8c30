"""Random numbers as a pure function of a seed and counters (example index, probe index, ...).

A draw never depends on the batch it was made in, so every statistic is the same for any batch size and for any
number of processes. The generator is SplitMix64 (Steele, Lea and Flood, 2014), applied once per counter.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Int[Tensor, "*shape"], bits: int) -> Int[Tensor, "*shape"]:
    """Logical right shift: torch's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def bits(seed: int, *counters: Int[Tensor, "..."] | int) -> Int[Tensor, "..."]:
    """64 random bits for each element of the broadcast counters; same seed and counters, same bits."""
    state = _mix(torch.tensor(seed, dtype=torch.int64))
    for counter in counters:
        state = _mix(state ^ torch.as_tensor(counter, dtype=torch.int64).cpu())
    return state


def uniform(seed: int, *counters: Int[Tensor, "..."] | int) -> Float[Tensor, "..."]:
    """Uniform float64 draws in [0, 1), one for each element of the broadcast counters."""
    return _shift(bits(seed, *counters), 11).double() * 2.0**-53


def signs(seed: int, *counters: Int[Tensor, "..."] | int) -> Float[Tensor, "..."]:
    """Independent fair signs (-1 or +1, float64), one for each element of the broadcast counters."""
    return 1.0 - 2.0 * (bits(seed, *counters) & 1).double()


def permutation(n: int, seed: int, *counters: int) -> Int[Tensor, "n"]:
    """A random permutation of ``0 .. n-1``."""
    return bits(seed, *counters, torch.arange(n)).argsort(stable=True)


def shifted_partner(n: int, seed: int, *counters: int) -> Int[Tensor, "n"]:
    """For each of ``n`` examples another one of the split (itself only when ``n == 1``): one random cycle."""
    order = permutation(n, seed, *counters)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner
