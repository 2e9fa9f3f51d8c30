"""Random numbers as a pure function of a seed and counters (example index, probe index, ...).

A draw never depends on the batch it was made in, so every statistic is the same for any batch size and for any
number of processes. The generator is SplitMix64 (Steele, Lea and Flood, 2014), applied once per counter.
"""

from __future__ import annotations

import operator
from typing import Any

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


def check_seed(seed: Any) -> int:
    """The seed, where it is one.

    Raises:
        ValueError: no whole number of 64 bits; a generator has a state that draws would change.
    """
    try:
        number = None if isinstance(seed, bool) else operator.index(seed)
    except (TypeError, RuntimeError):
        number = None
    if number is None or not -(2**63) <= number < 2**63:
        raise ValueError(f"seed is {seed!r}; it must be a whole number of at most 63 bits, such as 0")
    return number


def bits(seed: int, *counters: Int[Tensor, "..."] | int) -> Int[Tensor, "..."]:
    """64 random bits for each element of the broadcast counters; same seed and counters, same bits."""
    state = _mix(torch.tensor(check_seed(seed), dtype=torch.int64))
    for counter in counters:
        state = _mix(state ^ torch.as_tensor(counter, dtype=torch.int64).cpu())
    return state


def uniform(seed: int, *counters: Int[Tensor, "..."] | int) -> Float[Tensor, "..."]:
    """Uniform float64 draws in [0, 1), one for each element of the broadcast counters."""
    return _shift(bits(seed, *counters), 11).double() * 2.0**-53


def signs(seed: int, *counters: Int[Tensor, "..."] | int) -> Float[Tensor, "..."]:
    """Independent fair signs (-1 or +1, float64), one for each element of the broadcast counters."""
    return 1.0 - 2.0 * (bits(seed, *counters) & 1).double()


def normal(seed: int, *counters: Int[Tensor, "..."] | int) -> Float[Tensor, "..."]:
    """Standard normal draws (float64), one for each element of the broadcast counters."""
    return torch.special.ndtri(uniform(seed, *counters).clamp_min(2.0**-54))  # 0 would be minus infinity


def permutation(n: int, seed: int, *counters: int) -> Int[Tensor, "n"]:
    """A random permutation of ``0 .. n-1``."""
    return bits(seed, *counters, torch.arange(n)).argsort(stable=True)


def shifted_partner(n: int, seed: int, *counters: int, group: Int[Tensor, "n"] | None = None) -> Int[Tensor, "n"]:
    """For each of ``n`` examples another one (of its ``group``, where these are given; itself only where there is no
    other): one random cycle in each group."""
    order = permutation(n, seed, *counters)
    within = torch.zeros_like(order) if group is None else group[order]
    partner = torch.empty_like(order)
    for name in within.unique():
        members = order[within == name]
        partner[members] = members.roll(1)
    return partner
